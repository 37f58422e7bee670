"""Writer of a run's journals: it names what batches lack, and commits what they became."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Self

from safegen.core.errors import ConfigError, FileError
from safegen.core.progress import ProgressCallback
from safegen.evaluation.run.folder import (
    CHANGES,
    DETECTIONS,
    FEATURES,
    JUDGES,
    SAMPLES,
    TIMINGS,
    Run,
)
from safegen.evaluation.run.generate import Batch, BatchJob, GeneratedBatch, split_batches
from safegen.evaluation.run.journal import Journal
from safegen.evaluation.run.judge import BatchScores, Evaluators
from safegen.evaluation.run.records import (
    ChangeRecord,
    DetectionsRecord,
    FeatureRecord,
    JudgeRecord,
    SampleRecord,
    TimingRecord,
)
from safegen.evaluation.samples import EvalSample
from safegen.evaluation.schema import FROM_IMAGES
from safegen.evaluation.shards import select_batches


class RunWriter:
    """Names the jobs of a run in the plan's order, and writes their records in that order.

    Only one process can write a run. It never generates or judges.

    Raises:
        FileError: on entry, if a journal is damaged or in use, or if its features are of another
            extractor.
        ConfigError: on entry, if the CLIP score needs prompts that the run does not keep.
    """

    def __init__(
        self,
        run: Run,
        samples: Sequence[EvalSample],
        evaluators: Evaluators | None,
        *,
        generates: bool,
        progress: ProgressCallback,
    ) -> None:
        """Store what is to be done; the journals are opened on entry.

        Args:
            run: the run.
            samples: samples of one stack.
            evaluators: judge and networks; nothing is judged without.
            generates: whether missing images are generated.
            progress: called with (description, done, total).
        """
        self.run, self.samples, self.evaluators = run, samples, evaluators
        self.generates, self.progress = generates, progress
        self.size = size = run.protocol.generation.batch_size
        """Images that a batch generates at once, if it has no size of its own."""
        self._numbers = select_batches(run.card.shard, samples, size)
        self.total = sum(len(samples[n * size : (n + 1) * size]) for n in self._numbers)
        """Images of one stack."""
        self._done = dict[str, int]()
        self._resources = ExitStack()

    def __enter__(self) -> Self:
        """Open the journals, and read what is done."""
        with ExitStack() as resources:
            enter, folder = resources.enter_context, self.run.folder
            self._images = enter(Journal(folder / SAMPLES, SampleRecord))
            self.records = {record.key: record for record in self._images.records}
            self._timings = enter(Journal(folder / TIMINGS, TimingRecord))
            self._read_sizes()
            self.judged, self.changed, self.measured = set[str](), set[str](), set[str]()
            self._changes = self._features = None
            if self.evaluators:
                self._write_judge(enter(Journal(folder / JUDGES, JudgeRecord)), self.evaluators)
                self._detections = enter(Journal(folder / DETECTIONS, DetectionsRecord))
                id_ = self.evaluators.id
                self.judged = {r.key for r in self._detections.records if r.judge == id_}
                if not set(FROM_IMAGES).isdisjoint(self.run.protocol.metrics):
                    self._changes = enter(Journal(folder / CHANGES, ChangeRecord))
                    self.changed = {r.key for r in self._changes.records}
                if self.evaluators.extractor:
                    self._features = enter(Journal(folder / FEATURES, FeatureRecord))
                    self.measured = {r.key for r in self._features.records}
                    self._check_features(self._features, self.evaluators.extractor.id)
            self._resources = resources.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        """Close the journals."""
        self._resources.close()

    def jobs(self) -> Iterator[BatchJob]:
        """Yield what is missing, batch by batch. A job tells what was missing when it is asked for.

        A batch without images is left out if nothing is generated.
        """
        for batch in self._batches():
            if self.generates and batch.stack.name not in self._done:
                self.progress(f"generating: {batch.stack.name}", 0, self.total)
            job = self._job(batch)
            if not job.generate:
                if not self.records.keys() >= set(batch.keys):
                    continue
                self._count(batch)
            if job.generate or job.needs_scores:
                yield job

    def write_images(self, job: BatchJob, generated: GeneratedBatch) -> None:
        """Write the records of the written images of a batch."""
        new = [record for record in generated.records if record.key not in self.records]
        self._images.append(new)
        self.records |= {record.key: record for record in new}
        self._timings.append([generated.timing])
        self._count(job.batch)

    def write_scores(self, scores: BatchScores) -> None:
        """Write the detections, changes and features of a batch."""
        self._detections.append([r for r in scores.detections if r.key not in self.judged])
        self.judged.update(r.key for r in scores.detections)
        if self._changes:
            self._changes.append([r for r in scores.changes if r.key not in self.changed])
            self.changed.update(r.key for r in scores.changes)
        if self._features:
            self._features.append([r for r in scores.features if r.key not in self.measured])
            self.measured.update(r.key for r in scores.features)
        self._timings.append([scores.timing])
        self.progress("judging", len(self.judged), self.total * len(self.run.stacks))

    def size_of(self, batch: Batch) -> int:
        """Return how many images of a batch are generated at once, as far as is known now."""
        return self._sizes.get((batch.stack.name, batch.number), self.size)

    def halve(self, job: BatchJob, running: Iterable[BatchJob] = ()) -> BatchJob:
        """Return a job that did not fit in memory with half as many images at once, or fewer.

        A smaller number changes rounding, so it is recorded first, and used for this batch if it is
        generated again and for those that follow. Jobs that run with another size keep theirs.
        """
        self.size = min(self.size, (min(job.size, len(job.batch.keys)) + 1) // 2)
        halved = replace(job, size=self.size)
        others = [other for other in running if other.generate and other.size != self.size]
        for noted in (halved, *others):
            note = TimingRecord(
                stage="memory",
                stack=noted.batch.stack.name,
                batch=noted.batch.number,
                size=noted.size,
            )
            self._timings.append([note])
        return halved

    def _read_sizes(self) -> None:
        """Read how many images at once each batch was generated with, and the following are."""
        sized = [t for t in self._timings.records if t.size is not None]
        self._sizes = {(t.stack, t.batch): t.size or 1 for t in sized}
        self.size = min(
            (t.size or 1 for t in sized if t.stage == "memory"),
            default=self.run.protocol.generation.batch_size,
        )

    def _job(self, batch: Batch) -> BatchJob:
        """Return what a batch lacks."""
        scores = self.evaluators is not None
        return BatchJob(
            batch,
            self.size_of(batch),
            {key: self.records[key] for key in batch.keys if key in self.records},
            generate=self.generates and self._is_missing(batch),
            judge=scores and not self.judged.issuperset(batch.keys),
            change=self._changes is not None
            and bool(batch.base_files)
            and not self.changed.issuperset(batch.keys),
            features=self._features is not None and not self.measured.issuperset(batch.keys),
        )

    def _is_missing(self, batch: Batch) -> bool:
        """Return whether an image of the batch, or its record, is missing."""
        return any(
            key not in self.records or not (self.run.folder / file).exists()
            for key, file in zip(batch.keys, batch.files, strict=True)
        )

    def _count(self, batch: Batch) -> None:
        """Report that the images of a batch exist."""
        name = batch.stack.name
        self._done[name] = self._done.get(name, 0) + len(batch.keys)
        if self.generates:
            self.progress(f"generating: {name}", self._done[name], self.total)

    def _write_judge(self, judges: Journal[JudgeRecord], evaluators: Evaluators) -> None:
        """Write the judge's record before its first detections."""
        record = evaluators.record
        records = [r for r in judges.records if r.judge == record.judge]
        if not records:
            judges.append([record])
        elif records != [record]:
            raise FileError(
                f"{self.run.folder / JUDGES} describes {record.judge} differently. "
                "Remove the file and judge again."
            )

    def _check_features(self, features: Journal[FeatureRecord], extractor: str) -> None:
        others = {r.extractor for r in features.records} - {extractor}
        if others:
            raise FileError(
                f"{self.run.folder / FEATURES} is by {min(others)}, got the extractor "
                f"{extractor}. Start a new run."
            )
        if "clip_score" not in self.run.protocol.metrics or all(s.prompt for s in self.samples):
            return
        remaining = (b for b in self._batches() if not self.measured.issuperset(b.keys))
        if any(not s.prompt for batch in remaining for s in batch.samples):
            raise ConfigError(
                "the CLIP score needs the prompts, which this run does not keep. "
                "Resume with the command that began it."
            )

    def _batches(self) -> Iterator[Batch]:
        """Yield the batches of the run's shard."""
        return split_batches(self.run, self.samples, self._numbers)
