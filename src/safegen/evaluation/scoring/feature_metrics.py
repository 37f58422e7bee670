"""Metrics from features: fit of images to prompts, and distance to the base model's images."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from safegen.evaluation.scoring.results import RunResults, StackResults
from safegen.evaluation.scoring.verdict_metrics import Metrics
from safegen.metrics.bootstrap import Mean, bootstrap_mean
from safegen.metrics.clip_score import SCALE
from safegen.metrics.distances import Distance, cmmd, fid, kid
from safegen.metrics.paired import paired_difference


def feature_metrics(
    results: RunResults, indices: Sequence[int], stack: StackResults, base: StackResults
) -> Metrics:
    """Return the metrics of a stack from the features of some images.

    An image without finite features is in no distance, and is unjudged in the mean. A refused image
    counts as the black one in its place.

    Args:
        results: results of the run.
        indices: indices of the samples.
        stack: results of the stack.
        base: results of its base model.
    """
    groups = [results.samples[i].group for i in indices]
    extractor = results.weights.get("extractor", "")
    scale = f"{SCALE}, {extractor}"

    def clip_score() -> dict[str, Mean]:
        own = [stack.clip[i] for i in indices]
        figures: dict[str, Mean] = {"mean": bootstrap_mean(own, groups, scale=scale)}
        if stack is not base:
            old = [base.clip[i] for i in indices]
            figures["to_base"] = paired_difference(own, old, groups, scale=scale)
        return figures

    def distance(metric: Callable[..., Distance]) -> Distance:
        own, old = (
            [row for row in (s.features[i] for i in indices) if row is not None]
            for s in (stack, base)
        )
        if not own or not old:
            raise ValueError("a distance needs finite features on both sides, got none")
        x, y = np.stack(own), np.stack(old)
        if metric is fid:
            check_full_rank(x, y)
        return metric(x, y, reference_kind="base", extractor=extractor)

    def paired_kid() -> Distance:
        pairs = [
            (own, old)
            for own, old in ((stack.features[i], base.features[i]) for i in indices)
            if own is not None and old is not None
        ]
        if not pairs:
            raise ValueError(
                "a paired distance needs samples with finite features on both sides, got none"
            )
        x, y = (np.stack(rows) for rows in zip(*pairs, strict=True))
        return kid(x, y, reference_kind="base", paired=True, extractor=extractor)

    metrics: Metrics = {"clip_score": clip_score}
    if stack is not base:
        metrics |= {
            "fid_to_base": lambda: distance(fid),
            "kid_to_base": paired_kid,
            "cmmd_to_base": lambda: distance(cmmd),
        }
    return metrics


def check_full_rank(x: NDArray[np.float64], y: NDArray[np.float64]) -> None:
    """Check that FID has enough images to estimate a covariance (our rule).

    Raises:
        ValueError: a side has no more images than an image has features.
    """
    n, width = min(len(x), len(y)), x.shape[1]
    if n <= width:
        raise ValueError(
            f"FID needs more images than features, got {n} images of {width} features. Use KID"
        )
