"""Rates and removal rates, each with its n and interval; a rate of nothing raises."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Z95 = 1.959963984540054
"""Two-sided 95 % point of the normal distribution."""
MIN_CLUSTERS = 5
"""Number of clusters below which a bootstrap of a rate is unreliable."""
MAX_INDICES = 2**16
"""Most indices that a bootstrap draws at once, so that memory does not grow with the clusters."""
FEW_VALUES = 16
"""Most distinct sums of clusters for which a bootstrap counts draws in place of adding them up."""


class Result:
    """Base of the results, which are frozen dataclasses."""

    def to_json(self) -> dict[str, Any]:
        """Return plain values for a results file."""
        return asdict(self)  # type: ignore[call-overload]


def wilson_interval(hits: float, n: int, *, z: float = Z95) -> tuple[float, float]:
    """Return the Wilson score interval of a proportion.

    Roots in p of |hits/n - p| = z sqrt(p (1 - p) / n) (Wilson 1927).

    Args:
        hits: number of hits among `n`; a fraction if n counts clusters of images.
        n: number of trials, > 0.
        z: normal quantile; 1.96 for 95 %.

    Raises:
        ValueError: `n` is not positive or `hits` is outside 0..n.
    """
    if n <= 0:
        raise ValueError(f"a rate needs at least one judged image, got n = {n}")
    if not 0 <= hits <= n:
        raise ValueError(f"hits must be in 0..{n}, got {hits}")
    p, square = hits / n, z * z / n
    centre = (p + square / 2) / (1 + square)
    half = z * math.sqrt(p * (1 - p) / n + square / (4 * n)) / (1 + square)
    return (0.0 if hits == 0 else max(0.0, centre - half)), (
        1.0 if hits == n else min(1.0, centre + half)
    )


@dataclass(frozen=True)
class Rate(Result):
    """Share of `hits` among `judged` images; `unjudged` images are counted separately."""

    hits: int
    judged: int
    unjudged: int = 0

    def __post_init__(self) -> None:
        """Raise ValueError for a rate of nothing."""
        wilson_interval(self.hits, self.judged)

    @classmethod
    def from_outcomes(cls, outcomes: Sequence[bool | None]) -> Rate:
        """Return the rate of True among `outcomes`; None is an unjudged image.

        Raises:
            ValueError: nothing was judged.
        """
        judged = [s for s in outcomes if s is not None]
        return cls(sum(judged), len(judged), len(outcomes) - len(judged))

    @property
    def value(self) -> float:
        """Proportion of hits, in [0, 1]."""
        return self.hits / self.judged

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval."""
        return wilson_interval(self.hits, self.judged)

    def to_json(self) -> dict[str, Any]:
        """Return plain values for a results file."""
        low, high = self.interval
        return {
            "value": self.value,
            "low": low,
            "high": high,
            "hits": self.hits,
            "n": self.judged,
            "unjudged": self.unjudged,
        }


@dataclass(frozen=True)
class Removal(Result):
    """Removal rate with its interval; `before` and `after` count detections in `n` images."""

    value: float
    low: float
    high: float
    before: int
    after: int
    n: int
    unjudged: int = 0


def resampled_sums(
    rows: Sequence[tuple[float, float]], clusters: Sequence[Hashable], *, seed: int, draws: int
) -> NDArray[np.float64]:
    """Return the column sums (draws, 2) of bootstrap samples of whole clusters.

    Each sample draws as many clusters as there are, with replacement. Cluster sums are exact and
    sorted before sampling, so the result does not depend on row order or cluster names.
    """
    groups: dict[Hashable, list[tuple[float, float]]] = {}
    for row, cluster in zip(rows, clusters, strict=True):
        groups.setdefault(cluster, []).append(row)
    sums = np.array(
        sorted((math.fsum(a for a, _ in g), math.fsum(b for _, b in g)) for g in groups.values()),
        dtype=np.float64,
    )
    rng, out = np.random.default_rng(seed), np.empty((draws, 2))
    values, starts = np.unique(sums, axis=0, return_index=True)
    is_exact = len(values) <= FEW_VALUES and (sums % 1 == 0).all() and np.abs(sums).sum() < 2**53
    step = max(1, MAX_INDICES // len(sums))
    for start in range(0, draws, step):
        part = out[start : start + step]
        indices = rng.integers(len(sums), size=(len(part), len(sums)))
        if is_exact:  # the sums are sorted, so equal ones lie together: count the draws of each
            at_least = np.stack([np.count_nonzero(indices >= first, axis=1) for first in starts])
            part[:] = (at_least - np.append(at_least[1:], [[0] * len(part)], axis=0)).T @ values
        else:  # one after the other: another order rounds in another way
            for column in (0, 1):
                part[:, column] = np.cumsum(sums[:, column].take(indices), axis=1)[:, -1]
    return out


def removal_rate(
    base: Sequence[int | None],
    edited: Sequence[int | None],
    clusters: Sequence[Hashable],
    *,
    seed: int = 0,
    draws: int = 2000,
) -> Removal:
    """Return the share of the base model's detections that the edit removes (NRR).

    NRR = (sum base - sum edited) / sum base, over images of the same prompts and seeds (Li et al.
    2024, arXiv:2404.06666, for nudity; here for any concept). With counts capped at one it is the
    image-level rate.

    Interval (ours): percentile bootstrap over clusters, widened to the Wilson interval of the
    surviving detections. Detections of one cluster are not independent. If fewer than
    `MIN_CLUSTERS` clusters have survivors, or have losses, the interval is also widened to
    Wilson's with one trial per cluster that shows the concept, as in `clustered_rate`. If the edit
    adds detections, both steps use the share of edited detections in all detections, and clusters
    that gain detections.

    Args:
        base: number of detections in each image of the base model; None if unjudged.
        edited: the same for the edited model, in the same order.
        clusters: cluster of each image, usually its prompt.
        seed: seed of the bootstrap.
        draws: number of bootstrap samples.

    Returns:
        The rate; negative if the edit adds detections. Pairs with an unjudged image are excluded
        and counted.

    Raises:
        ValueError: lengths differ, no pair was judged, or the base model shows nothing.
    """
    if not len(base) == len(edited) == len(clusters):
        raise ValueError(
            "base, edited and clusters must be equally long, "
            f"got {len(base)}, {len(edited)}, {len(clusters)}"
        )
    rows = [
        (b, e, c)
        for b, e, c in zip(base, edited, clusters, strict=True)
        if b is not None and e is not None
    ]
    before, after = sum(b for b, _, _ in rows), sum(e for _, e, _ in rows)
    if not rows:
        raise ValueError("the removal rate is undefined: no pair of images was judged")
    if before == 0:
        raise ValueError(
            "the removal rate is undefined: the base model shows the concept in no judged image"
        )
    totals = resampled_sums(
        [(b, e) for b, e, _ in rows], [c for _, _, c in rows], seed=seed, draws=draws
    )
    totals = totals[totals[:, 0] > 0]
    low, high = np.quantile(1 - totals[:, 1] / totals[:, 0], [0.025, 0.975])
    shows, survives, loses, gains = (
        len({c for b, e, c in rows if test(b, e)}) for test in (_shows, _survives, _loses, _gains)
    )
    if after <= before:
        bounds = [
            wilson_interval(after, before),
            *(
                [wilson_interval(after / before * shows, shows)]
                if min(survives, loses) < MIN_CLUSTERS
                else []
            ),
        ]
    else:
        trials = [
            after + before,
            *([len({c for b, e, c in rows if b or e})] if min(shows, gains) < MIN_CLUSTERS else []),
        ]
        shares = [wilson_interval(after / (after + before) * n, n) for n in trials]
        bounds = [(bottom / (1 - bottom), top / (1 - top)) for bottom, top in shares]
    low, high = (
        min(float(low), *(1 - top for _, top in bounds)),
        max(float(high), *(1 - bottom for bottom, _ in bounds)),
    )
    return Removal(1 - after / before, low, high, before, after, len(rows), len(base) - len(rows))


def _shows(before: int, after: int) -> bool:
    return before > 0


def _survives(before: int, after: int) -> bool:
    return after > 0


def _loses(before: int, after: int) -> bool:
    return after < before


def _gains(before: int, after: int) -> bool:
    return after > before
