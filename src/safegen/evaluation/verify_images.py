"""Verification of a run's images: records, files and differences from the base model's images."""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from safegen.core.documents import read_bytes
from safegen.core.errors import UserError
from safegen.core.progress import ProgressCallback
from safegen.evaluation.compare import differences
from safegen.evaluation.run.folder import (
    CHANGES,
    IMAGES,
    SAMPLES,
    Run,
    decode_image,
    image_file,
    image_metadata,
    is_blank,
    read_image,
)
from safegen.evaluation.run.records import SampleRecord, StackEntry
from safegen.evaluation.samples import EvalSample
from safegen.evaluation.schema import FROM_IMAGES
from safegen.metrics.image import pixel_mae


class KeyTally:
    """Number of records of each image in a journal."""

    def __init__(self, places: Mapping[str, int]) -> None:
        """Start with none; `places` has the place of each image of the run by its key."""
        self._places, self._seen = places, bytearray(1 + max(places.values(), default=-1))
        self._more, self.unknown = Counter[str](), Counter[str]()

    def add(self, key: str) -> int | None:
        """Count a record, and return the place of its image; None if it is not in the plan."""
        place = self._places.get(key)
        if place is None:
            self.unknown[key] += 1
        elif self._seen[place]:
            self._more[key] += 1
        else:
            self._seen[place] = 1
        return place

    def repeated(self, name: str, suffix: str = "") -> Iterator[str]:
        """Yield the keys of a journal with several records."""
        more = self._more + Counter({key: n - 1 for key, n in self.unknown.items()})
        for key, n in more.items():
            yield f"{name}: {n + 1} records for {key}{suffix}"

    def coverage(self, name: str) -> Iterator[str]:
        """Yield how many images of the plan have no record, and how many records no image."""
        if missing := len(self._places) - self._seen.count(1):
            yield f"{name}: {missing} of {len(self._places)} images have no record"
        if self.unknown:
            yield f"{name}: {len(self.unknown)} records are of no image of the plan"


class _FileRecord(NamedTuple):
    """What a record says of an image's file."""

    sha256: bytes
    blank: bool
    guards: dict[str, Any] | None


def verify_images(
    run: Run, places: Mapping[str, int], progress: ProgressCallback
) -> tuple[list[str], list[str]]:
    """Return the faults of samples.jsonl and the images, and those of changes.jsonl.

    Each image is read and decoded once, beside that of its base model.

    Args:
        run: the run.
        places: place of each image of the run by its key: stack by stack, sample by sample.
        progress: called with (description, done, total).

    Raises:
        FileError: a journal is damaged.
    """
    check = _ImageCheck(run, places)
    check.read_records()
    compares = not set(FROM_IMAGES).isdisjoint(run.protocol.metrics)
    doubled = check.read_changes() if compares else []
    check.check_images(progress)
    return check.sample_faults(), doubled + [
        line for entry in run.stacks for line in check.change_faults[entry.name]
    ]


class _ImageCheck:
    """Records of a run's images, and the faults that were found, by stack."""

    def __init__(self, run: Run, places: Mapping[str, int]) -> None:
        self.run, self.places, self.n = run, places, len(run.samples)
        self.numbers = {entry.name: number for number, entry in enumerate(run.stacks)}
        self.tally, self.files = KeyTally(places), dict[int, _FileRecord]()
        self.changes: dict[int, float] | None = None
        self.faults = defaultdict[str, list[str]](list)
        self.change_faults = defaultdict[str, list[str]](list)
        self.sizes = defaultdict[str, defaultdict[tuple[int, int], list[int]]](
            lambda: defaultdict(list)
        )
        """Places of the images of each base model by size."""

    def read_records(self) -> None:
        """Note what is recorded of each image's file; compare the records with the plan."""
        for record in self.run.sample_records():
            if (place := self.tally.add(record.key)) is None:
                continue
            entry, sample = self.run.stacks[place // self.n], self.run.samples[place % self.n]
            self.faults[entry.name] += [
                f"{SAMPLES}: {record.key[:16]} has {gap} (record and plan)"
                for gap in _gaps(record, sample, entry)
            ]
            self.files[place] = _FileRecord(
                bytes.fromhex(record.sha256), record.blank, record.guards
            )

    def read_changes(self) -> list[str]:
        """Note the recorded change of each image; return the faults of repeated records."""
        self.changes, tally = {}, KeyTally(self.places)
        for record in self.run.change_records():
            if (place := tally.add(record.key)) is not None:
                self.changes[place] = record.change
        return list(tally.repeated(CHANGES))

    def check_images(self, progress: ProgressCallback) -> None:
        """Check every image, sample by sample: a base model's and those of the stacks on it."""
        done, total = 0, self.n * len(self.run.stacks)
        for base in (entry for entry in self.run.stacks if entry.kind == "base"):
            others = [e for e in self.run.stacks if e.baseline == base.name and e.kind != "base"]
            for i in range(self.n):
                before = self._check(base, i)
                for entry in others:
                    self._compare(entry, i, before, self._check(entry, i))
                done += 1 + len(others)
                progress("verifying images", done, total)

    def _check(self, entry: StackEntry, i: int) -> Image.Image | UserError | None:
        """Return an image, None where it is missing or has a fault, an error if it has no record.

        An image without a record is read for its change alone.
        """
        key = self.run.keys(entry)[i]
        place = self.places[key]
        file, recorded = image_file(entry.name, key), self.files.get(place)
        path = self.run.folder / file
        if recorded is None:
            try:
                return read_image(path) if self.changes and path.is_file() else None
            except UserError as error:
                return error
        if not path.is_file():
            self.faults[entry.name].append(f"{file}: missing")
            return None
        try:
            data = read_bytes(path)
            if hashlib.sha256(data).digest() != recorded.sha256:
                self.faults[entry.name].append(f"{file}: its SHA-256 is not the one in {SAMPLES}")
                return None
            image = decode_image(data, path)
        except UserError as error:
            self.faults[entry.name].append(f"{file}: {_one_line(error)}")
            return None
        self.sizes[entry.baseline][image.size].append(place)
        faults = list(_image_faults(image, file, key, entry, recorded))
        self.faults[entry.name] += faults
        return None if faults else image

    def _compare(
        self,
        entry: StackEntry,
        i: int,
        before: Image.Image | UserError | None,
        image: Image.Image | UserError | None,
    ) -> None:
        """Measure a recorded change again, where both images are without fault."""
        key = self.run.keys(entry)[i]
        change = (self.changes or {}).get(self.places[key])
        if change is None or before is None or image is None:
            return
        name = f"{CHANGES}: {key[:16]}"
        try:
            if isinstance(before, UserError):
                raise before
            if isinstance(image, UserError):
                raise image
            again = pixel_mae(before, image)
        except (UserError, ValueError) as error:
            self.change_faults[entry.name].append(
                f"{name} cannot be measured again: {_one_line(error)}"
            )
        else:
            if change != again:
                self.change_faults[entry.name].append(
                    f"{name} has {change}, the images give {again}"
                )

    def sample_faults(self) -> list[str]:
        """Return the faults of the records and the images."""
        faults = list(self.tally.repeated(SAMPLES))
        for entry in self.run.stacks:
            faults += [*self.faults[entry.name], *self._missing(entry)]
        faults += self._odd_sizes()
        faults += [f"{SAMPLES}: {key[:16]} is not in the plan" for key in self.tally.unknown]
        return faults + self._strays()

    def _missing(self, entry: StackEntry) -> Iterator[str]:
        """Yield how many images of a stack have no record, by list; of changes too."""
        places = [self.places[key] for key in self.run.keys(entry)]
        counts = Counter(
            sample.list_name
            for place, sample in zip(places, self.run.samples, strict=True)
            if place not in self.files
        )
        for name, n in counts.items():
            yield (
                f"{SAMPLES}: {n} of {self.run.card.samples.get(name)} images of {entry.name!r} for "
                f"{name!r} are missing"
            )
        if self.changes is not None and entry.kind != "base":
            own = sum(place not in self.changes for place in places)
            if own:
                self.change_faults[entry.name].append(
                    f"{CHANGES}: {own} images of {entry.name!r} have no record"
                )

    def _odd_sizes(self) -> Iterator[str]:
        """Yield the images of another size than most of their base model's."""
        for group in self.sizes.values():
            usual = max(group, key=lambda size: len(group[size]))
            for size, places in group.items():
                for place in places if size != usual else ():
                    entry = self.run.stacks[place // self.n]
                    file = image_file(entry.name, self.run.keys(entry)[place % self.n])
                    yield (
                        f"{file}: it has {size} pixels, the other images of its base model {usual}"
                    )

    def _strays(self) -> list[str]:
        """Return the files among the images that have no record."""
        strays = []
        for folder, _, names in os.walk(self.run.folder / IMAGES):
            stack = Path(folder).relative_to(self.run.folder / IMAGES).as_posix()
            number = self.numbers.get(stack)
            for name in names:
                place = self.places.get(name.removesuffix(".png"))
                known = place in self.files and number is not None and place // self.n == number
                if not (known and name.endswith(".png")) and (Path(folder) / name).is_file():
                    strays.append((Path(folder) / name).relative_to(self.run.folder).as_posix())
        return [f"{name}: has no record in {SAMPLES}" for name in sorted(strays)]


def _image_faults(
    image: Image.Image, file: str, key: str, entry: StackEntry, recorded: _FileRecord
) -> Iterator[str]:
    """Yield the differences of an image from its record."""
    if is_blank(image) != recorded.blank:
        yield f"{file}: {SAMPLES} has blank = {recorded.blank}, the image differs"
    metadata = image_metadata(image)
    if (metadata.get("key"), metadata.get("stack")) != (key, entry.hash):
        yield f"{file}: its metadata is of another image or stack"
    elif metadata.get("guards") != recorded.guards:
        yield f"{file}: its metadata has another trace of the guards than {SAMPLES}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _gaps(record: SampleRecord, sample: EvalSample, entry: StackEntry) -> list[str]:
    """Return the differences of a record from the plan."""
    file = image_file(entry.name, record.key)
    found = (record.stack, record.list, record.role, record.id, record.seed, record.index)
    wanted = (entry.name, sample.list_name, sample.role, sample.id, sample.seed, sample.index)
    if found == wanted and (record.prompt_sha256, record.file) == (sample.prompt_sha256, file):
        return []
    expected = SampleRecord.of(
        sample,
        key=record.key,
        stack=entry.name,
        file=file,
        sha256=record.sha256,
        blank=record.blank,
        guards=record.guards,
    )
    return differences(record.model_dump(), expected.model_dump())
