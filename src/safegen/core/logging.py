"""Silencing of diffusers and transformers while they are imported and while they load files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from logging import CRITICAL


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
