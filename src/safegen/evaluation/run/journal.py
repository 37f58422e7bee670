"""Append-only JSON-lines files that survive a killed process, with typed records."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Generic, Self, TypeVar

from pydantic import BaseModel

from safegen.core.documents import MAX_BYTES, check_regular, parse_record
from safegen.core.errors import FileError

R = TypeVar("R", bound=BaseModel)


class Journal(Generic[R]):
    """Append-only file of records, locked while open. Opening removes a torn last line.

    Args:
        path: the file; it is created if missing.
        record: class of the records.

    Raises:
        FileError: another process writes the file, or a line is damaged.
    """

    def __init__(self, path: Path, record: type[R]) -> None:
        if path.exists():
            check_regular(path, path.stat().st_mode)
        self._file: IO[bytes] = path.open("a+b")
        try:
            _lock(self._file, path)
            self.records, size = read_journal(path, record)
            self._file.truncate(size)
        except BaseException:
            self._file.close()
            raise

    def append(self, records: Sequence[R]) -> None:
        """Write records to the file; they survive the process once this returns."""
        self._file.write(to_lines(records).encode())
        self._file.flush()
        self.records += records

    def keep(self, n: int) -> None:
        """Remove all records but the first `n`."""
        self._file.seek(0)
        for _ in range(n):
            self._file.readline()
        self._file.truncate(self._file.tell())
        self.records = self.records[:n]

    def __enter__(self) -> Self:
        """Return the journal."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close and unlock the file."""
        self._file.close()


def to_line(record: BaseModel) -> str:
    """Return a record as a line of JSON; equal records give equal lines."""
    return record.model_dump_json(exclude_defaults=True) + "\n"


def to_lines(records: Iterable[BaseModel]) -> str:
    """Return records as lines of JSON."""
    return "".join(map(to_line, records))


def read_journal(path: Path, record: type[R]) -> tuple[list[R], int]:
    """Return the complete records of a journal, and the number of bytes that they take.

    A missing file has no records. A torn last line is left out.

    Raises:
        FileError: it is no regular file, or a complete line is not such a record; the message
            names the line and the field.
    """
    records, size = list[R](), 0
    for entry, length in iter_lines(path, record):
        records.append(entry)
        size += length
    return records, size


def iter_journal(path: Path, record: type[R]) -> Iterator[R]:
    """Yield the complete records of a journal; see `read_journal`. One is in memory at a time."""
    return (entry for entry, _ in iter_lines(path, record))


def iter_lines(path: Path, record: type[R]) -> Iterator[tuple[R, int]]:
    """Yield each record and the number of bytes of its line."""
    if not path.exists():
        return
    check_regular(path, path.stat().st_mode)
    with path.open("rb") as file:
        lines = iter(lambda: file.readline(MAX_BYTES), b"")
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n") and len(line) < MAX_BYTES:
                break
            try:
                entry = parse_record(record, line, f"{path}:{number}")
            except FileError as error:
                raise FileError(f"{error}. Restore it or start a new run.") from error
            yield entry, len(line)


def is_torn(path: Path) -> bool:
    """Return whether the last line of a journal has no end, as a killed process leaves it.

    Raises:
        FileError: it is no regular file.
    """
    check_regular(path, path.stat().st_mode)
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return False
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def _lock(file: IO[bytes], path: Path) -> None:
    """Lock a file against other processes, on systems that can."""
    with suppress(ImportError):
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise FileError(
                f"{path} is being written by another process. Wait for it, or stop it."
            ) from error
