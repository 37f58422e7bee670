"""Writing files so that nothing half-written is ever taken for finished: to a temporary place, then renamed."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safegen.core.errors import FileError

STAGING_DIR = ".unfinished"
"""Where `staged_directory` keeps what is not finished."""


@contextmanager
def atomic_directory(out: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `out` when the block ends well and vanishes when it does not.

    Raises:
        FileError: `out` exists, or cannot be written (no such parent, no rights, a full disk).
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
        raise FileError(f"{out} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


@contextmanager
def swap_directory(out: Path) -> Iterator[Path]:
    """Yield a temporary folder that takes the place of `out` when the block ends well; else `out` stays as it was.

    A kill between the two renames at the end leaves both beside it, whole, under hidden names.

    Raises:
        FileError: it cannot be written.
    """
    tmp, old = (out.with_name(f".{out.name}.{word}-{os.getpid()}") for word in ("tmp", "old"))
    try:
        shutil.rmtree(tmp, ignore_errors=True)
        tmp.mkdir(parents=True)
        yield tmp
        if out.exists():
            out.rename(old)
        tmp.rename(out)
    except OSError as error:
        raise FileError(f"{out} cannot be written: {error.strerror or error}") from error
    finally:
        if old.exists() and not out.exists():
            old.rename(out)
        for left in (tmp, old):
            shutil.rmtree(left, ignore_errors=True)


@contextmanager
def staged_directory(out: Path, *, last: str) -> Iterator[Path]:
    """Yield a temporary folder inside the new folder `out`; its entries move up into `out` when the block ends well.

    For what must never lie outside the folder that was named, not even after a kill: a killed run
    leaves `out` with `STAGING_DIR` in it and without `last`, which is moved at the very end and so
    marks the whole as finished. Any other end without success leaves nothing.

    Args:
        out: folder to make, with the ones around it.
        last: name of the entry that is moved last; the block must make it.

    Raises:
        FileError: `out` exists, or cannot be written.
    """
    check_new_directory(out, last=last)
    tmp, moved, done = out / STAGING_DIR, list[Path](), False
    around = [folder for folder in out.parents if not folder.exists()]  # the nearest first
    try:
        out.mkdir(parents=True)
    except FileExistsError:
        _refuse_existing(out, "folder")
        raise
    except OSError as error:
        _remove_empty(around)
        raise FileError(f"{out} cannot be written: {error.strerror or error}") from error
    try:
        tmp.mkdir()
        yield tmp
        assert (tmp / last).exists(), f"the block did not make {last}"
        for entry in sorted(tmp.iterdir(), key=lambda path: path.name == last):
            if os.path.lexists(out / entry.name):  # a file would be replaced without a word
                raise FileExistsError(
                    errno.EEXIST, f"someone else put {entry.name} there meanwhile"
                )
            entry.rename(out / entry.name)
            moved.append(out / entry.name)
            done = entry.name == last
    except OSError as error:
        raise FileError(f"{out} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
        if not done:
            for path in moved:  # not `out` as a whole: someone else may have put something there
                _remove(path)
            _remove_empty([out, *around])


def check_new_directory(out: Path, *, last: str) -> None:
    """Refuse what `staged_directory` would refuse, before the work begins.

    Raises:
        FileError: `out` exists; the message says so if it is unfinished.
    """
    if is_incomplete(out, last=last):
        raise FileError(
            f"{out} is unfinished: a run was killed there, or is still at work; remove that folder, or name another"
        )
    _refuse_existing(out, "folder")


def check_writable(out: Path) -> None:
    """Refuse a place that a file could not be written to, before hours of work for it.

    Raises:
        FileError: what should be a folder on its way is a file, or nothing may be written there.
    """
    at = next(folder for folder in out.absolute().parents if exists(folder))
    if not at.is_dir():
        raise FileError(f"{out} cannot be written: {at} is a file, not a folder")
    if not os.access(at, os.W_OK):
        raise FileError(f"{out} cannot be written: nothing may be written to {at}")


def is_incomplete(folder: Path, *, last: str) -> bool:
    """Return whether a folder is what a killed `staged_directory` leaves."""
    return (folder / STAGING_DIR).is_dir() and not (folder / last).exists()


@contextmanager
def atomic_write(out: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary path whose file becomes `out` when the block ends well and vanishes when it does not.

    Raises:
        FileError: `out` exists and `replace` is off, or it cannot be written.
    """
    if out.is_dir():
        raise FileError(f"{out} is a folder; name a file")
    if not replace:
        _refuse_existing(out, "file")
    tmp = out.with_name(f".{out.name}.tmp-{os.getpid()}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield tmp
        tmp.replace(out)
    except OSError as error:
        raise FileError(f"{out} cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):  # its folder may be a file
            tmp.unlink(missing_ok=True)


def exists(path: str | Path, *, file: bool = False) -> bool:
    """Return whether something, or a file, is there.

    A name that the system does not take (too long, say) is not.
    """
    return (os.path.isfile if file else os.path.exists)(path)


def read_lines(path: Path) -> list[str]:
    """Return a text file's lines that are not blank, stripped: UTF-8, with or without a byte-order mark, ended by LF, CR LF or CR.

    Raises:
        FileError: it cannot be read, or is not UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise FileError(f"{str(path)!r} is not UTF-8 text: {error}") from error
    except OSError as error:
        raise FileError(f"{str(path)!r} cannot be read: {error.strerror or error}") from error
    return [
        line.strip() for line in text.split("\n") if line.strip()
    ]  # not splitlines, which cuts at U+2028 and the like


def display_name(name: str) -> str:
    """Return a path's last part, for what we write names no machine and no user.

    Names of tables and of the hub as they are.
    """
    return name if name.startswith("hub:") or os.sep not in name else Path(name).name


def _refuse_existing(out: Path, kind: str) -> None:
    if os.path.lexists(out):
        raise FileError(f"{out} exists already; name another {kind} or remove it")


def _remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _remove_empty(folders: list[Path]) -> None:
    """Remove folders in this order, up to the first that cannot be removed."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()
