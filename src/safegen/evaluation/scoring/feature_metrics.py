"""Figures from features: how well pictures fit their prompts, and how far they lie from the base model's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from safegen.evaluation.scoring.results import RunResults, StackResults
from safegen.metrics.bootstrap import Mean, bootstrap_mean
from safegen.metrics.clip_score import SCALE
from safegen.metrics.distances import Distance, cmmd, fid, kid
from safegen.metrics.paired import paired_difference


class One(Protocol):
    """A result of `safegen.metrics`."""

    def to_json(self) -> dict[str, Any]:
        """Return plain values for a results file."""
        ...


Figure = One | Mapping[str, One]


def looks(
    read: RunResults, at: Sequence[int], side: StackResults, base: StackResults
) -> dict[str, Callable[[], Figure]]:
    """Return the figures that rest on features, over the pictures `at`; each raises ValueError where it is undefined.

    A picture without features (they were not finite) is in no distance, and unjudged in the mean.
    Refused pictures are pictures here: a black one has a CLIP score and a distance too.
    """
    groups, id_ = [read.items[i].group for i in at], read.weights.get("extractor", "")
    scale = f"{SCALE}, {id_}"

    def clip() -> dict[str, Mean]:
        own = [side.clip[i] for i in at]
        out: dict[str, Mean] = {"mean": bootstrap_mean(own, groups, scale=scale)}
        if side is not base:
            out["to_base"] = paired_difference(own, [base.clip[i] for i in at], groups, scale=scale)
        return out

    def far(metric: Callable[..., Distance]) -> Distance:
        own, old = (
            [row for row in (s.features[i] for i in at) if row is not None] for s in (side, base)
        )
        if not own or not old:
            raise ValueError(
                "a distance needs pictures with finite features on either side, got none"
            )
        x, y = np.stack(own), np.stack(old)
        if metric is fid:
            full_rank(x, y)
        return metric(x, y, reference_kind="base", extractor=id_)

    def far_in_pairs() -> Distance:
        both = [
            (own, old)
            for own, old in ((side.features[i], base.features[i]) for i in at)
            if own is not None and old is not None
        ]
        if not both:
            raise ValueError(
                "a distance in pairs needs prompts with finite features on both sides, got none"
            )
        x, y = (np.stack(rows) for rows in zip(*both, strict=True))
        return kid(x, y, reference_kind="base", paired=True, extractor=id_)

    out: dict[str, Callable[[], Figure]] = {"clip_score": clip}
    if side is not base:
        out |= {
            "fid_to_base": lambda: far(fid),
            "kid_to_base": far_in_pairs,
            "cmmd_to_base": lambda: far(cmmd),
        }
    return out


def full_rank(x: NDArray[np.float64], y: NDArray[np.float64]) -> None:
    """Refuse an FID over too few pictures to know a covariance (ours): its value would tell of n, not of the model.

    Raises:
        ValueError: a side has no more pictures than a picture has features.
    """
    n, width = min(len(x), len(y)), x.shape[1]
    if n <= width:
        raise ValueError(
            f"FID needs more pictures than features, or its covariances are not known: got {n} pictures of {width}; read KID"
        )
