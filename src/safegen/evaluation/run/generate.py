"""Generation of a run's images in batches, without its journals."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Self

from PIL import Image

from safegen.core.errors import ConfigError, FileError, is_out_of_memory
from safegen.core.files import atomic_write
from safegen.core.png import encode_image
from safegen.evaluation.run.folder import (
    SAMPLES,
    Run,
    image_file,
    image_metadata,
    is_blank,
    read_image,
)
from safegen.evaluation.run.records import SampleRecord, StackEntry, TimingRecord, is_failure
from safegen.evaluation.samples import EvalSample, image_keys
from safegen.guards import GeneratedImage
from safegen.stack import Stack
from safegen.stack_loader import LoadedStack, StackLoader

WRITERS = 8
"""Threads that compress and write the images of a batch."""


@dataclass(frozen=True)
class Batch:
    """Images of one stack that are generated and judged together."""

    stack: StackEntry
    number: int
    """Number of the batch within the stack."""
    samples: Sequence[EvalSample]
    keys: Sequence[str]
    base_files: Sequence[str]
    """Files of the base model's images of the same samples; empty for a base model."""

    @property
    def files(self) -> list[str]:
        """Files of the images, relative to the run's directory."""
        return [image_file(self.stack.name, key) for key in self.keys]


def split_batches(
    run: Run, samples: Sequence[EvalSample], numbers: Collection[int]
) -> Iterator[Batch]:
    """Yield batches of a run, stack by stack; they do not depend on what is already done.

    Args:
        run: the run.
        samples: samples of one stack.
        numbers: numbers of the batches of each stack to yield.
    """
    generation = run.protocol.generation
    hashes = {entry.name: entry.hash for entry in run.stacks}
    for stack in run.stacks:
        for number in sorted(numbers):
            start = number * generation.batch_size
            part = samples[start : start + generation.batch_size]
            keys = image_keys(part, stack.hash, generation)
            base_keys = image_keys(part, hashes[stack.baseline], generation)
            base = [image_file(stack.baseline, key) for key in base_keys]
            yield Batch(stack, number, part, keys, [] if stack.kind == "base" else base)


@dataclass(frozen=True)
class BatchJob:
    """What a run lacks of a batch."""

    batch: Batch
    size: int
    """Images to generate at once."""
    records: Mapping[str, SampleRecord]
    """Records of the batch's images that the run has, by key."""
    generate: bool = False
    """Whether an image or its record is missing."""
    judge: bool = False
    """Whether detections are missing."""
    change: bool = False
    """Whether differences from the base model's images are missing."""
    features: bool = False
    """Whether features are missing."""

    @property
    def needs_scores(self) -> bool:
        """Whether the images are to be judged or measured."""
        return self.judge or self.change or self.features


class BatchTooLargeError(Exception):
    """A batch does not fit in memory; fewer images at once may."""


@dataclass(frozen=True)
class GeneratedBatch:
    """Images of a batch, which are written, and what the journals lack about them."""

    images: Sequence[Image.Image]
    records: Sequence[SampleRecord]
    """Records of the images that had none."""
    timing: TimingRecord


class BatchGenerator:
    """Generates whole batches, and writes the images that are missing. It writes no journal."""

    def __init__(self, run: Run, stacks: Sequence[Stack], loader: StackLoader) -> None:
        """Store what is generated; a stack is opened with its first batch.

        Args:
            run: the run.
            stacks: its stacks.
            loader: opens the stacks.
        """
        self.run, self.loader = run, loader
        self.stacks = {stack.name: stack for stack in stacks}
        self._loaded: LoadedStack | None = None
        self._resources = ExitStack()

    def generate(self, job: BatchJob) -> GeneratedBatch:
        """Return the images of a batch; afterwards all of them are written.

        Raises:
            BatchTooLargeError: memory does not hold `job.size` images. Nothing is written. A
                smaller size changes rounding, so it must be recorded before it is used.
            ConfigError: memory does not hold one image.
            FileError: the stack or an image differs from the one in the run.
        """
        batch, start = job.batch, time.perf_counter()
        loaded = self._open(batch.stack)
        generated = self._generate(loaded, job)
        (self.run.folder / batch.files[0]).parent.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(WRITERS) as pool:  # the next images wait for these
            stored = list(pool.map(partial(self._store, loaded, job), count(), generated))
        images = [image for image, _ in stored]
        new = [record for _, record in stored if record.key not in job.records]
        guards_ms = round(sum(n.ms for output in generated for n in output.trace.guards), 3)
        timing = TimingRecord(
            stage="generate",
            stack=batch.stack.name,
            batch=batch.number,
            images=len(images),
            size=min(job.size, len(images)),
            seconds=round(time.perf_counter() - start, 4),
            guards_ms=guards_ms if loaded.stack.guards else None,
        )
        return GeneratedBatch(images, new, timing)

    def _store(
        self, loaded: LoadedStack, job: BatchJob, i: int, output: GeneratedImage
    ) -> tuple[Image.Image, SampleRecord]:
        """Write an image that is missing, and return it as the run has it, with its record.

        A failed guard need not fail again, so the record stands: an image that was withheld stays
        withheld, and one that was shown stays as it was. An image without a record is not part of
        the run yet, and is replaced where either it or the new one was withheld by a failure.

        Raises:
            FileError: the image differs from the one in the run, or is missing there while a guard
                fails now.
        """
        batch = job.batch
        key, path = batch.keys[i], self.run.folder / batch.files[i]
        trace = json.loads(json.dumps(output.trace.to_json(times=False)))
        image = loaded.display_image(output, self.run.protocol.generation)
        data, new = self._encode(batch, i, image, trace if loaded.stack.guards else None)
        old = job.records.get(key)
        if old is None:
            if new.failed or (path.exists() and _was_withheld(path)):
                path.unlink(missing_ok=True)
        elif old != new and old.failed:
            image = loaded.black(self.run.protocol.generation)
            data, new = self._encode(batch, i, image, old.guards)
        elif old != new and new.failed:
            if not path.exists():
                raise FileError(
                    f"{path} is missing and cannot be generated again ({output.trace.reason}). "
                    "Fix that and run the same command again."
                )
            image, data, new = read_image(path), path.read_bytes(), old
        if old is not None and (old != new or hashlib.sha256(data).hexdigest() != old.sha256):
            raise FileError(
                f"{path} differs from the image in {SAMPLES}. Start a new run with --out."
            )
        _write(path, data)
        return image, new

    def _encode(
        self, batch: Batch, i: int, image: Image.Image, guards: Mapping[str, Any] | None
    ) -> tuple[bytes, SampleRecord]:
        """Return the content of an image's file, and its record."""
        sample, key = batch.samples[i], batch.keys[i]
        metadata = {
            "key": key,
            "stack": batch.stack.hash,
            "prompt_sha256": sample.prompt_sha256,
            "seed": sample.seed,
            "index": sample.index,
            "generation": self.run.protocol.generation.model_dump(mode="json"),
        }
        data = encode_image(image, metadata | ({} if guards is None else {"guards": guards}))
        return data, SampleRecord.of(
            sample,
            key=key,
            stack=batch.stack.name,
            file=batch.files[i],
            sha256=hashlib.sha256(data).hexdigest(),
            blank=is_blank(image),
            guards=guards,
        )

    def _generate(self, loaded: LoadedStack, job: BatchJob) -> list[GeneratedImage]:
        samples, config = job.batch.samples, self.run.protocol.generation
        try:
            return [
                output
                for start in range(0, len(samples), job.size)
                for output in loaded.generate(samples[start : start + job.size], config)
            ]
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if job.size == 1:
                raise ConfigError(
                    "memory must hold at least one image. Free some, or use another --device."
                ) from error
        loaded.free()
        raise BatchTooLargeError

    def _open(self, entry: StackEntry) -> LoadedStack:
        if self._loaded is None or self._loaded.stack.name != entry.name:
            self._resources.close()
            self._loaded = None
            stack = self.loader.open(self.stacks[entry.name])
            self._loaded = self._resources.enter_context(stack)
            if self._loaded.hash != entry.hash:
                raise FileError(
                    f"the stack {entry.name!r} has changed since the run began. "
                    "Start a new run with --out."
                )
        return self._loaded

    def __enter__(self) -> Self:
        """Return the generator."""
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the patches of the last stack."""
        self._resources.close()


def _was_withheld(path: Path) -> bool:
    """Return whether an image was withheld by a guard's failure; False if it cannot be read."""
    try:
        return is_failure(image_metadata(read_image(path)).get("guards"))
    except FileError:
        return False


def _write(path: Path, data: bytes) -> None:
    """Write an image; if the file exists, it must have the same content."""
    if path.exists():
        if path.read_bytes() != data:
            raise FileError(
                f"{path} differs from the image generated now (another device or number of "
                "threads?). Remove it, or start a new run."
            )
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as tmp:
        tmp.write_bytes(data)
