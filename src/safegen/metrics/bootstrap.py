"""Cluster bootstrap: means and rates of images that are not independent within a prompt."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from safegen.metrics.rates import MIN_CLUSTERS, Rate, Result, resampled_sums, wilson_interval


@dataclass(frozen=True)
class Mean(Result):
    """Mean of `n` values in `clusters` clusters with its 95 % interval, in the unit `scale`.

    The interval is None for one cluster, which has no spread.
    """

    value: float
    low: float | None
    high: float | None
    n: int
    clusters: int
    scale: str
    unjudged: int = 0

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval exists and excludes zero: the difference is significant."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


@dataclass(frozen=True)
class ClusteredRate(Result):
    """Share of `hits` among `judged` images, with an interval over `clusters` prompts."""

    hits: int
    judged: int
    unjudged: int
    clusters: int
    low: float
    high: float

    @property
    def value(self) -> float:
        """Proportion of hits, in [0, 1]."""
        return self.hits / self.judged

    def to_json(self) -> dict[str, Any]:
        """Return plain values for a results file."""
        interval = {"value": self.value, "low": self.low, "high": self.high}
        return interval | {
            "hits": self.hits,
            "n": self.judged,
            "clusters": self.clusters,
            "unjudged": self.unjudged,
        }


def ratio_interval(
    rows: Sequence[tuple[float, float]], clusters: Sequence[Hashable], *, seed: int, draws: int
) -> tuple[float, float]:
    """Return the 95 % percentile interval of sum(first) / sum(second) over resampled clusters.

    Bootstrap of clusters (Efron & Tibshirani 1993, chapter 8).

    Args:
        rows: numerator and denominator of each image; a denominator is > 0.
        clusters: cluster of each image, usually its prompt.
        seed: seed of the bootstrap.
        draws: number of bootstrap samples.

    Returns:
        2.5 % and 97.5 % points; they do not depend on row order or cluster names.
    """
    totals = resampled_sums(rows, clusters, seed=seed, draws=draws)
    low, high = np.quantile(totals[:, 0] / totals[:, 1], [0.025, 0.975])
    return float(low), float(high)


def bootstrap_mean(
    values: Sequence[float | None],
    clusters: Sequence[Hashable],
    *,
    scale: str = "",
    seed: int = 0,
    draws: int = 2000,
) -> Mean:
    """Return the mean with a bootstrap interval over clusters.

    Args:
        values: one value per image; None if unjudged.
        clusters: cluster of each image, usually its prompt.
        scale: unit of the values, for the reader.
        seed: seed of the bootstrap.
        draws: number of bootstrap samples.

    Raises:
        ValueError: lengths differ, there are no values, or one is not finite.
    """
    if len(values) != len(clusters):
        raise ValueError(
            f"values and clusters must be equally long, got {len(values)} and {len(clusters)}"
        )
    pairs = [(float(v), c) for v, c in zip(values, clusters, strict=True) if v is not None]
    if not pairs:
        raise ValueError("a mean needs at least one value, got none")
    if not all(math.isfinite(v) for v, _ in pairs):
        raise ValueError("the values of a mean must be finite, got NaN or infinity")
    value = math.fsum(v for v, _ in pairs) / len(pairs)
    names = [c for _, c in pairs]
    groups, low, high = len(set(names)), None, None
    if groups > 1:
        left, right = ratio_interval([(v, 1.0) for v, _ in pairs], names, seed=seed, draws=draws)
        low, high = min(left, value), max(right, value)
    return Mean(value, low, high, len(pairs), groups, scale, len(values) - len(pairs))


def clustered_rate(
    outcomes: Sequence[bool | None],
    clusters: Sequence[Hashable],
    *,
    seed: int = 0,
    draws: int = 2000,
) -> ClusteredRate:
    """Return the rate of True among `outcomes` (None: unjudged) with an interval over clusters.

    Interval (ours): percentile bootstrap over clusters, widened to the Wilson interval over images,
    so clustering never narrows it. If fewer than `MIN_CLUSTERS` clusters have hits, or have misses,
    the bootstrap is replaced by Wilson's interval at the same rate with one trial per cluster.

    Raises:
        ValueError: lengths differ, or nothing was judged.
    """
    if len(outcomes) != len(clusters):
        raise ValueError(
            f"outcomes and clusters must be equally long, got {len(outcomes)} and {len(clusters)}"
        )
    judged = [(s, c) for s, c in zip(outcomes, clusters, strict=True) if s is not None]
    hits, n = sum(s for s, _ in judged), len(judged)
    low, high = wilson_interval(hits, n)
    names, hit, missed = (
        {c for s, c in judged if want is None or s == want} for want in (None, True, False)
    )
    if min(len(hit), len(missed)) < MIN_CLUSTERS:
        left, right = wilson_interval(hits / n * len(names), len(names))
    else:
        left, right = ratio_interval(
            [(float(s), 1.0) for s, _ in judged], [c for _, c in judged], seed=seed, draws=draws
        )
    low, high = min(low, left), max(high, right)
    return ClusteredRate(hits, n, len(outcomes) - n, len(names), low, high)


def image_rate(
    outcomes: Sequence[bool | None], clusters: Sequence[Hashable]
) -> Rate | ClusteredRate:
    """Return the rate of True among `outcomes`, with the interval that its images allow.

    That is Wilson's where each image has a cluster of its own, else that of `clustered_rate`.

    Raises:
        ValueError: lengths differ, or nothing was judged.
    """
    if len(set(clusters)) == len(clusters) == len(outcomes):
        return Rate.from_outcomes(outcomes)
    return clustered_rate(outcomes, clusters)
