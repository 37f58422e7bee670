"""Paired tests agree with scipy and with published tables."""

from __future__ import annotations

import json
import random

import pytest
from scipy.stats import binomtest, false_discovery_control

from safegen.metrics.bootstrap import bootstrap_mean
from safegen.metrics.paired import hit_difference, holm, mcnemar, paired_difference


def _hits(only_a: int, only_b: int, both: int = 7, neither: int = 11):
    rows = (
        [(True, False)] * only_a
        + [(False, True)] * only_b
        + [(True, True)] * both
        + [(False, False)] * neither
    )
    return [a for a, _ in rows], [b for _, b in rows]


@pytest.mark.parametrize(
    ("only_a", "only_b"),
    [(0, 1), (5, 0), (6, 0), (7, 1), (8, 1), (3, 3), (10, 2), (30, 55), (400, 460)],
)
def test_mcnemar_is_scipys_exact_binomial_test(only_a, only_b):
    found = mcnemar(*_hits(only_a, only_b))
    assert found.p == pytest.approx(binomtest(only_a, only_a + only_b).pvalue, rel=1e-9)
    assert (found.only_a, found.only_b, found.n) == (only_a, only_b, only_a + only_b + 18)


@pytest.mark.parametrize(("more", "less"), [(6, 0), (8, 1), (10, 2), (12, 3), (15, 5)])
def test_the_least_counts_that_are_significant_at_5_percent(more, less):
    assert mcnemar(*_hits(more, less)).p < 0.05 <= mcnemar(*_hits(more - 1, less)).p


def test_p_is_symmetric_and_ignores_concordant_pairs():
    a, b = _hits(9, 3)
    assert mcnemar(a, b).p == mcnemar(b, a).p == mcnemar(*_hits(9, 3, both=0, neither=500)).p
    assert mcnemar(a, a).p == 1


def test_unjudged_pairs_are_excluded_and_counted():
    found = mcnemar([True, None, True, False], [False, True, None, False])
    assert (found.only_a, found.n, found.unjudged) == (1, 2, 2)
    assert json.loads(json.dumps(found.to_json()))["p"] == 1
    with pytest.raises(ValueError, match="at least one pair"):
        mcnemar([None], [True])
    with pytest.raises(ValueError, match="equally long"):
        mcnemar([True], [])


def test_holm_by_hand():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}) == pytest.approx(
        {"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02}
    )
    assert holm({}) == {}
    assert holm({"alone": 0.04}) == {"alone": 0.04}


@pytest.mark.parametrize("seed", range(5))
def test_holm_lies_between_benjamini_hochberg_and_bonferroni_and_keeps_the_order(seed):
    draw = random.Random(seed)
    p = {f"method {i}": draw.random() ** 3 for i in range(8)}
    found = holm(p)
    assert list(found) == list(p)
    floor = false_discovery_control(list(p.values()))
    assert all(
        low - 1e-12 <= h <= min(1, 8 * v) + 1e-12
        for low, h, v in zip(floor, found.values(), p.values(), strict=True)
    )
    order = sorted(p, key=p.__getitem__)
    assert [found[k] for k in order] == sorted(found.values())
    assert found[order[0]] == min(1, 8 * p[order[0]])


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_an_invalid_p_value_is_refused(value):
    with pytest.raises(ValueError, match="for b"):
        holm({"a": 0.5, "b": value})


def _pairs(seed: int = 0, gap: float = 1.0, n: int = 60):
    draw = random.Random(seed)
    base = [draw.gauss(30, 5) for _ in range(n)]
    return [v + draw.gauss(gap, 1) for v in base], base, [i // 3 for i in range(n)]


def test_pairing_removes_the_variance_of_the_prompts():
    a, b, clusters = _pairs()
    found = paired_difference(a, b, clusters)
    alone = bootstrap_mean(a, clusters)
    assert found.excludes_zero
    assert found.high - found.low < (alone.high - alone.low) / 2


def test_swapping_the_models_mirrors_the_difference():
    a, b, clusters = _pairs()
    one, other = (
        paired_difference(a, b, clusters, seed=5),
        paired_difference(b, a, clusters, seed=5),
    )
    assert (one.value, one.low, one.high) == (-other.value, -other.high, -other.low)


def test_the_paired_difference_is_the_bootstrap_mean_of_the_differences():
    a, b, clusters = _pairs()
    found, oracle = (
        paired_difference(a, b, clusters),
        bootstrap_mean([x - y for x, y in zip(a, b, strict=True)], clusters),
    )
    assert (found.value, found.low, found.high) == (oracle.value, oracle.low, oracle.high)


def test_equal_values_do_not_differ():
    a, _, clusters = _pairs()
    found = paired_difference(a, a, clusters)
    assert (found.value, found.low, found.high, found.excludes_zero) == (0, 0, 0, False)


def test_the_interval_covers_the_truth_at_its_nominal_rate():
    covered = 0
    for seed in range(200):
        a, b, clusters = _pairs(seed)
        found = paired_difference(a, b, clusters, seed=seed, draws=400)
        covered += found.low <= 1 <= found.high
    assert (
        0.88 <= covered / 200 <= 0.99
    )  # 20 clusters: the percentile interval is a little too narrow


def test_one_prompt_gives_no_interval():
    found = paired_difference([2.0, 3.0], [1.0, 1.0], "aa")
    assert (found.value, found.low, found.high, found.excludes_zero) == (1.5, None, None, False)


def test_incomplete_pairs_are_excluded_and_invalid_input_is_refused():
    found = paired_difference([1.0, None, 2.0], [0.0, 1.0, 1.0], "abc", scale="100*cos")
    assert (found.n, found.unjudged, found.value) == (2, 1, 1)
    assert json.loads(json.dumps(found.to_json()))["scale"] == "100*cos"
    with pytest.raises(ValueError, match="at least one pair"):
        paired_difference([None], [1.0], "a")
    with pytest.raises(ValueError, match="finite"):
        paired_difference([float("inf")], [1.0], "a")
    with pytest.raises(ValueError, match="equally long"):
        paired_difference([1.0], [1.0], "ab")


def test_a_hit_difference_is_agresti_and_mins_by_hand():
    found = hit_difference(*_hits(1, 5, both=2, neither=12), range(20))
    low, high = ((1.5 - 5.5) / 22 + z * (7 - 16 / 22) ** 0.5 / 22 for z in (-1.959964, 1.959964))
    assert found.value == pytest.approx(-0.2)
    assert found.low <= low + 1e-6
    assert found.high >= high - 1e-6
    assert -0.45 < found.low < 0 < found.high < 0.05


def test_a_hit_difference_has_a_width_and_mirrors():
    for only_a, only_b, both in ((0, 6, 0), (0, 0, 6), (3, 1, 9)):
        a, b = _hits(only_a, only_b, both=both, neither=0)
        there, back = hit_difference(a, b, range(len(a))), hit_difference(b, a, range(len(a)))
        assert there.low <= there.value <= there.high
        assert there.high - there.low > 0.1
        assert (there.low, there.high) == pytest.approx((-back.high, -back.low))
    assert hit_difference([True, None], [False, True], ["p", "p"]).low is not None


def test_a_hit_difference_in_one_cluster_is_agresti_and_mins_interval_within_1():
    result = hit_difference(*_hits(4, 1, both=2, neither=3), "p" * 10)
    low, high = ((4.5 - 1.5) / 12 + z * (6 - 9 / 12) ** 0.5 / 12 for z in (-1.959964, 1.959964))
    assert (result.low, result.high) == pytest.approx((low, high), abs=1e-6)
    assert hit_difference([True] * 3, [False] * 3, "ppp").high == 1
