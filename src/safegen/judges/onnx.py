"""Lookup of ONNX files in installed packages, and ONNX Runtime sessions."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from safegen.core.documents import read_bytes
from safegen.core.errors import ConfigError, FileError, MissingExtraError, UnknownNameError
from safegen.core.settings import MAX_THREADS

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

CPU = ("CPUExecutionProvider",)
MAX_FILE = 2**31
"""Largest ONNX file in bytes; the format itself holds no more."""


def find_package_file(judge: str, package: str, file: str, *, library: str, extra: str) -> Path:
    """Return the path of a file of an installed package; the package is not imported.

    Raises:
        MissingExtraError: the package is not installed.
        FileError: the package has no such file.
    """
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise MissingExtraError(f"the judge {judge!r}", library, extra)
    path = Path(spec.origin).parent / file
    if not path.is_file():
        raise FileError(
            f"the installed {library} has no {file}. Reinstall it, or set weights=FILE for the "
            f"judge {judge!r}."
        )
    return path


def open_session(
    judge: str, path: Path, *, providers: Sequence[str] | str, threads: int | None, extra: str
) -> tuple[InferenceSession, str]:
    """Return an ONNX Runtime session on a file, and the file's SHA-256.

    Args:
        judge: name of the judge, for messages.
        path: ONNX file.
        providers: ONNX Runtime execution providers, the preferred first.
        threads: number of CPU threads; chosen by ONNX Runtime if None.
        extra: extra of this package that installs ONNX Runtime, for messages.

    Raises:
        MissingExtraError: ONNX Runtime is not installed.
        UnknownNameError: this installation of ONNX Runtime has no such provider.
        ConfigError: there are no providers, `threads` is out of range, or the preferred provider
            does not start.
        FileError: the file is not a usable ONNX file.
    """
    if find_spec("onnxruntime") is None:
        raise MissingExtraError(f"the judge {judge!r}", "onnxruntime", extra)
    import onnxruntime

    available = onnxruntime.get_available_providers()
    names = [providers] if isinstance(providers, str) else list(providers)
    if not names:
        raise ConfigError(
            f"providers must have at least one name, got none. Known: {', '.join(available)}."
        )
    for name in names:
        if name not in available:
            raise UnknownNameError("installed ONNX Runtime provider", name, available)
    if threads is not None and not 1 <= threads <= MAX_THREADS:
        raise ConfigError(f"threads must be in 1..{MAX_THREADS}, got {threads}")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors are raised, not logged
    if threads is not None:
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    try:
        data = read_bytes(path, limit=MAX_FILE)
        session = onnxruntime.InferenceSession(data, options, providers=names)
    except Exception as error:  # ONNX Runtime raises a class per cause
        raise FileError(
            f"{path} cannot be used as the weights of the judge {judge!r}: "
            f"{' '.join(str(error).split())[:200]}"
        ) from error
    active = session.get_providers()[0]
    if active != names[0]:
        raise ConfigError(
            f"provider {names[0]} does not start, ONNX Runtime uses {active} instead. "
            f"Set providers={active!r}."
        )
    return session, hashlib.sha256(data).hexdigest()
