"""Scoring of a run's images while the next are generated: detections, change, features."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

from PIL import Image

from safegen.core.errors import ConfigError, FileError
from safegen.core.progress import ProgressCallback
from safegen.evaluation.run.folder import CHANGES, DETECTIONS, FEATURES, JUDGES, Run, read_image
from safegen.evaluation.run.generate import Batch
from safegen.evaluation.run.journal import Journal
from safegen.evaluation.run.records import (
    ChangeRecord,
    DetectionsRecord,
    FeatureRecord,
    JudgeRecord,
    TimingRecord,
    encode_features,
)
from safegen.evaluation.schema import FROM_IMAGES
from safegen.features.base import Extractor, TextExtractor
from safegen.judges import Judge
from safegen.metrics.clip_score import clip_scores
from safegen.metrics.image import pixel_mae

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from safegen.features.lpips import Lpips


@dataclass(frozen=True)
class Evaluators:
    """Judge of a run with its record, and the networks that other metrics need."""

    judge: Judge
    record: JudgeRecord
    extractor: Extractor | None = None
    lpips: Lpips | None = None

    @property
    def id(self) -> str:
        """Id of the judge in the journals."""
        return self.record.judge


@dataclass
class _Results:
    """Records of one batch; a list is empty where the batch had all of them."""

    timing: TimingRecord
    detections: list[DetectionsRecord] = field(default_factory=list)
    changes: list[ChangeRecord] = field(default_factory=list)
    features: list[FeatureRecord] = field(default_factory=list)


class ScoringWorker:
    """Judges and measures batches in a background thread, and writes the records in order.

    Raises:
        FileError: on entry, if a journal is damaged or in use, or if its features are of another
            extractor.
        ConfigError: on entry, if the CLIP score needs prompts that the run does not keep.
    """

    def __init__(
        self,
        run: Run,
        evaluators: Evaluators,
        timings: Journal[TimingRecord],
        batches: Sequence[Batch],
        progress: ProgressCallback,
    ) -> None:
        self.run, self.evaluators, self.timings = run, evaluators, timings
        self.batches, self.progress = batches, progress
        self.needs_changes = not set(FROM_IMAGES).isdisjoint(run.protocol.metrics)
        self.needs_clip_score = "clip_score" in run.protocol.metrics
        self._text_features = dict[int, "NDArray[np.float64]"]()
        self._resources = ExitStack()
        self._pending: list[Future[_Results]] = []

    def __enter__(self) -> Self:
        """Open the journals and start the thread."""
        with ExitStack() as resources:
            enter, folder = resources.enter_context, self.run.folder
            self.judges = enter(Journal(folder / JUDGES, JudgeRecord))
            self.detections = enter(Journal(folder / DETECTIONS, DetectionsRecord))
            self.judged = {r.key for r in self.detections.records if r.judge == self.evaluators.id}
            self.changes = (
                enter(Journal(folder / CHANGES, ChangeRecord)) if self.needs_changes else None
            )
            self.changed = {r.key for r in self.changes.records} if self.changes else set[str]()
            self.features = (
                enter(Journal(folder / FEATURES, FeatureRecord))
                if self.evaluators.extractor
                else None
            )
            self.measured = {r.key for r in self.features.records} if self.features else set[str]()
            self._write_judge()
            self._check_features()
            self._pool = enter(ThreadPoolExecutor(1))
            self._resources = resources.pop_all()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Write the last batch, unless an error occurred: then it is judged again on resuming."""
        with self._resources:
            if kind is None:
                self._collect()

    def submit(self, batch: Batch, images: Sequence[Image.Image] | None) -> None:
        """Score a batch in the background, once the batch before it is written.

        Args:
            batch: the batch.
            images: its images; read from their files if None.
        """
        wanted = (
            not self.judged.issuperset(batch.keys),
            bool(self.changes and batch.base_files) and not self.changed.issuperset(batch.keys),
            bool(self.features) and not self.measured.issuperset(batch.keys),
        )
        if any(wanted):
            self._collect()
            self._pending.append(self._pool.submit(self._score, batch, images, *wanted))

    def _write_judge(self) -> None:
        """Write the judge's record before its first detections."""
        record = self.evaluators.record
        records = [r for r in self.judges.records if r.judge == record.judge]
        if not records:
            self.judges.append([record])
        elif records != [record]:
            raise FileError(
                f"{self.run.folder / JUDGES} describes {record.judge} differently. "
                "Remove the file and judge again."
            )

    def _check_features(self) -> None:
        extractor = self.evaluators.extractor
        if self.features is None or extractor is None:
            return
        others = {r.extractor for r in self.features.records} - {extractor.id}
        if others:
            raise FileError(
                f"{self.run.folder / FEATURES} is by {min(others)}, got the extractor "
                f"{extractor.id}. Start a new run."
            )
        remaining = [b for b in self.batches if not self.measured.issuperset(b.keys)]
        if self.needs_clip_score and any(not s.prompt for b in remaining for s in b.samples):
            raise ConfigError(
                "the CLIP score needs the prompts, which this run does not keep. "
                "Resume with the command that began it."
            )

    def _score(
        self,
        batch: Batch,
        images: Sequence[Image.Image] | None,
        judge: bool,
        change: bool,
        features: bool,
    ) -> _Results:
        """Return the records of a whole batch for every journal that lacks some of them."""
        start, stack = time.perf_counter(), batch.stack
        images = list(images or [read_image(self.run.folder / file) for file in batch.files])
        timing = TimingRecord(
            stage="judge",
            stack=stack.name,
            batch=batch.number,
            images=len(batch.keys),
            judge=self.evaluators.id,
        )
        results = _Results(timing)
        if judge:
            detections = self.evaluators.judge.detect(images)
            results.detections = [
                DetectionsRecord(key=k, stack=stack.name, judge=self.evaluators.id, detections=d)
                for k, d in zip(batch.keys, detections, strict=True)
            ]
        if change:
            results.changes = self._change_records(batch, images)
        if features:
            results.features = self._feature_records(batch, images)
        seconds = round(time.perf_counter() - start, 4)
        results.timing = timing.model_copy(update={"seconds": seconds})
        return results

    def _change_records(self, batch: Batch, images: Sequence[Image.Image]) -> list[ChangeRecord]:
        base = [read_image(self.run.folder / file) for file in batch.base_files]
        lpips = self.evaluators.lpips
        distances = lpips.distances(base, images) if lpips else [None] * len(images)
        return [
            ChangeRecord(
                key=key,
                stack=batch.stack.name,
                baseline=batch.stack.baseline,
                change=pixel_mae(old, new),
                lpips=None if distance is None else float(distance),
                lpips_id=lpips.id if lpips else None,
            )
            for key, old, new, distance in zip(batch.keys, base, images, distances, strict=True)
        ]

    def _feature_records(self, batch: Batch, images: Sequence[Image.Image]) -> list[FeatureRecord]:
        extractor = self.evaluators.extractor
        assert extractor is not None
        rows = extractor.features(images)
        scores: list[float | None] = [None] * len(rows)
        if self.needs_clip_score:
            assert isinstance(extractor, TextExtractor)
            if batch.number not in self._text_features:  # the same prompts for every stack
                prompts = [sample.prompt for sample in batch.samples]
                self._text_features[batch.number] = extractor.texts(prompts)
            texts = self._text_features[batch.number]
            scores = [_clip_score(x, y) for x, y in zip(rows, texts, strict=True)]
        return [
            FeatureRecord(
                key=key,
                stack=batch.stack.name,
                extractor=extractor.id,
                features=encode_features(row),
                clip_score=score,
            )
            for key, row, score in zip(batch.keys, rows, scores, strict=True)
        ]

    def _collect(self) -> None:
        """Write the records of the pending batch."""
        while self._pending:
            results = self._pending.pop(0).result()
            self.detections.append([r for r in results.detections if r.key not in self.judged])
            self.judged.update(r.key for r in results.detections)
            if self.changes:
                self.changes.append([r for r in results.changes if r.key not in self.changed])
                self.changed.update(r.key for r in results.changes)
            if self.features:
                self.features.append([r for r in results.features if r.key not in self.measured])
                self.measured.update(r.key for r in results.features)
            self.timings.append([results.timing])
            total = sum(len(batch.keys) for batch in self.batches)
            self.progress("judging", len(self.judged), total)


def _clip_score(image: NDArray[np.float64], text: NDArray[np.float64]) -> float | None:
    try:
        return float(clip_scores(image[None], text[None])[0])
    except ValueError:  # an embedding that is not finite, or zero
        return None
