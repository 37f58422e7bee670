"""The cluster bootstrap depends on the seed only and resamples whole clusters."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from scipy.stats import bootstrap

from safegen.metrics.bootstrap import bootstrap_mean, clustered_rate, image_rate
from safegen.metrics.rates import resampled_sums, wilson_interval


def _values(seed: int = 0, n: int = 80, prompts: int = 20):
    draw = random.Random(seed)
    return [draw.gauss(30, 4) for _ in range(n)], [draw.randrange(prompts) for _ in range(n)]


def test_single_image_clusters_give_scipys_percentile_bootstrap():
    values, _ = _values(n=200)
    found = bootstrap_mean(values, range(200), draws=20_000)
    oracle = bootstrap(
        (values,), lambda v, axis: v.mean(axis), method="percentile", n_resamples=20_000, rng=0
    ).confidence_interval
    assert (found.low, found.high) == pytest.approx((oracle.low, oracle.high), abs=0.03)


def test_the_default_interval_is_pinned():
    """The number of resamples, the quantiles and the seed are part of every reported interval."""
    values, clusters = _values()
    result = bootstrap_mean(values, clusters)
    assert (result.low, result.high) == pytest.approx((28.8018484006, 30.5314432285), abs=1e-9)
    rate = clustered_rate([v > 31 for v in values], clusters)
    assert (rate.hits, rate.clusters) == (28, 20)
    assert (rate.low, rate.high) == pytest.approx((0.2399701493, 0.4615384615), abs=1e-9)


@pytest.mark.parametrize("draws", [1, 255, 256, 257, 600])
def test_every_resample_draws_as_many_clusters_as_there_are(draws):
    sums = resampled_sums([(1.0, 2.0), (4.0, 1.0), (3.0, 0.0)], "aab", seed=0, draws=draws)
    assert sums.shape == (draws, 2)
    assert {tuple(row) for row in sums} <= {(10, 6), (8, 3), (6, 0)}  # a twice, a and b, b twice
    longer = resampled_sums([(1.0, 2.0), (4.0, 1.0), (3.0, 0.0)], "aab", seed=0, draws=draws + 256)
    assert (longer[: draws // 256 * 256] == sums[: draws // 256 * 256]).all()
    assert len({tuple(row) for row in sums}) == (1 if draws == 1 else 3)


def test_the_result_does_not_depend_on_row_order_or_cluster_names():
    values, clusters = _values()
    rows = random.Random(1).sample(list(zip(values, clusters, strict=True)), len(values))
    again = bootstrap_mean([v for v, _ in rows], [f"prompt {c}" for _, c in rows])
    assert again == bootstrap_mean(values, clusters)


def test_the_interval_depends_on_the_seed_only_and_contains_the_mean():
    values, clusters = _values()
    found = bootstrap_mean(values, clusters, seed=3)
    assert found == bootstrap_mean(values, clusters, seed=3)
    assert found.low < found.value < found.high
    assert bootstrap_mean(values, clusters, seed=4).value == found.value
    for seed in range(4):
        one = bootstrap_mean(values, clusters, seed=seed, draws=1)
        assert one.low <= one.value <= one.high


def test_the_interval_is_equivariant_to_shift_and_scale():
    values, clusters = _values()
    found, moved = (
        bootstrap_mean(values, clusters),
        bootstrap_mean([2 * v + 5 for v in values], clusters),
    )
    assert (moved.value, moved.low, moved.high) == pytest.approx(
        (2 * found.value + 5, 2 * found.low + 5, 2 * found.high + 5)
    )


def test_copies_within_a_cluster_do_not_narrow_the_interval():
    values, clusters = _values(n=40, prompts=1000)
    one, ten = bootstrap_mean(values, clusters), bootstrap_mean(values * 10, clusters * 10)
    assert (ten.low, ten.high, ten.clusters) == pytest.approx((one.low, one.high, one.clusters))
    assert (
        bootstrap_mean(values * 10, range(400)).high - bootstrap_mean(values * 10, range(400)).low
        < (one.high - one.low) / 2
    )


def test_unjudged_values_are_excluded_and_counted():
    found = bootstrap_mean([1.0, None, 3.0], "abc", scale="100*cos")
    assert (found.value, found.n, found.clusters, found.unjudged) == (2, 2, 2, 1)
    assert json.loads(json.dumps(found.to_json()))["scale"] == "100*cos"


def test_one_cluster_has_a_mean_but_no_interval():
    found = bootstrap_mean([1.0, 3.0], "aa")
    assert (found.value, found.low, found.high) == (2, None, None)
    assert bootstrap_mean([1.0, 3.0], "ab").low == 1


@pytest.mark.parametrize(
    ("values", "clusters", "words"),
    [
        ([], "", "at least one"),
        ([None], "a", "at least one"),
        ([1.0], "ab", "equally long"),
        ([float("nan")], "a", "finite"),
    ],
)
def test_empty_or_invalid_values_are_refused(values, clusters, words):
    with pytest.raises(ValueError, match=words):
        bootstrap_mean(values, clusters)


def test_the_clustered_interval_contains_the_wilson_interval():
    draw = random.Random(0)
    for _ in range(20):
        prompts = [draw.randrange(12) for _ in range(60)]
        hits = [draw.random() < 0.3 for _ in prompts]
        found, (low, high) = clustered_rate(hits, prompts), wilson_interval(sum(hits), 60)
        assert found.low <= low <= found.value <= high <= found.high


def test_prompts_that_hit_as_a_whole_count_as_one_trial_each():
    found = clustered_rate(
        [p % 4 == 0 for p in range(40) for _ in range(10)],
        [p for p in range(40) for _ in range(10)],
    )
    low, high = wilson_interval(10, 40)
    assert found.high - found.low == pytest.approx(high - low, rel=0.1)


@pytest.mark.parametrize("hit", [False, True])
def test_unanimous_hits_count_prompts_not_images(hit):
    found = clustered_rate([hit] * 100, [n // 10 for n in range(100)])
    assert (found.low, found.high) == wilson_interval(10 * hit, 10)


@pytest.mark.parametrize("hits", [4, 5, 6])
def test_the_bootstrap_needs_five_clusters_with_hits_and_five_with_misses(hits):
    clusters = [c for c in range(10) for _ in range(4)]
    rate = clustered_rate([c < hits for c in clusters], clusters)
    if hits == 5:  # wider than Wilson's (0.24, 0.76) over clusters
        assert (rate.low, rate.high) == pytest.approx((0.2, 0.8))
    else:
        assert (rate.low, rate.high) == pytest.approx(wilson_interval(hits, 10))


def test_the_upper_bound_of_a_rare_event_grows_with_hits():
    prompts = [n // 10 for n in range(200)]
    highs = [
        clustered_rate([n % 40 == 0 and n // 40 < hits for n in range(200)], prompts).high
        for hits in range(5)
    ]
    assert highs == sorted(highs)


def test_unjudged_images_are_not_misses():
    found = clustered_rate([True, None, None], "abc")
    assert (found.value, found.judged, found.unjudged, found.clusters) == (1, 1, 2, 1)
    assert json.loads(json.dumps(found.to_json()))["n"] == 1
    with pytest.raises(ValueError, match="at least one judged"):
        clustered_rate([None], "a")
    with pytest.raises(ValueError, match="equally long"):
        clustered_rate([True], "ab")


def test_images_of_few_prompts_widen_the_interval_of_an_image_rate():
    clean = [False] * 32
    own, shared = image_rate(clean, range(32)), image_rate(clean, [i % 8 for i in range(32)])
    assert own.to_json()["high"] == wilson_interval(0, 32)[1]
    assert shared.to_json()["high"] == wilson_interval(0, 8)[1]
    assert (shared.hits, shared.judged) == (own.hits, own.judged)


@pytest.mark.parametrize("n", [1, 3, 700])
@pytest.mark.parametrize("kind", ["few whole numbers", "many whole numbers", "fractions"])
def test_bootstrap_sums_are_those_of_each_drawn_cluster_to_the_last_bit(n, kind):
    rng = np.random.default_rng(n)
    draw = {
        "few whole numbers": lambda: rng.integers(0, 3, (n, 2)),
        "many whole numbers": lambda: rng.integers(-9000, 9000, (n, 2)),
        "fractions": lambda: rng.normal(size=(n, 2)),
    }[kind]
    rows = sorted((float(a), float(b)) for a, b in draw())
    drawn = np.random.default_rng(5).integers(n, size=(300, n))
    oracle = np.array(rows)[drawn].sum(axis=1)
    found = resampled_sums(rows, range(n), seed=5, draws=300)
    assert found.tobytes() == oracle.tobytes()
