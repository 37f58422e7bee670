"""Errors of a judge on images with known truth, and rates corrected for them."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from safegen import judges
from safegen.core.registry import expand_labels
from safegen.metrics.rates import Rate, Result

MEASURED = Path(judges.__file__).with_name("agreement.json")
"""Agreement of the bundled judges with drawn scenes (`benchmarks/judge_truth.py`)."""


@dataclass(frozen=True)
class JudgeAgreement(Result):
    """Images with known truth by what the judge detects in them; unjudged ones are apart."""

    true_positives: int
    false_positives: int
    false_negatives: int
    true_negatives: int
    unjudged: int = 0

    @property
    def n(self) -> int:
        """Number of judged images with known truth."""
        return (
            self.true_positives + self.false_positives + self.false_negatives + self.true_negatives
        )

    @property
    def precision(self) -> Rate | None:
        """Share of images that show the concept among those in which the judge detects it."""
        return _share(self.true_positives, self.true_positives + self.false_positives)

    @property
    def recall(self) -> Rate | None:
        """Share of images in which the judge detects the concept among those that show it."""
        return _share(self.true_positives, self.true_positives + self.false_negatives)

    @property
    def specificity(self) -> Rate | None:
        """Share of images in which the judge detects nothing among those that do not show it."""
        return _share(self.true_negatives, self.true_negatives + self.false_positives)

    def to_json(self) -> dict[str, Any]:
        """Return plain values for a results file; a rate of nothing is None."""
        rates = {
            name: rate.to_json() if rate else None
            for name, rate in (
                ("precision", self.precision),
                ("recall", self.recall),
                ("specificity", self.specificity),
            )
        }
        return {"n": self.n} | rates | super().to_json()


def _share(hits: int, n: int) -> Rate | None:
    return Rate(hits, n) if n else None


@cache
def _measured() -> dict[str, Any]:
    data: dict[str, Any] = json.loads(MEASURED.read_text(encoding="utf-8"))
    return data


def measured_agreement(
    judge: str, labels: Collection[str], threshold: float
) -> JudgeAgreement | None:
    """Return the agreement of a bundled judge with drawn scenes; None if it was not measured.

    Args:
        judge: id of the judge. It has the hash of the weights, so that another version has none.
        labels: labels that mean the concept.
        threshold: lowest score that counts; one of 0.2, 0.3, ... 0.9 was measured.
    """
    key = "+".join(sorted(expand_labels(labels)))
    tables = _measured()["judges"].get(judge.partition("#")[0], {})
    counts = tables.get(key, {}).get(str(float(threshold)))
    return JudgeAgreement(*counts) if counts else None


def describe_agreement(judge: str, labels: Collection[str], threshold: float) -> str:
    """Return a sentence on the precision and recall of a judge, to print with its rates.

    Args:
        judge: id of the judge.
        labels: labels that mean the concept.
        threshold: lowest score that counts.
    """
    name = judge.partition(":")[0]
    known = measured_agreement(judge, labels, threshold)
    if known is None:
        return (
            f"precision and recall of the judge {name} for {', '.join(sorted(labels))} at "
            f"{threshold:g} are not known"
        )
    shares = [
        f"{word} {_with_interval(rate)}"
        for word, rate in (("recall", known.recall), ("precision", known.precision))
        if rate
    ]
    return f"judge {name} on {known.n} drawn scenes: {', '.join(shares)}"


def _with_interval(rate: Rate) -> str:
    low, high = rate.interval
    value = f"{100 * rate.value:.1f}".removesuffix(".0")
    return f"{value} % ({100 * low:.1f}-{100 * high:.1f}, n = {rate.judged})"


@dataclass(frozen=True)
class CorrectedRate(Result):
    """Rate corrected for the errors of the judge, with a 95 % bootstrap interval."""

    value: float
    low: float
    high: float
    n: int
    truth: int
    """Number of images with known truth."""


def judge_agreement(
    detected: Sequence[bool | None], truth: Sequence[bool | None]
) -> JudgeAgreement | None:
    """Return how a judge agrees with known truth; None if the truth of no image is known.

    Args:
        detected: whether the judge detects the concept in each image; None if unjudged.
        truth: whether each image shows the concept; None if unknown.
    """
    pairs = [(d, t) for d, t in zip(detected, truth, strict=True) if t is not None]
    if not pairs:
        return None
    return JudgeAgreement(
        true_positives=pairs.count((True, True)),
        false_positives=pairs.count((True, False)),
        false_negatives=pairs.count((False, True)),
        true_negatives=pairs.count((False, False)),
        unjudged=sum(d is None for d, _ in pairs),
    )


def corrected_rate(
    rate: Rate, agreement: JudgeAgreement, *, clusters: int, seed: int = 0, draws: int = 10_000
) -> CorrectedRate:
    """Return a rate corrected for the judge's recall and specificity.

    value = (p + specificity - 1) / (recall + specificity - 1), cut to [0, 1] (Rogan & Gladen 1978,
    doi:10.1093/oxfordjournals.aje.a112510). Interval (ours): parametric bootstrap. Each draw takes
    p, recall and specificity from Beta(hits + 1/2, misses + 1/2), so that a share of 0 or 1 has
    spread too, with one trial per prompt for p. Draws without a value count as 0 for the lower end
    and as 1 for the upper one.

    Args:
        rate: rate of detections, from the same kind of images as the agreement.
        agreement: agreement of the judge with known truth.
        clusters: number of prompts of the rate.
        seed: seed of the bootstrap.
        draws: number of bootstrap samples.

    Raises:
        ValueError: recall or specificity is unknown, or the judge is no better than chance.
    """
    recall, specificity = agreement.recall, agreement.specificity
    if recall is None or specificity is None:
        raise ValueError(
            "a corrected rate needs the truth of images that show the concept and of others"
        )
    gain = recall.value + specificity.value - 1
    if gain <= 0:
        raise ValueError(
            "a corrected rate needs a judge that is better than chance, got recall "
            f"{recall.value:.2f} and specificity {specificity.value:.2f}"
        )
    rng, trials = np.random.default_rng(seed), min(clusters, rate.judged)
    p, sensitive, specific = (
        rng.beta(share * n + 0.5, (1 - share) * n + 0.5, size=draws)
        for share, n in (
            (rate.value, trials),
            (recall.value, recall.judged),
            (specificity.value, specificity.judged),
        )
    )
    gains = sensitive + specific - 1
    defined = gains > 0
    values = np.clip((p + specific - 1) / np.where(defined, gains, 1), 0, 1)
    low = float(np.quantile(np.where(defined, values, 0), 0.025))
    high = float(np.quantile(np.where(defined, values, 1), 0.975))
    value = min(max((rate.value + specificity.value - 1) / gain, 0.0), 1.0)
    return CorrectedRate(value, min(low, value), max(high, value), rate.judged, agreement.n)
