"""ONNX files that lie in the wheels of other packages, and sessions that compute where they were told to."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from safegen.core.errors import ConfigError, FileError, MissingExtraError, UnknownNameError

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

CPU = ("CPUExecutionProvider",)


def shipped(judge: str, package: str, file: str, *, library: str, extra: str) -> Path:
    """Return the path of a file inside an installed package, which is found but not imported.

    Raises:
        MissingExtraError: the package is not installed.
        FileError: it has no such file.
    """
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise MissingExtraError(f"the judge {judge!r}", library, extra)
    path = Path(spec.origin).parent / file
    if not path.is_file():
        raise FileError(
            f"the installed {library} has no {file}; reinstall it, or give the judge {judge!r} a file: weights=FILE"
        )
    return path


def open_session(
    judge: str, path: Path, *, providers: Sequence[str] | str, threads: int | None, extra: str
) -> tuple[InferenceSession, str]:
    """Return a session on an ONNX file and the file's SHA-256.

    Args:
        judge: who asks, for messages.
        path: the file.
        providers: ONNX Runtime's names of where to compute, the preferred first.
        threads: CPU threads of one call; ONNX Runtime's own choice when None.
        extra: of this package, that installs ONNX Runtime.

    Raises:
        MissingExtraError: ONNX Runtime is not installed.
        UnknownNameError: a provider that this installation does not have.
        ConfigError: no providers, a number of threads under 1, or the preferred provider did not
            start.
        FileError: not a usable ONNX file.
    """
    if find_spec("onnxruntime") is None:
        raise MissingExtraError(f"the judge {judge!r}", "onnxruntime", extra)
    import onnxruntime

    wanted = [providers] if isinstance(providers, str) else list(providers)
    if not wanted:
        raise ConfigError(
            f"providers must name at least one, got none; known: {', '.join(onnxruntime.get_available_providers())}"
        )
    for name in wanted:
        if name not in onnxruntime.get_available_providers():
            raise UnknownNameError(
                "ONNX Runtime provider here", name, onnxruntime.get_available_providers()
            )
    if threads is not None and threads < 1:
        raise ConfigError(f"threads must be >= 1, got {threads}")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what fails is raised
    if threads is not None:
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    try:
        data = path.read_bytes()
        session = onnxruntime.InferenceSession(data, options, providers=wanted)
    except (
        Exception
    ) as error:  # ONNX Runtime has a class per cause; all mean that this file cannot be used
        raise FileError(
            f"{path} cannot be used as the weights of the judge {judge!r}: {' '.join(str(error).split())[:200]}"
        ) from error
    if session.get_providers()[0] != wanted[0]:
        raise ConfigError(
            f"the provider {wanted[0]} did not start, ONNX Runtime fell back to {session.get_providers()[0]}; name that instead"
        )
    return session, hashlib.sha256(data).hexdigest()
