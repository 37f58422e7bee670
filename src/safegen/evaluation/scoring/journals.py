"""Values of a run's journals in the order of its plan, read record by record."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

from numpy import float64
from numpy.typing import NDArray

from safegen.core.errors import FileError
from safegen.evaluation.run.folder import CHANGES, DETECTIONS, FEATURES, SAMPLES, Run
from safegen.evaluation.run.journal import to_line
from safegen.evaluation.run.records import (
    WITHHELD,
    ChangeRecord,
    DetectionsRecord,
    FeatureRecord,
    ImageRecord,
    SampleRecord,
    StackEntry,
)
from safegen.evaluation.schema import FROM_FEATURES, FROM_IMAGES
from safegen.judges.base import Detections

R = TypeVar("R", bound=ImageRecord)
V = TypeVar("V")
_MISSING: Any = object()


class JournalValues(Generic[R, V]):
    """A value of each image from a journal, and the SHA-256 over the records in the plan's order.

    A record is hashed and dropped; only one that is read before its turn waits, as text. Of several
    records of one image the last one counts.
    """

    def __init__(
        self,
        run: Run,
        name: str,
        places: Mapping[str, int],
        stacks: Sequence[StackEntry],
        value: Callable[[R], V],
    ) -> None:
        """Prepare for the records of some stacks.

        Args:
            run: the run.
            name: name of the journal.
            places: place of each image of the run by its key, stack by stack.
            stacks: stacks with images that count.
            value: what is kept of a record.
        """
        self.run, self.name, self.places, self.value = run, name, places, value
        self.size = len(run.samples)
        self._numbers = {e.name: i for i, e in enumerate(run.stacks) if e in stacks}
        self._wanted = set(self._numbers.values())
        self._values: list[V] = [_MISSING] * len(places)
        self._hash, self._waiting = hashlib.sha256(), dict[int, str]()
        self._turns = self._order()
        self._turn = next(self._turns, -1)
        self._is_repeated = False

    def _order(self) -> Iterator[int]:
        """Yield the places that count."""
        for number in self._numbers.values():
            yield from range(number * self.size, (number + 1) * self.size)

    def read(self, records: Iterable[R]) -> None:
        """Take the values of records."""
        for record in records:
            self.add(record)

    def add(self, record: R) -> None:
        """Take the value of a record; one of no wanted image is left out."""
        place = self.places.get(record.key)
        if place is None or place // self.size not in self._wanted:
            return
        if self._values[place] is not _MISSING:
            self._is_repeated = True
        self._values[place] = self.value(record)
        self._waiting[place] = to_line(record)
        while line := self._waiting.pop(self._turn, ""):
            self._hash.update(line.encode())
            self._turn = next(self._turns, -1)

    def of(self, entry: StackEntry) -> list[V]:
        """Return the values of a stack's images, in order.

        Raises:
            FileError: some are missing.
        """
        start = self._numbers[entry.name] * self.size
        values = self._values[start : start + self.size]
        present = sum(value is not _MISSING for value in values)
        if present < len(values):
            raise FileError(
                f"{self.run.folder} is not complete: {self.name} has {present} of {len(values)} "
                f"images of {entry.name!r}. Resume with the command that began it."
            )
        return values

    def digest(self, records: Callable[[], Iterable[R]]) -> str:
        """Return the SHA-256 over the lines of the records, after all have been read.

        Args:
            records: gives the records again, for a journal with several of one image.
        """
        if not self._is_repeated:
            return self._hash.hexdigest()
        again = {self.places[r.key]: to_line(r) for r in records() if r.key in self.places}
        digest = hashlib.sha256()
        for place in self._order():
            digest.update(again[place].encode())
        return digest.hexdigest()


def read_by_judge(
    run: Run, places: Mapping[str, int]
) -> dict[str, JournalValues[DetectionsRecord, Detections]]:
    """Return the detections of every judge, by its id. Equal ones without items are one object.

    Args:
        run: the run.
        places: place of each image of the run by its key, stack by stack.

    Raises:
        FileError: the journal is damaged.
    """
    shared = dict[Detections, Detections]()

    def value(record: DetectionsRecord) -> Detections:
        seen = record.detections
        return seen if seen.items else shared.setdefault(seen, seen)

    journals = dict[str, JournalValues[DetectionsRecord, Detections]]()
    for record in run.detections_records():
        if record.judge not in journals:
            journals[record.judge] = JournalValues(run, DETECTIONS, places, run.stacks, value)
        journals[record.judge].add(record)
    return journals


class Journals:
    """Values of a run's journals: `samples`, `detections`, `changes` and `features`."""

    def __init__(
        self,
        run: Run,
        places: Mapping[str, int],
        judge: str,
        detections: JournalValues[DetectionsRecord, Detections],
    ) -> None:
        """Read the journals that the protocol needs.

        Args:
            run: the run.
            places: place of each image of the run by its key, stack by stack.
            judge: id of the judge.
            detections: its detections.

        Raises:
            FileError: a journal is damaged.
        """
        self.run, self.judge, self.detections = run, judge, detections
        self._ids: dict[str, set[str]] = {FEATURES: set(), CHANGES: set()}
        metrics = set(run.protocol.metrics)
        edited = [entry for entry in run.stacks if entry.kind != "base"]
        changed = edited if metrics & set(FROM_IMAGES) else []
        measured = run.stacks if metrics & set(FROM_FEATURES) else ()
        self.samples = JournalValues(run, SAMPLES, places, run.stacks, _blank_and_failure)
        self.changes = JournalValues(run, CHANGES, places, changed, self._change)
        self.features = JournalValues(run, FEATURES, places, measured, self._features)
        self.samples.read(run.sample_records())
        self.changes.read(run.change_records())
        self.features.read(run.feature_records())

    def _change(self, record: ChangeRecord) -> tuple[float, float | None]:
        self._ids[CHANGES].add(record.lpips_id or "")
        return record.change, record.lpips

    def _features(self, record: FeatureRecord) -> tuple[NDArray[float64] | None, float | None]:
        self._ids[FEATURES].add(record.extractor)
        return record.array, record.clip_score

    def digests(self) -> dict[str, str]:
        """Return the SHA-256 over the records that count, by the name of the journal."""
        run, judge = self.run, self.judge
        return {
            SAMPLES: self.samples.digest(run.sample_records),
            DETECTIONS: self.detections.digest(
                lambda: (r for r in run.detections_records() if r.judge == judge)
            ),
            CHANGES: self.changes.digest(run.change_records),
            FEATURES: self.features.digest(run.feature_records),
        }

    def weights(self) -> dict[str, str]:
        """Return the ids of the networks that made the records.

        Raises:
            FileError: several networks of one kind made them.
        """
        weights: dict[str, str] = {}
        for name, journal in (("extractor", FEATURES), ("lpips", CHANGES)):
            ids = sorted(self._ids[journal])
            if len(ids) > 1:
                raise FileError(
                    f"{self.run.folder / journal} must be by one {name}, got {', '.join(ids)}. "
                    "Start a new run."
                )
            if ids and ids[0]:
                weights[name] = ids[0]
        return weights


def _blank_and_failure(record: SampleRecord) -> tuple[bool, str | None]:
    """Return whether an image has one color, and why a guard that failed withheld it, if it did.

    The judge saw a black image in its place, in which there is nothing. A prompt that a guard
    blocked by its rule is different: that is what the stack does.
    """
    if record.failed and record.guards:
        return record.blank, f"{WITHHELD}{record.guards.get('reason')}"
    return record.blank, None
