"""The cluster bootstrap is a matter of the seed alone and knows what belongs together."""

from __future__ import annotations

import json
import random

import pytest
from scipy.stats import bootstrap

from safegen.metrics.bootstrap import clustered_rate, mean
from safegen.metrics.rates import wilson


def _values(seed: int = 0, n: int = 80, prompts: int = 20):
    draw = random.Random(seed)
    return [draw.gauss(30, 4) for _ in range(n)], [draw.randrange(prompts) for _ in range(n)]


def test_with_every_picture_its_own_cluster_it_is_scipys_percentile_bootstrap():
    values, _ = _values(n=200)
    found = mean(values, range(200), draws=20_000)
    oracle = bootstrap(
        (values,), lambda v, axis: v.mean(axis), method="percentile", n_resamples=20_000, rng=0
    ).confidence_interval
    assert (found.low, found.high) == pytest.approx((oracle.low, oracle.high), abs=0.03)


def test_the_order_of_the_rows_and_the_names_of_the_clusters_are_irrelevant():
    values, clusters = _values()
    rows = random.Random(1).sample(list(zip(values, clusters, strict=True)), len(values))
    again = mean([v for v, _ in rows], [f"prompt {c}" for _, c in rows])
    assert again == mean(values, clusters)


def test_the_interval_is_a_matter_of_the_seed_alone_and_holds_the_mean():
    values, clusters = _values()
    found = mean(values, clusters, seed=3)
    assert found == mean(values, clusters, seed=3)
    assert found.low < found.value < found.high
    assert mean(values, clusters, seed=4).value == found.value


def test_a_shift_shifts_and_a_scale_scales():
    values, clusters = _values()
    found, moved = mean(values, clusters), mean([2 * v + 5 for v in values], clusters)
    assert (moved.value, moved.low, moved.high) == pytest.approx(
        (2 * found.value + 5, 2 * found.low + 5, 2 * found.high + 5)
    )


def test_copies_of_a_picture_in_its_cluster_make_nothing_surer():
    values, clusters = _values(n=40, prompts=1000)
    one, ten = mean(values, clusters), mean(values * 10, clusters * 10)
    assert (ten.low, ten.high, ten.clusters) == pytest.approx((one.low, one.high, one.clusters))
    assert (
        mean(values * 10, range(400)).high - mean(values * 10, range(400)).low
        < (one.high - one.low) / 2
    )


def test_missing_values_stand_apart():
    found = mean([1.0, None, 3.0], "abc", scale="100*cos")
    assert (found.value, found.n, found.clusters, found.unjudged) == (2, 2, 2, 1)
    assert json.loads(json.dumps(found.to_json()))["scale"] == "100*cos"


def test_one_cluster_has_a_mean_but_no_interval():
    found = mean([1.0, 3.0], "aa")
    assert (found.value, found.low, found.high) == (2, None, None)


@pytest.mark.parametrize(
    ("values", "clusters", "words"),
    [
        ([], "", "at least one"),
        ([None], "a", "at least one"),
        ([1.0], "ab", "equally long"),
        ([float("nan")], "a", "finite"),
    ],
)
def test_a_mean_over_nothing_or_nan_is_refused(values, clusters, words):
    with pytest.raises(ValueError, match=words):
        mean(values, clusters)


def test_a_rate_over_clusters_is_never_surer_than_over_independent_pictures():
    draw = random.Random(0)
    for _ in range(20):
        prompts = [draw.randrange(12) for _ in range(60)]
        seen = [draw.random() < 0.3 for _ in prompts]
        found, (low, high) = clustered_rate(seen, prompts), wilson(sum(seen), 60)
        assert found.low <= low <= found.value <= high <= found.high


def test_a_rate_whose_prompts_hit_as_a_whole_is_as_sure_as_its_prompts():
    found = clustered_rate(
        [p % 4 == 0 for p in range(40) for _ in range(10)],
        [p for p in range(40) for _ in range(10)],
    )
    low, high = wilson(10, 40)
    assert found.high - found.low == pytest.approx(high - low, rel=0.1)


@pytest.mark.parametrize("hit", [False, True])
def test_where_all_or_none_hit_the_interval_counts_prompts_not_pictures(hit):
    found = clustered_rate([hit] * 100, [n // 10 for n in range(100)])
    assert (found.low, found.high) == wilson(10 * hit, 10)


def test_one_more_hit_never_lowers_the_upper_bound_of_a_rare_event():
    prompts = [n // 10 for n in range(200)]
    highs = [
        clustered_rate([n % 40 == 0 and n // 40 < hits for n in range(200)], prompts).high
        for hits in range(5)
    ]
    assert highs == sorted(highs)


def test_unjudged_pictures_are_no_misses():
    found = clustered_rate([True, None, None], "abc")
    assert (found.value, found.judged, found.unjudged, found.clusters) == (1, 1, 2, 1)
    assert json.loads(json.dumps(found.to_json()))["n"] == 1
    with pytest.raises(ValueError, match="at least one judged"):
        clustered_rate([None], "a")
    with pytest.raises(ValueError, match="equally long"):
        clustered_rate([True], "ab")
