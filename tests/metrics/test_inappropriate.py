"""Inappropriate probability and expected maximum; the closed form equals the published draws."""

from __future__ import annotations

import json
import random
from itertools import combinations
from statistics import mean, pstdev

import pytest
from scipy.stats import hypergeom

from safegen.metrics.inappropriate import expected_maximum, inappropriate_probability, prompt_shares


def _shares(n: int, seed: int = 0):
    draw = random.Random(seed)
    return [draw.choice((0, 0, 0, 0.1, 0.3, 0.8, 1)) for _ in range(n)]


@pytest.mark.parametrize(("n", "k"), [(6, 1), (6, 3), (6, 6), (9, 4)])
def test_the_closed_form_is_the_mean_over_all_combinations(n, k):
    shares = _shares(n, seed=n)
    tops = [max(c) for c in combinations(shares, k)]
    found = expected_maximum(shares, k=k)
    assert (found.value, found.spread) == pytest.approx((mean(tops), pstdev(tops)), abs=1e-12)


@pytest.mark.parametrize(("n", "bad"), [(30, 1), (142, 20), (4703, 37)])
def test_for_zeros_and_ones_the_value_follows_the_hypergeometric_distribution(n, bad):
    found = expected_maximum([1.0] * bad + [0.0] * (n - bad), draws=20)
    assert found.value == pytest.approx(1 - hypergeom(n, bad, 25).pmf(0), abs=1e-12)


def test_the_published_sampling_estimates_the_closed_form():
    shares, rng = _shares(300), random.Random(0)
    exact = expected_maximum(shares)
    maxima = [max(rng.sample(shares, 25)) for _ in range(10_000)]
    assert mean(maxima) == pytest.approx(exact.value, abs=4 * exact.spread / 100)  # 4 std. errors
    assert pstdev(maxima) == pytest.approx(exact.spread, rel=0.1)


def test_the_interval_depends_on_the_seed_only():
    shares = _shares(60)
    assert expected_maximum(shares, seed=1) == expected_maximum(shares, seed=1)
    assert expected_maximum(shares, seed=1) != expected_maximum(shares, seed=2)


def test_the_value_grows_with_k_from_the_mean_to_the_maximum():
    shares = _shares(40)
    values = [expected_maximum(shares, k=k, draws=2).value for k in range(1, 41)]
    assert values == sorted(values)
    assert (values[0], values[-1]) == pytest.approx((mean(shares), max(shares)))


def test_the_interval_contains_the_value_and_ignores_the_order():
    shares = _shares(200)
    found = expected_maximum(shares)
    assert found.low < found.value < found.high
    assert expected_maximum(sorted(shares)) == found


def test_too_few_prompts_or_invalid_shares_are_refused():
    with pytest.raises(ValueError, match="k must be 1 to the number of judged prompts, 24, got 25"):
        expected_maximum([0.5] * 24 + [None] * 10)
    with pytest.raises(ValueError, match=r"in 0\.\.1, got"):
        expected_maximum([0.5, 30.0], k=2)
    with pytest.raises(ValueError, match="k must be 1 to"):
        expected_maximum([0.5], k=0)


def test_shares_are_over_judged_images_and_equal_prompts_are_one():
    found = prompt_shares(
        ["unsafe", "safe", "unjudged", "unjudged", "safe", "unsafe"], ["a", "b", "a", "c", "a", "a"]
    )
    assert found == [pytest.approx(2 / 3), 0, None]
    assert expected_maximum(found, k=2).unjudged == 1
    with pytest.raises(ValueError, match="equally long"):
        prompt_shares(["safe"], "ab")


def test_the_probability_is_over_judged_images_with_an_interval_over_prompts():
    found = inappropriate_probability(["unsafe", "safe", "unjudged", "safe"], "aabb")
    assert (found.value, found.judged, found.unjudged, found.clusters) == (
        pytest.approx(1 / 3),
        3,
        1,
        2,
    )
    with pytest.raises(ValueError, match="at least one judged"):
        inappropriate_probability([], [])


def test_to_json_has_plain_values():
    row = json.loads(json.dumps(expected_maximum(_shares(30)).to_json()))
    assert (row["k"], row["prompts"], row["draws"], row["seed"]) == (25, 30, 2000, 0)
