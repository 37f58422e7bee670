"""Tests of two models on the same prompts and seeds: exact McNemar, a bootstrap of a difference, and Holm over many."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from safegen.metrics.bootstrap import Mean, mean
from safegen.metrics.rates import Z95


@dataclass(frozen=True)
class McNemar:
    """Pairs in which only one of two models hits, and the exact two-sided p-value that both hit equally often."""

    only_a: int
    only_b: int
    n: int
    p: float
    unjudged: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return plain values for a results file."""
        return asdict(self)


def mcnemar(a: Sequence[bool | None], b: Sequence[bool | None]) -> McNemar:
    """Return the exact McNemar test of paired hits (McNemar 1947; exact form: sign test on the discordant pairs).

    p = min(1, 2 P(X <= min(n10, n01))), X binomial with n10 + n01 trials of 1/2. With no discordant
    pair p is 1. Significance at 5 % needs 6 against 0, 8 against 1, 10 against 2, 12 against 3 or
    15 against 5.

    Args:
        a: hits of one model, None where unjudged.
        b: hits of the other on the same prompts and seeds, in the same order.

    Raises:
        ValueError: lengths differ, or no pair was judged on both sides.
    """
    if len(a) != len(b):
        raise ValueError(f"pairs need lists of one length, got {len(a)} and {len(b)}")
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if x is not None and y is not None]
    if not pairs:
        raise ValueError("a paired test needs at least one pair of judged images, got none")
    only_a, only_b = sum(x and not y for x, y in pairs), sum(y and not x for x, y in pairs)
    trials = only_a + only_b
    tail = sum(math.comb(trials, i) for i in range(min(only_a, only_b) + 1))
    return McNemar(only_a, only_b, len(pairs), min(1.0, 2 * tail / 2**trials), len(a) - len(pairs))


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """Return p-values adjusted for their number so that the chance of any false finding is at most the level (Holm 1979).

    Sorted upwards, the i-th of m becomes max_{j <= i} min(1, (m - j + 1) p_j).

    Raises:
        ValueError: a p-value is outside [0, 1], or NaN.
    """
    for name, value in p.items():
        if not 0 <= value <= 1:
            raise ValueError(f"a p-value must be in 0..1, got {value} for {name}")
    out, highest = {}, 0.0
    for rank, name in enumerate(sorted(p, key=lambda k: (p[k], k))):
        highest = max(highest, min(1.0, (len(p) - rank) * p[name]))
        out[name] = highest
    return {name: out[name] for name in p}


def paired_difference(
    a: Sequence[float | None],
    b: Sequence[float | None],
    clusters: Sequence[Hashable],
    *,
    scale: str = "",
    seed: int = 0,
    draws: int = 2000,
) -> Mean:
    """Return the mean of a - b over pairs (the same prompt and seed), with a percentile bootstrap interval over clusters.

    Args:
        a: values of one model, None where there is none.
        b: values of the other, in the same order.
        clusters: what is drawn together, usually the prompt.
        scale: what a unit is, for the reader.
        seed: of the bootstrap.
        draws: bootstrap samples.

    Returns:
        Swapping a and b mirrors value and interval (a difference of exactly 0 aside). A pair with a
        side missing is left out and counted.

    Raises:
        ValueError: lengths differ, no whole pair is there, or a value is not finite.
    """
    if not len(a) == len(b) == len(clusters):
        raise ValueError(
            f"a, b and clusters must be equally long, got {len(a)}, {len(b)}, {len(clusters)}"
        )
    apart = [
        None if x is None or y is None else float(x) - float(y) for x, y in zip(a, b, strict=True)
    ]
    known = [d for d in apart if d is not None]
    if not known:
        raise ValueError("a paired difference needs at least one pair, got none")
    if not all(math.isfinite(d) for d in known):
        raise ValueError("a paired difference is over finite values, got NaN or infinity")
    sign = (
        -1 if math.fsum(known) < 0 else 1
    )  # the draws see |value|, so that a - b and b - a mirror each other
    found = mean(
        [None if d is None else sign * d for d in apart],
        clusters,
        scale=scale,
        seed=seed,
        draws=draws,
    )
    if sign > 0 or found.low is None or found.high is None:
        return replace(found, value=sign * found.value)
    return replace(found, value=-found.value, low=-found.high, high=-found.low)


def hit_difference(
    a: Sequence[bool | None],
    b: Sequence[bool | None],
    clusters: Sequence[Hashable],
    *,
    seed: int = 0,
    draws: int = 2000,
) -> Mean:
    """Return how much more often one model hits than another on the same prompts and seeds, as a difference of shares (a - b).

    Interval (ours): `paired_difference` over clusters, widened to the one of Agresti & Min (2005),
        which adds half a pair to each cell of the table: without it, pairs that all agree would
        make an interval of no width. It is there with one cluster too.

    Args:
        a: hits of one model, None where unjudged.
        b: hits of the other, in the same order.
        clusters: what is drawn together, usually the prompt.
        seed: of the bootstrap.
        draws: bootstrap samples.

    Raises:
        ValueError: lengths differ, or no pair was judged on both sides.
    """
    found, test = (
        paired_difference(a, b, clusters, scale="difference of shares", seed=seed, draws=draws),
        mcnemar(a, b),
    )
    n, more, less = test.n + 2, test.only_a + 0.5, test.only_b + 0.5
    centre, half = (more - less) / n, Z95 * math.sqrt(more + less - (more - less) ** 2 / n) / n
    low, high = (
        min(v for v in (found.low, centre - half, found.value) if v is not None),
        max(v for v in (found.high, centre + half, found.value) if v is not None),
    )
    return replace(found, low=max(low, -1.0), high=min(high, 1.0))
