"""Append-only JSON-lines files that survive a killed process, with typed records."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Generic, Self, TypeVar

from pydantic import BaseModel, ValidationError

from safegen.core.errors import FileError, explain

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

    def __enter__(self) -> Self:
        """Return the journal."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close and unlock the file."""
        self._file.close()


def to_lines(records: Sequence[BaseModel]) -> str:
    """Return records as lines of JSON; equal records give equal lines."""
    return "".join(r.model_dump_json(exclude_defaults=True) + "\n" for r in records)


def read_journal(path: Path, record: type[R]) -> tuple[list[R], int]:
    """Return the complete records of a journal, and the number of bytes that they take.

    A missing file has no records. A torn last line is left out.

    Raises:
        FileError: a complete line is not such a record; the message names the line and the field.
    """
    data = path.read_bytes() if path.exists() else b""
    size, records = data.rfind(b"\n") + 1, []
    for number, line in enumerate(data[:size].splitlines(), 1):
        try:
            records.append(record.model_validate_json(line))
        except ValidationError as error:
            raise FileError(
                f"{path}:{number} is damaged: {explain(error)}. Restore it or start a new run."
            ) from error
    return records, size


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
