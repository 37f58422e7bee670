"""Read and write files; a half-written file or folder is never taken for a finished one.

Every output is written in a folder beside it, `OUT.unfinished`, and renamed into place at the end.
A lock in that folder tells whether a process still works there.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

from safegen.core.documents import check_regular, read_text
from safegen.core.errors import FileError

if TYPE_CHECKING:
    from filelock import FileLock

HOMES = (Path("/home"), Path("/Users"))
"""Folders of the users' home folders."""
UNFINISHED = ".unfinished"
"""Ending of the folder in which an output is written."""
IN_USE = f"in-use{UNFINISHED}"
"""Folder inside a folder in which a process works."""
LOCK = "safegen.lock"
"""Lock file in such a folder; it also tells that the folder is ours."""
NAME_BYTES = 255
"""Longest file name on common file systems, in bytes."""
LOCK_ATTEMPTS = 3
"""Number of times that an unfinished folder is created, if other processes remove it meanwhile."""


@dataclass
class _Claim:
    """Lock that this process holds on an unfinished folder."""

    lock: FileLock
    created: list[Path]
    """Folders that were created for it, the nearest first."""
    count: int = 1
    """Number of blocks of this process that hold it."""


_claims: dict[Path, _Claim] = {}
_mutex = threading.RLock()


def check_output(path: Path) -> None:
    """Raise if a new file or folder cannot be written to `path`; call it before long work.

    Raises:
        FileError: `path` exists, its name is too long, a parent is a file, or the parent is not
            writable.
    """
    if len(os.fsencode(path.name)) > NAME_BYTES:
        raise FileError(
            f"the name of an output must have at most {NAME_BYTES} bytes, got "
            f"{len(os.fsencode(path.name))}: {path.name!r}. Choose a shorter one."
        )
    if os.path.lexists(path):
        raise FileError(f"{path} already exists. Choose another path or remove it.")
    _check_parent(path, path)


def _check_parent(path: Path, out: Path) -> None:
    """Raise if `path`, which belongs to the output `out`, has no parent that can be written to."""
    parent = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
    if not exists(parent):
        raise FileError(f"{out} cannot be written: {parent} is a link to nothing. Remove the link.")
    if not parent.is_dir():
        raise FileError(f"{out} cannot be written: {parent} is a file, not a folder")
    if not os.access(parent, os.W_OK):
        raise FileError(f"{out} cannot be written: {parent} is not writable")


@contextmanager
def claim(out: Path) -> Iterator[Path]:
    """Yield the unfinished folder of an output, and keep other processes from writing the output.

    The folder is `OUT.unfinished`. What a killed process left in it is removed first; the folder,
    and the parents that were created for it, are removed at the end. A process can claim an output
    that it has claimed already. An output in a folder that this process has claimed is claimed with
    it, and is written in that folder's unfinished one.

    Raises:
        FileError: another process has claimed `out`, or the folder cannot be written.
    """
    if (shared := _claimed_above(out)) is not None:
        yield shared
        return
    name = out.name
    if len(os.fsencode(name + UNFINISHED)) > NAME_BYTES:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    with _claim(out.with_name(name + UNFINISHED), out) as folder:
        yield folder


@contextmanager
def claim_folder(folder: Path) -> Iterator[None]:
    """Keep other processes from working in a folder, which is created if it does not exist.

    If it is empty at the end, the folder and the parents that were created for it are removed.

    Raises:
        FileError: another process has claimed `folder`, or it cannot be written.
    """
    with _claim(folder / IN_USE, folder):
        yield


@contextmanager
def share_claim(folder: Path) -> Iterator[None]:
    """Write in a folder that another process has claimed, and that lets this one work there.

    Outputs are written in the claimed folder's unfinished one, which the other process clears.
    """
    from filelock import FileLock

    unfinished = Path(os.path.realpath(folder)) / IN_USE
    with _mutex:
        _claims[unfinished] = _Claim(FileLock(unfinished / LOCK), [])  # the other process has it
    try:
        yield
    finally:
        with _mutex:
            del _claims[unfinished]


def _claimed_above(out: Path) -> Path | None:
    """Return the unfinished folder of the nearest folder above an output that is claimed here."""
    with _mutex:
        if not _claims or not out.parent.is_dir():
            return None
        parents = Path(os.path.realpath(out.parent) + os.sep + out.name).parents
        return next((p / IN_USE for p in parents if p / IN_USE in _claims), None)


def is_unfinished(path: Path) -> bool:
    """Return whether a path is the unfinished folder of an output, as a killed process leaves."""
    return path.name.endswith(UNFINISHED) and path.is_dir()


@contextmanager
def _claim(folder: Path, out: Path) -> Iterator[Path]:
    _check_parent(folder, out)
    folder = Path(os.path.realpath(folder.parent)) / folder.name
    with _mutex, writing(out):
        if folder in _claims:
            _claims[folder].count += 1
        else:
            _claims[folder] = _acquire(folder, out)
    try:
        yield folder
    finally:
        with _mutex:
            _claims[folder].count -= 1
            if not _claims[folder].count:
                _release(folder, _claims.pop(folder))


def _acquire(folder: Path, out: Path) -> _Claim:
    from filelock import FileLock, Timeout

    created = [parent for parent in folder.parents if not parent.exists()]
    lock = FileLock(folder / LOCK, timeout=0, thread_local=False)
    try:
        _lock(folder, lock)
    except Timeout:
        raise FileError(
            f"{out} is being written by another process. Wait for it, or choose another path."
        ) from None
    except OSError:
        _remove_empty([folder, *created])
        raise
    _clear(folder)
    return _Claim(lock, created)


def _lock(folder: Path, lock: FileLock) -> None:
    for attempt in range(1, LOCK_ATTEMPTS + 1):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if any(folder.iterdir()) and not (folder / LOCK).exists():
                raise FileError(f"{folder} was not made by safegen. Rename it or remove it.")
            lock.acquire()
        except FileNotFoundError:  # another process has just removed the folder
            if attempt == LOCK_ATTEMPTS:
                raise
        else:
            return


def _release(folder: Path, claim: _Claim) -> None:
    _clear(folder)
    with suppress(OSError):  # while it is locked: afterwards it may be another process's
        (folder / LOCK).unlink()
    claim.lock.release()
    _remove_empty([folder, *claim.created])


def _clear(folder: Path) -> None:
    """Remove everything but the lock from an unfinished folder."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != LOCK:
            path.unlink(missing_ok=True)


def _remove_empty(folders: list[Path]) -> None:
    """Remove folders, the innermost first, up to the first that is not empty."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


@contextmanager
def staged_directory(out: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes the new folder `out` on success and is removed otherwise.

    Args:
        out: folder to create, with its parents.

    Raises:
        FileError: `out` exists, cannot be written, or is being written by another process.
    """
    check_output(out)
    with claim(out) as unfinished, writing(out), _temporary_folder(unfinished) as staging:
        check_output(out)  # another process may have finished it before the claim
        yield staging
        for path in staging.rglob("*"):
            _set_mode(path, staging)
        staging.rename(out)  # replaces nothing but an empty folder


@contextmanager
def atomic_write(out: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary path; its file becomes `out` on success and is removed otherwise.

    The file gets the permissions of a new file, also if a library writes others.

    Raises:
        FileError: `out` exists and `replace` is off, it is no regular file, it cannot be written,
            or it is being written by another process.
    """
    if out.is_dir():
        raise FileError(f"{out} must be a file, got a folder")
    if replace and exists(out):  # a pipe or a device would become a file
        check_regular(out, out.stat().st_mode)
    with claim(out) as unfinished, writing(out), _temporary_folder(unfinished) as folder:
        if not replace and os.path.lexists(out):
            raise FileError(f"{out} already exists. Choose another path or remove it.")
        temporary = folder / out.name
        yield temporary
        _set_mode(temporary, folder)
        if replace:
            temporary.replace(out)
        else:
            _rename_new(temporary, out)


@contextmanager
def _temporary_folder(parent: Path) -> Iterator[Path]:
    """Yield a new folder with the permissions that `mkdir` gives, and remove it."""
    folder = parent / uuid4().hex
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _set_mode(path: Path, folder: Path) -> None:
    """Give a file the permissions of a new one: those of a new folder, but not to execute it."""
    if path.is_file() and not path.is_symlink():
        path.chmod(folder.stat().st_mode & 0o666)


def _rename_new(source: Path, target: Path) -> None:
    """Rename a file; unlike `os.rename`, never replace another."""
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from None
        source.rename(target)


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
