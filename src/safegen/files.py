"""Writing files so that nothing is ever half-written: to a temporary neighbour, then renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safegen.errors import BadFile


@contextmanager
def fresh_folder(out: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `out` when the block ends well and vanishes when it does not.

    Raises:
        BadFile: `out` exists, or cannot be written (no such parent, no rights, a full disk).
    """
    _refuse_existing(out, "folder")
    tmp = out.with_name(f".{out.name}.tmp-{os.getpid()}")
    try:
        shutil.rmtree(tmp, ignore_errors=True)
        tmp.mkdir(parents=True)
        yield tmp
        _refuse_existing(out, "folder")  # it may have come into being while we worked
        tmp.rename(out)
    except OSError as error:
        raise BadFile(f"{out} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


@contextmanager
def fresh_file(out: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary path whose file becomes `out` when the block ends well and vanishes when it does not.

    Raises:
        BadFile: `out` exists and `replace` is off, or it cannot be written.
    """
    if out.is_dir():
        raise BadFile(f"{out} is a folder; name a file")
    if not replace:
        _refuse_existing(out, "file")
    tmp = out.with_name(f".{out.name}.tmp-{os.getpid()}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield tmp
        tmp.replace(out)
    except OSError as error:
        raise BadFile(f"{out} cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):  # its folder may be a file
            tmp.unlink(missing_ok=True)


def _refuse_existing(out: Path, kind: str) -> None:
    if os.path.lexists(out):
        raise BadFile(f"{out} exists already; name another {kind} or remove it")
