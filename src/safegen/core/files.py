"""Read and write files; a half-written file or folder is never taken for a finished one."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safegen.core.documents import read_text
from safegen.core.errors import FileError

HOMES = (Path("/home"), Path("/Users"))
"""Folders of the users' home folders."""
STAGING_DIR = ".unfinished"
"""Folder inside a new folder that holds what is not finished."""


def check_output(path: Path, *, last: str | None = None) -> None:
    """Raise if a new file or folder cannot be written to `path`; call it before long work.

    Args:
        path: the new file or folder.
        last: for a folder, the entry that marks it as finished; see `staged_directory`.

    Raises:
        FileError: `path` exists, a parent is a file, or the parent is not writable.
    """
    if last is not None and is_incomplete(path, last=last):
        raise FileError(
            f"{path} is incomplete: a run was killed or is still working there. "
            "Remove the folder or choose another."
        )
    if os.path.lexists(path):
        raise FileError(f"{path} already exists. Choose another path or remove it.")
    parent = next(folder for folder in path.absolute().parents if exists(folder))
    if not parent.is_dir():
        raise FileError(f"{path} cannot be written: {parent} is a file, not a folder")
    if not os.access(parent, os.W_OK):
        raise FileError(f"{path} cannot be written: {parent} is not writable")


def is_incomplete(folder: Path, *, last: str) -> bool:
    """Return whether a folder is what a killed `staged_directory` leaves."""
    return (folder / STAGING_DIR).is_dir() and not (folder / last).exists()


@contextmanager
def staged_directory(out: Path, *, last: str) -> Iterator[Path]:
    """Yield a temporary folder inside the new folder `out`; its entries move into `out` on success.

    Nothing is ever written outside `out`. A killed process leaves `out` with `STAGING_DIR` and
    without `last`, which moves at the very end and marks the folder as finished. An exception
    removes what was written and the folders that were created for it.

    Args:
        out: folder to create, with its parents.
        last: name of the entry that is moved last; the block must create it.

    Raises:
        FileError: `out` exists or cannot be written.
    """
    check_output(out, last=last)
    parents = [folder for folder in out.parents if not folder.exists()]  # the nearest first
    staging, moved, finished = out / STAGING_DIR, list[Path](), False
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        out.mkdir()
        try:
            staging.mkdir()
            yield staging
            assert (staging / last).exists(), f"the block did not create {last}"
            for entry in sorted(staging.iterdir(), key=lambda path: path.name == last):
                target = out / entry.name
                if os.path.lexists(target):  # rename would replace a file of another process
                    raise FileExistsError(errno.EEXIST, f"{entry.name} was put there meanwhile")
                entry.rename(target)
                moved.append(target)
            finished = True
        finally:
            shutil.rmtree(staging, ignore_errors=True)
            for path in () if finished else moved:
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)
            with suppress(OSError):  # a folder that holds something else stays
                for folder in () if finished else (out, *parents):
                    folder.rmdir()


@contextmanager
def atomic_write(out: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary path; its file becomes `out` on success and is removed otherwise.

    Raises:
        FileError: `out` exists and `replace` is off, or `out` cannot be written.
    """
    if out.is_dir():
        raise FileError(f"{out} must be a file, got a folder")
    if not replace and os.path.lexists(out):
        raise FileError(f"{out} already exists. Choose another path or remove it.")
    temporary = out.with_name(f".{out.name}.tmp-{os.getpid()}")
    with writing(out):
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            temporary.replace(out)
        finally:
            with suppress(OSError):  # the parent may be a file
                temporary.unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise an error of the operating system as a `FileError` that names `path`."""
    try:
        yield
    except OSError as error:
        raise FileError(f"{path} cannot be written: {error.strerror or error}") from error


def exists(path: str | Path, *, file: bool = False) -> bool:
    """Return whether a path, or with `file` a file, exists; False for a name that is not valid."""
    return (os.path.isfile if file else os.path.exists)(path)


def read_lines(path: Path) -> list[str]:
    """Return the lines of a UTF-8 text file, stripped and without blank ones.

    A byte-order mark is skipped. Lines end in LF, CR LF or CR.

    Raises:
        FileError: the file cannot be read or is not UTF-8.
    """
    text = read_text(path)
    # str.splitlines would also split at U+2028
    return [line.strip() for line in text.split("\n") if line.strip()]


def display_name(name: str) -> str:
    """Return the last part of a path, so that no output names a user; other names as they are.

    A home folder is `~`: its last part is the user's name.
    """
    if name.startswith("hub:") or os.sep not in name:
        return name
    path = Path(name)
    return "~" if path == Path.home() or path.parent in HOMES else path.name
