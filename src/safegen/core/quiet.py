"""Libraries below that would write logs, or files outside the output that was named."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from logging import CRITICAL
from pathlib import Path
from tempfile import TemporaryDirectory

INDUCTOR_FOLDER = "TORCHINDUCTOR_CACHE_DIR"
"""Environment variable that names the cache of torch's compiler; torch sets it at import."""


def disable_telemetry() -> None:
    """Disable telemetry of ONNX Runtime unless the user decided; call it before any import.

    ONNX Runtime writes a device id and a database into the user's cache at import, and diffusers
    imports it wherever it is installed.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


@contextmanager
def temporary_matplotlib_folder() -> Iterator[None]:
    """Keep the caches of matplotlib, if the block imports it, in a folder that is removed.

    A user who has a folder of matplotlib, or names one in MPLCONFIGDIR, keeps using it.
    """
    config = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")  # noqa: PTH111
    usual = Path(config) / "matplotlib", Path(os.path.expanduser("~/.matplotlib"))  # noqa: PTH111
    if (
        "matplotlib" in sys.modules
        or "MPLCONFIGDIR" in os.environ
        or any(map(os.path.isdir, usual))
    ):
        yield
        return
    with TemporaryDirectory() as folder:
        os.environ["MPLCONFIGDIR"] = folder
        try:
            yield
        finally:
            del os.environ["MPLCONFIGDIR"]


def remove_inductor_folder() -> None:
    """Remove the cache folder that torch creates at import, if nothing was compiled into it."""
    with suppress(OSError, KeyError):
        Path(os.environ[INDUCTOR_FOLDER]).rmdir()


@contextmanager
def silence_libraries(*names: str) -> Iterator[None]:
    """Hide log messages and progress bars of libraries inside the block, and restore both.

    Exceptions still rise. Nothing is changed for the caller outside the block.

    Args:
        names: libraries with a `utils.logging` module. Default: diffusers and transformers.
    """
    libraries = [
        import_module(f"{name}.utils.logging") for name in names or ("diffusers", "transformers")
    ]
    states = [(lib, lib.get_verbosity(), lib.is_progress_bar_enabled()) for lib in libraries]
    for library in libraries:
        library.set_verbosity(CRITICAL)
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, verbosity, has_progress_bar in states:
            library.set_verbosity(verbosity)
            if has_progress_bar:
                library.enable_progress_bar()
