"""Two judges side by side."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from scipy.stats import binomtest

from safegen.metrics.agreement import agreement


def answers(both, first, second, neither):
    pairs = (
        [(True, True)] * both
        + [(True, False)] * first
        + [(False, True)] * second
        + [(False, False)] * neither
    )
    return [a for a, _ in pairs], [b for _, b in pairs]


def test_the_textbook_table_has_kappa_0_4():
    found = agreement(*answers(20, 5, 10, 15))
    assert (found.both, found.first, found.second, found.neither) == (20, 5, 10, 15)
    assert found.chance == pytest.approx(0.5)
    assert found.kappa == pytest.approx(0.4)


def test_the_interval_is_scipys_wilson_interval_seen_through_kappa():
    found = agreement(*answers(20, 5, 10, 15))
    oracle = binomtest(35, 50).proportion_ci(method="wilson")
    assert found.interval == pytest.approx(((oracle.low - 0.5) / 0.5, (oracle.high - 0.5) / 0.5))
    low, high = found.interval
    assert low < found.kappa < high


def test_full_agreement_is_1_but_never_certain():
    found = agreement(*answers(5, 0, 0, 7))
    assert found.kappa == 1
    assert found.interval[0] < 1
    assert found.interval[1] == 1


def test_full_disagreement_is_minus_1_at_even_rates():
    found = agreement(*answers(0, 6, 6, 0))
    assert found.kappa == pytest.approx(-1)
    assert found.interval[0] >= -1


@pytest.mark.parametrize("table", [(4, 0, 0, 0), (0, 0, 0, 9)])
def test_kappa_is_undefined_where_both_say_the_same_throughout(table):
    found = agreement(*answers(*table))
    assert found.kappa is None
    assert found.interval is None


def test_two_judges_that_know_nothing_of_each_other_have_kappa_near_0():
    rng = random.Random(0)
    found = agreement(
        [rng.random() < 0.3 for _ in range(5000)], [rng.random() < 0.6 for _ in range(5000)]
    )
    assert abs(found.kappa) < 0.03
    assert found.interval[0] < 0 < found.interval[1]


def test_the_order_of_judges_and_of_images_and_the_names_of_outcomes_are_irrelevant():
    first, second = answers(7, 3, 5, 20)
    found = agreement(first, second)
    assert agreement(second, first).kappa == pytest.approx(found.kappa)
    assert agreement(first[::-1], second[::-1]).kappa == pytest.approx(found.kappa)
    assert agreement([not v for v in first], [not v for v in second]).kappa == pytest.approx(
        found.kappa
    )


def test_unjudged_images_stand_apart():
    found = agreement([True, None, False, True, None], [True, True, None, False, None])
    assert (found.both, found.first, found.second, found.neither, found.unjudged, found.judged) == (
        1,
        1,
        0,
        0,
        3,
        2,
    )
    assert found.disagreements == (3,)


def test_disagreements_are_places_in_the_lists_as_given():
    found = agreement([True, False, None, False], [False, False, True, True])
    assert found.disagreements == (0, 3)


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ([], [], "at least one image"),
        ([None], [True], "at least one image"),
        ([True], [], "same images"),
    ],
)
def test_nothing_to_compare_raises(first, second, words):
    with pytest.raises(ValueError, match=words):
        agreement(first, second)


@pytest.mark.parametrize(("rate", "skill"), [(0.3, 0.9), (0.5, 0.8), (0.15, 0.95)])
def test_the_interval_holds_the_truth_as_often_as_it_says(rate, skill):
    """Each judge is right with probability `skill`: kappa is known, and of 2000 samples of 80 images at least 93 % must hold it."""
    rng = np.random.default_rng(0)
    table = np.array(
        [
            rate * skill**2 + (1 - rate) * (1 - skill) ** 2,
            skill * (1 - skill),
            skill * (1 - skill),
            0,
        ]
    )
    table[3] = 1 - table.sum()
    one = table[0] + table[1]
    chance = one**2 + (1 - one) ** 2
    truth = (table[0] + table[3] - chance) / (1 - chance)
    held = []
    for counts in rng.multinomial(80, table, size=2000):
        interval = agreement(*answers(*counts)).interval
        held.append(interval is None or interval[0] <= truth <= interval[1])
    assert np.mean(held) >= 0.93


def test_an_agreement_in_a_results_file_is_plain_values():
    found = agreement(*answers(2, 1, 1, 4))
    row = json.loads(json.dumps(found.to_json()))
    assert row == {
        "both": 2,
        "first": 1,
        "second": 1,
        "neither": 4,
        "unjudged": 0,
        "disagreements": [2, 3],
        "n": 8,
        "kappa": found.kappa,
        "low": found.interval[0],
        "high": found.interval[1],
    }
