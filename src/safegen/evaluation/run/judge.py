"""Scoring of a run's images in batches, without its journals: detections, change, features."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from PIL import Image

from safegen.core.errors import ConfigError
from safegen.evaluation.protocol import Protocol
from safegen.evaluation.run.folder import Run, read_image
from safegen.evaluation.run.generate import Batch, BatchJob
from safegen.evaluation.run.records import (
    ChangeRecord,
    DetectionsRecord,
    FeatureRecord,
    JudgeRecord,
    TimingRecord,
    encode_features,
)
from safegen.evaluation.samples import canonical, sha
from safegen.evaluation.schema import FROM_FEATURES
from safegen.features.base import Extractor, TextExtractor
from safegen.judges import Judge, load_judge
from safegen.metrics.clip_score import clip_scores
from safegen.metrics.image import pixel_mae

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from safegen.features.lpips import Lpips

MAX_TEXTS = 16_384
"""Most embeddings of prompts that are kept in memory for the next stack."""


@dataclass(frozen=True)
class Evaluators:
    """Judge of a run with its record, and the networks that other metrics need."""

    judge: Judge
    record: JudgeRecord
    protocol: Protocol
    """Protocol that names them, from which another process can load them."""
    extractor: Extractor | None = None
    lpips: Lpips | None = None

    @property
    def id(self) -> str:
        """Id of the judge in the journals."""
        return self.record.judge


def load_evaluators(protocol: Protocol, *, features: bool = True, lpips: bool = True) -> Evaluators:
    """Return the judge of a protocol, and the networks that its other metrics need.

    Args:
        protocol: the protocol.
        features: load the extractor, if a metric needs it.
        lpips: load LPIPS, if a metric needs it.

    Raises:
        ConfigError: the CLIP score needs an extractor that reads texts.
        UserError: the judge, the extractor or weights cannot be loaded.
    """
    rule, options = protocol.judge, protocol.judge.public_options
    judge = load_judge(rule.name, labels=rule.labels, threshold=rule.threshold, **rule.options)
    id_ = judge.id + (f"#{sha(canonical(options))[:8]}" if options else "")
    record = JudgeRecord(
        judge=id_, name=rule.name, options=options, label_space=tuple(judge.label_space)
    )
    evaluators = Evaluators(judge, record, protocol)
    metrics = set(protocol.metrics)
    if protocol.features and features and metrics & set(FROM_FEATURES):
        from safegen.features.base import TextExtractor, load_extractor

        extractor = load_extractor(protocol.features.extractor, weights=protocol.features.weights)
        if "clip_score" in metrics and not isinstance(extractor, TextExtractor):
            raise ConfigError(
                "the CLIP score needs an extractor that reads texts too, as clip does, "
                f"got {protocol.features.extractor!r}"
            )
        evaluators = replace(evaluators, extractor=extractor)
    if protocol.lpips and lpips and "lpips" in metrics:
        from safegen.features.lpips import Lpips

        evaluators = replace(evaluators, lpips=Lpips(**protocol.lpips.model_dump()))
    return evaluators


@dataclass(frozen=True)
class BatchScores:
    """Records of one batch; a list is empty where the job did not ask for it."""

    timing: TimingRecord
    detections: Sequence[DetectionsRecord] = ()
    changes: Sequence[ChangeRecord] = ()
    features: Sequence[FeatureRecord] = ()


class BatchScorer:
    """Judges and measures whole batches. It writes nothing."""

    def __init__(self, run: Run, evaluators: Evaluators) -> None:
        self.run, self.evaluators = run, evaluators
        self.needs_clip_score = "clip_score" in run.protocol.metrics
        self._text_features = dict[int, "NDArray[np.float64]"]()

    def score(self, job: BatchJob, images: Sequence[Image.Image] | None = None) -> BatchScores:
        """Return the records of a whole batch for every journal that lacks some of them.

        Args:
            job: the batch, and what is missing.
            images: its images; read from their files if None.

        Raises:
            FileError: an image is missing or damaged.
        """
        start, batch, stack = time.perf_counter(), job.batch, job.batch.stack
        if images is None:
            images = [read_image(self.run.folder / file) for file in batch.files]
        detections = list[DetectionsRecord]()
        if job.judge:
            detections = [
                DetectionsRecord(key=k, stack=stack.name, judge=self.evaluators.id, detections=d)
                for k, d in zip(batch.keys, self.evaluators.judge.detect(list(images)), strict=True)
            ]
        changes = self._change_records(batch, images) if job.change else []
        features = self._feature_records(batch, images) if job.features else []
        timing = TimingRecord(
            stage="judge",
            stack=stack.name,
            batch=batch.number,
            images=len(batch.keys),
            judge=self.evaluators.id,
            seconds=round(time.perf_counter() - start, 4),
        )
        return BatchScores(timing, detections, changes, features)

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

    def _texts(self, batch: Batch, extractor: TextExtractor) -> NDArray[np.float64]:
        """Return the embeddings of a batch's prompts; they are the same for every stack."""
        if batch.number in self._text_features:
            return self._text_features[batch.number]
        texts = extractor.texts([sample.prompt for sample in batch.samples])
        if len(self._text_features) * len(texts) < MAX_TEXTS:
            self._text_features[batch.number] = texts
        return texts

    def _feature_records(self, batch: Batch, images: Sequence[Image.Image]) -> list[FeatureRecord]:
        extractor = self.evaluators.extractor
        assert extractor is not None
        rows = extractor.features(images)
        scores: list[float | None] = [None] * len(rows)
        if self.needs_clip_score:
            assert isinstance(extractor, TextExtractor)
            texts = self._texts(batch, extractor)
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


def _clip_score(image: NDArray[np.float64], text: NDArray[np.float64]) -> float | None:
    try:
        return float(clip_scores(image[None], text[None])[0])
    except ValueError:  # an embedding that is not finite, or zero
        return None
