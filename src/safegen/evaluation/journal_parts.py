"""Journals of several folders, read as one: lines are found by key and not kept in memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

from pydantic import BaseModel

from safegen.core.documents import parse_record
from safegen.core.errors import FileError
from safegen.evaluation.run.journal import iter_lines

R = TypeVar("R", bound=BaseModel)


class _Line(NamedTuple):
    """Place of a record."""

    part: int
    start: int
    size: int


class JournalParts(Generic[R]):
    """Records of one journal that lie in several folders.

    Args:
        folders: the folders; a folder without the journal has no records.
        name: name of the journal's file.
        record: class of the records.
        key: function that returns what names a record.
        same: function of two records with one key that tells whether they say the same. Default:
            whether their lines are equal.

    Raises:
        FileError: a line is damaged, or two records with one key differ.
    """

    def __init__(
        self,
        folders: Sequence[Path],
        name: str,
        record: type[R],
        key: Callable[[R], str],
        *,
        same: Callable[[R, R], bool] | None = None,
    ) -> None:
        self.folders, self.name, self.record, self._same = folders, name, record, same
        self._lines: dict[str, _Line] = {}
        self.counts = Counter[int]()
        """Number of records by the position of their folder."""
        for part in range(len(folders)):
            for found, line in self._scan(part):
                self.counts[part] += 1
                known = self._lines.setdefault(key(found), line)
                if known != line:
                    self._check_equal(key(found), known, line)

    def __contains__(self, key: str) -> bool:
        """Return whether there is a record with a key."""
        return key in self._lines

    def __iter__(self) -> Iterator[str]:
        """Yield the keys, in the order in which they were found."""
        return iter(self._lines)

    def folder(self, key: str) -> Path:
        """Return the first folder with a record."""
        return self.folders[self._lines[key].part]

    def read(self, key: str) -> R:
        """Return a record."""
        line = self._lines[key]
        return parse_record(self.record, self._read(line), str(self._path(line.part)))

    def write(self, path: Path, keys: Iterable[str]) -> None:
        """Write the lines of some records to a file, in the order of the keys."""
        with path.open("wb") as file:
            for key in keys:
                file.write(self._read(self._lines[key]))

    def _path(self, part: int) -> Path:
        return self.folders[part] / self.name

    def _scan(self, part: int) -> Iterator[tuple[R, _Line]]:
        """Yield the complete records of a folder with their places; a torn last line is left."""
        start = 0
        for record, size in iter_lines(self._path(part), self.record):
            yield record, _Line(part, start, size)
            start += size

    def _read(self, line: _Line) -> bytes:
        with self._path(line.part).open("rb") as file:
            file.seek(line.start)
            return file.read(line.size)

    def _check_equal(self, key: str, one: _Line, other: _Line) -> None:
        lines = [self._read(line) for line in (one, other)]
        if lines[0] == lines[1]:
            return
        records = [parse_record(self.record, line, self.name) for line in lines]
        if self._same is None or not self._same(*records):
            a, b = (self._path(line.part) for line in (one, other))
            raise FileError(
                f"parts must agree, got two records of {key[:40]} in {a} and {b} that differ. "
                "Leave one of the parts out."
            )
