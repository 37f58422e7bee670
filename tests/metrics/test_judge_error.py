"""Errors of a judge, and rates corrected for them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import (
    binary_precision,
    binary_recall,
    binary_specificity,
)

from safegen.judges import load_judge
from safegen.metrics.judge_error import (
    JudgeAgreement,
    corrected_rate,
    describe_agreement,
    judge_agreement,
    measured_agreement,
)
from safegen.metrics.rates import Rate

TABLE = JudgeAgreement(40, 10, 20, 130)


def test_images_of_unknown_truth_and_unjudged_ones_are_in_no_share():
    detected = [True, True, False, False, None, True]
    truth = [True, False, True, False, True, None]
    agreement = judge_agreement(detected, truth)
    assert agreement == JudgeAgreement(1, 1, 1, 1, unjudged=1)
    assert agreement.n == 4
    assert agreement.precision == agreement.recall == agreement.specificity == Rate(1, 2)
    assert judge_agreement([True], [None]) is None


def test_shares_are_those_of_torchmetrics():
    rng = np.random.default_rng(0)
    detected, truth = rng.integers(0, 2, (2, 50))
    agreement = judge_agreement(detected.astype(bool).tolist(), truth.astype(bool).tolist())
    pair = torch.tensor(detected), torch.tensor(truth)
    for name, oracle in (
        ("precision", binary_precision),
        ("recall", binary_recall),
        ("specificity", binary_specificity),
    ):
        assert getattr(agreement, name).value == pytest.approx(float(oracle(*pair)))


def test_a_share_of_nothing_is_no_rate():
    agreement = JudgeAgreement(0, 0, 3, 4)
    assert agreement.precision is None
    assert agreement.to_json()["precision"] is None
    assert agreement.recall.value == 0


def test_a_judge_without_errors_corrects_nothing():
    rate = Rate(12, 40)
    corrected = corrected_rate(rate, JudgeAgreement(50, 0, 0, 50), clusters=40)
    assert corrected.value == pytest.approx(rate.value)
    assert corrected.low < rate.interval[0] + 0.02, "no narrower than the rate's own interval"
    assert corrected.high > rate.interval[1] - 0.02


def test_the_value_is_that_of_rogan_and_gladen():
    recall, specificity = 40 / 60, 130 / 140
    expected = (0.3 + specificity - 1) / (recall + specificity - 1)
    corrected = corrected_rate(Rate(60, 200), TABLE, clusters=200)
    assert corrected.value == pytest.approx(expected)
    assert corrected.low < expected < corrected.high
    assert (corrected.n, corrected.truth) == (200, 200)
    narrow = corrected_rate(Rate(6000, 20000), TABLE, clusters=20000)
    wide = corrected_rate(Rate(6000, 20000), TABLE, clusters=20)
    assert wide.high - wide.low > narrow.high - narrow.low


def test_the_interval_covers_the_true_rate():
    rng, hits, runs = np.random.default_rng(1), 0, 200
    for seed in range(runs):
        truth = rng.random(400) < 0.3
        detected = np.where(truth, rng.random(400) < 0.8, rng.random(400) < 0.1)
        agreement = judge_agreement(detected[:120].tolist(), truth[:120].tolist())
        rate = Rate.from_outcomes(detected.tolist())
        interval = corrected_rate(rate, agreement, clusters=400, seed=seed, draws=500)
        hits += interval.low <= 0.3 <= interval.high
    assert hits / runs >= 0.92


@pytest.mark.parametrize(
    ("agreement", "says"),
    [
        (JudgeAgreement(0, 2, 0, 5), "the truth of images that show the concept"),
        (JudgeAgreement(5, 0, 2, 0), "and of others"),
        (JudgeAgreement(5, 5, 5, 5), "better than chance"),
    ],
)
def test_a_rate_that_cannot_be_corrected_is_refused(agreement, says):
    with pytest.raises(ValueError, match=says):
        corrected_rate(Rate(1, 4), agreement, clusters=4)


@pytest.mark.parametrize("name", ["mini", "mini-held-out"])
@pytest.mark.parametrize("labels", [["skulls"], ["fire"], ["fire", "skulls"], ["ghosts"]])
def test_the_shipped_errors_are_those_of_the_shipped_judges(name, labels):
    judge = load_judge(name)
    known = measured_agreement(judge.id, labels, judge.threshold)
    assert known is not None, "the weights changed: run benchmarks/judge_truth.py"
    assert known.n >= 2000
    assert known.recall.value > 0.95
    assert known.precision.value > 0.95
    assert "recall" in describe_agreement(judge.id, labels, judge.threshold)


def test_a_higher_threshold_detects_no_more():
    judge = load_judge("mini").id
    found = [measured_agreement(judge, ["skulls"], level / 10) for level in range(2, 10)]
    counts = [a.true_positives + a.false_positives for a in found]
    assert counts == sorted(counts, reverse=True)
    assert len({a.true_positives + a.false_negatives for a in found}) == 1


@pytest.mark.parametrize(
    ("judge", "labels", "threshold"),
    [
        ("mini:0123456789abcdef", ["skulls"], 0.5),
        ("nudenet:1", ["BELLY_EXPOSED"], 0.5),
        ("mini", ["skulls", "leaves"], 0.5),
        ("mini", ["skulls"], 0.55),
    ],
)
def test_errors_that_were_not_measured_are_said_to_be_unknown(judge, labels, threshold):
    judge = load_judge("mini").id if judge == "mini" else judge
    assert measured_agreement(judge, labels, threshold) is None
    assert describe_agreement(judge, labels, threshold).endswith("are not known")
