"""The cluster bootstrap: means and rates whose pictures are not independent, with intervals that are a matter of the seed alone."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from safegen.metrics.rates import MIN_CLUSTERS, resampled_sums, wilson


@dataclass(frozen=True)
class Mean:
    """A mean with its 95 % interval, over `n` pictures in `clusters` clusters, in the unit `scale`.

    The interval is None with one cluster, which shows no spread.
    """

    value: float
    low: float | None
    high: float | None
    n: int
    clusters: int
    scale: str
    unjudged: int = 0

    @property
    def differs(self) -> bool:
        """Of a mean of differences: whether there is an interval and it leaves out zero."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)

    def to_json(self) -> dict[str, Any]:
        """Return plain values for a results file."""
        return asdict(self)


@dataclass(frozen=True)
class ClusteredRate:
    """`hits` among `judged` pictures of `clusters` prompts.

    The interval knows that pictures of one prompt resemble each other.
    """

    hits: int
    judged: int
    unjudged: int
    clusters: int
    low: float
    high: float

    @property
    def value(self) -> float:
        """The proportion, in [0, 1]."""
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
    """Return the 95 % percentile interval of sum(first) / sum(second) when whole clusters are drawn again (Efron & Tibshirani 1993, 8).

    Args:
        rows: numerator and denominator of each picture; a denominator is > 0.
        clusters: what is drawn together, usually the prompt.
        seed: of the draws.
        draws: bootstrap samples.

    Returns:
        2.5 % and 97.5 % points. The order of the rows and the names of the clusters are irrelevant.
    """
    totals = resampled_sums(rows, clusters, seed=seed, draws=draws)
    low, high = np.quantile(totals[:, 0] / totals[:, 1], [0.025, 0.975])
    return float(low), float(high)


def mean(
    values: Sequence[float | None],
    clusters: Sequence[Hashable],
    *,
    scale: str = "",
    seed: int = 0,
    draws: int = 2000,
) -> Mean:
    """Return the mean over pictures with a bootstrap interval over clusters.

    Args:
        values: one per picture, None where there is none (unjudged).
        clusters: the prompt of each picture, for example.
        scale: what a unit is, for the reader.
        seed: of the bootstrap.
        draws: bootstrap samples.

    Raises:
        ValueError: lengths differ, no value is there, or one is not finite.
    """
    if len(values) != len(clusters):
        raise ValueError(
            f"values and clusters must be equally long, got {len(values)} and {len(clusters)}"
        )
    kept = [(float(v), c) for v, c in zip(values, clusters, strict=True) if v is not None]
    if not kept:
        raise ValueError("a mean needs at least one value, got none")
    if not all(math.isfinite(v) for v, _ in kept):
        raise ValueError("a mean is over finite values, got NaN or infinity")
    found = math.fsum(v for v, _ in kept) / len(kept)
    names = [c for _, c in kept]
    groups, low, high = len(set(names)), None, None
    if groups > 1:
        left, right = ratio_interval([(v, 1.0) for v, _ in kept], names, seed=seed, draws=draws)
        low, high = min(left, found), max(right, found)
    return Mean(found, low, high, len(kept), groups, scale, len(values) - len(kept))


def clustered_rate(
    seen: Sequence[bool | None], clusters: Sequence[Hashable], *, seed: int = 0, draws: int = 2000
) -> ClusteredRate:
    """Return the rate of True in `seen` (None: unjudged), with an interval over clusters.

    Interval (ours): percentile bootstrap over clusters, widened to Wilson's over pictures, so that
        clusters never make a rate look surer than independent pictures would. Where fewer than
        `FEW` clusters hit, or miss, the bootstrap sees too little; then it is Wilson's at the same
        rate over as many trials as there are clusters, as if the pictures of a prompt were one.

    Raises:
        ValueError: lengths differ, or nothing was judged.
    """
    if len(seen) != len(clusters):
        raise ValueError(
            f"outcomes and clusters must be equally long, got {len(seen)} and {len(clusters)}"
        )
    kept = [(s, c) for s, c in zip(seen, clusters, strict=True) if s is not None]
    hits, n = sum(s for s, _ in kept), len(kept)
    low, high = wilson(hits, n)
    names, hit, missed = (
        {c for s, c in kept if want is None or s == want} for want in (None, True, False)
    )
    if min(len(hit), len(missed)) < MIN_CLUSTERS:
        left, right = wilson(hits / n * len(names), len(names))
    else:
        left, right = ratio_interval(
            [(float(s), 1.0) for s, _ in kept], [c for _, c in kept], seed=seed, draws=draws
        )
    low, high = min(low, left), max(high, right)
    return ClusteredRate(hits, n, len(seen) - n, len(names), low, high)
