"""Paired comparisons of two models: exact McNemar test, bootstrap of a difference, Holm."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

from safegen.metrics.bootstrap import Mean, bootstrap_mean
from safegen.metrics.rates import Z95, Result


@dataclass(frozen=True)
class McNemar(Result):
    """Numbers of pairs in which only one of two models hits, with the exact two-sided p-value."""

    only_a: int
    only_b: int
    n: int
    p: float
    unjudged: int = 0


def mcnemar(a: Sequence[bool | None], b: Sequence[bool | None]) -> McNemar:
    """Return the exact McNemar test: a sign test on the discordant pairs (McNemar 1947).

    p = min(1, 2 P(X <= min(n10, n01))), X binomial with n10 + n01 trials of 1/2; p is 1 without
    discordant pairs. The least counts that are significant at 5 % are 6 to 0, 8 to 1, 10 to 2,
    12 to 3 and 15 to 5.

    Args:
        a: hits of one model; None if unjudged.
        b: hits of the other model on the same prompts and seeds, in the same order.

    Raises:
        ValueError: lengths differ, or no pair was judged on both sides.
    """
    if len(a) != len(b):
        raise ValueError(f"a and b must be equally long, got {len(a)} and {len(b)}")
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if x is not None and y is not None]
    if not pairs:
        raise ValueError("a paired test needs at least one pair of judged images, got none")
    only_a, only_b = sum(x and not y for x, y in pairs), sum(y and not x for x, y in pairs)
    trials = only_a + only_b
    tail = term = 1
    for i in range(min(only_a, only_b)):  # exact: each binomial coefficient from the one before
        term = term * (trials - i) // (i + 1)
        tail += term
    return McNemar(only_a, only_b, len(pairs), min(1.0, 2 * tail / 2**trials), len(a) - len(pairs))


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """Return Holm-adjusted p-values, which control the family-wise error rate (Holm 1979).

    In ascending order, the i-th of m becomes max_{j <= i} min(1, (m - j + 1) p_j).

    Raises:
        ValueError: a p-value is outside [0, 1], or NaN.
    """
    for name, value in p.items():
        if not 0 <= value <= 1:
            raise ValueError(f"a p-value must be in 0..1, got {value} for {name}")
    adjusted, highest = {}, 0.0
    for rank, name in enumerate(sorted(p, key=lambda k: (p[k], k))):
        highest = max(highest, min(1.0, (len(p) - rank) * p[name]))
        adjusted[name] = highest
    return {name: adjusted[name] for name in p}


def paired_difference(
    a: Sequence[float | None],
    b: Sequence[float | None],
    clusters: Sequence[Hashable],
    *,
    scale: str = "",
    seed: int = 0,
    draws: int = 2000,
) -> Mean:
    """Return the mean of a - b over pairs with a percentile bootstrap interval over clusters.

    Args:
        a: values of one model; None if unjudged.
        b: values of the other model for the same prompts and seeds, in the same order.
        clusters: cluster of each pair, usually its prompt.
        scale: unit of the values, for the reader.
        seed: seed of the bootstrap.
        draws: number of bootstrap samples.

    Returns:
        The mean difference. Swapping a and b mirrors value and interval, unless the difference is
        exactly 0. Incomplete pairs are excluded and counted.

    Raises:
        ValueError: lengths differ, no pair is complete, or a value is not finite.
    """
    if not len(a) == len(b) == len(clusters):
        raise ValueError(
            f"a, b and clusters must be equally long, got {len(a)}, {len(b)}, {len(clusters)}"
        )
    differences = [
        None if x is None or y is None else float(x) - float(y) for x, y in zip(a, b, strict=True)
    ]
    known = [d for d in differences if d is not None]
    if not known:
        raise ValueError("a paired difference needs at least one pair, got none")
    if not all(math.isfinite(d) for d in known):
        raise ValueError("the values of a paired difference must be finite, got NaN or infinity")
    sign = -1 if math.fsum(known) < 0 else 1  # bootstrap |value|: a - b and b - a mirror each other
    result = bootstrap_mean(
        [None if d is None else sign * d for d in differences],
        clusters,
        scale=scale,
        seed=seed,
        draws=draws,
    )
    if sign > 0 or result.low is None or result.high is None:
        return replace(result, value=sign * result.value)
    return replace(result, value=-result.value, low=-result.high, high=-result.low)


def hit_difference(
    a: Sequence[bool | None],
    b: Sequence[bool | None],
    clusters: Sequence[Hashable],
    *,
    seed: int = 0,
    draws: int = 2000,
) -> Mean:
    """Return the difference of two models' hit rates (a - b) on the same prompts and seeds.

    Interval (ours): that of `paired_difference` over clusters, widened to the interval of Agresti &
    Min (2005), which adds half a pair to each cell of the table. The interval thus has a width even
    if all pairs agree, and exists for one cluster.

    Args:
        a: hits of one model; None if unjudged.
        b: hits of the other model, in the same order.
        clusters: cluster of each pair, usually its prompt.
        seed: seed of the bootstrap.
        draws: number of bootstrap samples.

    Raises:
        ValueError: lengths differ, or no pair was judged on both sides.
    """
    result = paired_difference(a, b, clusters, scale="difference of shares", seed=seed, draws=draws)
    test = mcnemar(a, b)
    n, more, less = test.n + 2, test.only_a + 0.5, test.only_b + 0.5
    centre, half = (more - less) / n, Z95 * math.sqrt(more + less - (more - less) ** 2 / n) / n
    low = min(v for v in (result.low, centre - half, result.value) if v is not None)
    high = max(v for v in (result.high, centre + half, result.value) if v is not None)
    return replace(result, low=max(low, -1.0), high=min(high, 1.0))
