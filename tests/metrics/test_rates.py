"""Rates carry n and an interval; a rate of nothing raises."""

from __future__ import annotations

import json
import random

import pytest
from scipy.stats import binomtest

from safegen.metrics.bootstrap import clustered_rate
from safegen.metrics.rates import Rate, removal_rate, wilson_interval

PAIRS = [(0, 1), (1, 1), (0, 64), (64, 64), (1, 64), (3, 98), (49, 98), (500, 1000), (999, 1000)]


@pytest.mark.parametrize(("hits", "n"), PAIRS)
def test_the_interval_is_scipys_wilson_interval(hits, n):
    oracle = binomtest(hits, n).proportion_ci(confidence_level=0.95, method="wilson")
    assert wilson_interval(hits, n) == pytest.approx((oracle.low, oracle.high), abs=1e-9)


@pytest.mark.parametrize(("hits", "n"), PAIRS)
def test_the_interval_is_within_0_and_1_and_contains_the_proportion(hits, n):
    low, high = wilson_interval(hits, n)
    assert 0 <= low <= hits / n <= high <= 1
    assert low < high


@pytest.mark.parametrize(("hits", "n"), PAIRS)
def test_the_interval_of_misses_mirrors_that_of_hits(hits, n):
    low, high = wilson_interval(hits, n)
    assert wilson_interval(n - hits, n) == pytest.approx((1 - high, 1 - low))


def test_the_interval_narrows_with_n():
    widths = [high - low for low, high in (wilson_interval(n // 4, n) for n in (8, 80, 800, 8000))]
    assert widths == sorted(widths, reverse=True)


@pytest.mark.parametrize(("hits", "n"), [(0, 0), (0, -1), (-1, 5), (6, 5)])
def test_an_impossible_count_is_refused(hits, n):
    with pytest.raises(ValueError, match="got"):
        wilson_interval(hits, n)
    with pytest.raises(ValueError, match="got"):
        Rate(hits, n)


@pytest.mark.parametrize("outcomes", [[], [None, None]])
def test_a_rate_without_judged_images_raises(outcomes):
    with pytest.raises(ValueError, match="at least one judged image"):
        Rate.from_outcomes(outcomes)


def test_unjudged_images_are_counted_separately():
    assert Rate.from_outcomes([True, False, None, True, None]) == Rate(hits=2, judged=3, unjudged=2)
    assert Rate.from_outcomes([True, None]).value == 1


def test_rate_to_json_has_value_interval_n_and_unjudged():
    row = json.loads(json.dumps(Rate(3, 98, 2).to_json()))
    low, high = wilson_interval(3, 98)
    assert row == {"value": 3 / 98, "low": low, "high": high, "hits": 3, "n": 98, "unjudged": 2}


def test_complete_removal_is_1_with_a_lower_bound_below_1():
    found = removal_rate([2, 1, 3], [0, 0, 0], "abc")
    assert (found.value, found.high) == (1, 1)
    assert 0 < found.low < 1


def test_no_change_is_0():
    found = removal_rate([2, 0, 3], [2, 0, 3], "abc")
    assert found.value == 0
    assert found.low <= 0 <= found.high


def test_no_change_has_the_interval_of_the_survivors():
    result = removal_rate([1] * 64, [1] * 64, range(64))
    assert (result.low, result.high) == (0, pytest.approx(1 - wilson_interval(64, 64)[0]))


def test_added_detections_count_clusters_if_few_clusters_show_the_concept_before():
    """1 detection becomes 64 in 16 prompts: Wilson's interval of 64/65 over 16, as odds."""
    result = removal_rate([1] + [0] * 63, [1] * 64, [i // 4 for i in range(64)])
    _, high = wilson_interval(64 / 65 * 16, 16)
    assert result.value == -63
    assert result.low == pytest.approx(1 - high / (1 - high))


def test_added_detections_give_a_negative_rate():
    found = removal_rate([1, 1], [2, 1], "ab")
    assert found.value == -0.5
    assert found.low < -0.5 < found.high


def test_added_detections_in_one_image_have_an_interval():
    """2 of 3 detections are added, in one trial: Wilson's interval of 2/3 over 1, as odds."""
    found = removal_rate([1], [2], "a")
    low, high = wilson_interval(2 / 3, 1)
    assert (found.value, found.low, found.high) == (
        -1,
        pytest.approx(1 - high / (1 - high)),
        pytest.approx(1 - low / (1 - low)),
    )


def test_detections_added_in_many_prompts_count_as_independent():
    """64 prompts with 8 detections each, one more in a quarter of them: no wider than Wilson's."""
    found = removal_rate([8] * 64, [8] * 48 + [9] * 16, range(64))
    low, high = wilson_interval(528 / 1040 * 1040, 1040)
    assert found.value == pytest.approx(-1 / 32)
    assert (found.low, found.high) == (
        pytest.approx(1 - high / (1 - high)),
        pytest.approx(1 - low / (1 - low)),
    )
    few = removal_rate([8] * 64, [8] * 63 + [24], range(64))  # all that is added is in one prompt
    assert few.low < -0.5


def test_few_survivors_count_one_trial_per_prompt():
    """Detections of a prompt are not independent: 64 prompts x 3 seeds x 3 detections."""
    prompts = [i for i in range(64) for _ in range(3)]
    for left in (0, 2):
        edited = [0] * 191 + [left]
        found = removal_rate([3] * 192, edited, prompts)
        assert found.low == pytest.approx(1 - wilson_interval(left / 576 * 64, 64)[1])
        assert clustered_rate([e > 0 for e in edited], prompts).high <= 1 - found.low + 0.02


def test_five_clusters_with_survivors_count_detections_and_four_count_clusters():
    five, four = (
        removal_rate([30] * 10, [int(c < k) for c in range(10)], range(10)) for k in (5, 4)
    )
    assert five.low == pytest.approx(1 - wilson_interval(5, 300)[1])
    assert four.low == pytest.approx(1 - wilson_interval(4 / 300 * 10, 10)[1])


@pytest.mark.parametrize("rate", [0.02, 0.05, 0.15])
def test_the_interval_covers_the_truth_for_detections_that_survive_per_prompt(rate):
    """64 prompts with three detections each, which survive together or not at all."""
    draw, hits = random.Random(1), 0
    for _ in range(150):
        edited = [3 if draw.random() < rate else 0 for _ in range(64)]
        found = removal_rate([3] * 64, edited, range(64), draws=200)
        hits += found.low <= 1 - rate <= found.high
    assert hits >= 0.9 * 150


@pytest.mark.parametrize(
    ("base", "edited"),
    [([0, 0], [0, 0]), ([0, 0], [1, 0]), ([], []), ([None, 0], [0, 0]), ([3, 0], [None, 0])],
)
def test_the_removal_rate_is_undefined_if_the_base_shows_nothing(base, edited):
    with pytest.raises(ValueError, match="undefined"):
        removal_rate(base, edited, range(len(base)))


@pytest.mark.parametrize(("edited", "clusters"), [([1], "ab"), ([1, 1], "a")])
def test_different_lengths_are_refused(edited, clusters):
    with pytest.raises(ValueError, match="equally long"):
        removal_rate([1, 1], edited, clusters)


def test_unjudged_pairs_are_excluded_and_counted():
    found = removal_rate([2, None, 5, 1], [1, 0, None, 0], "abcd")
    assert (found.before, found.after, found.n, found.unjudged) == (3, 1, 2, 2)
    assert found.value == removal_rate([2, 1], [1, 0], "ad").value


def test_counts_capped_at_one_give_the_image_rate():
    base, edited = [3, 1, 0], [1, 0, 0]
    assert removal_rate(base, edited, "abc").value == 0.75
    assert removal_rate([min(v, 1) for v in base], [min(v, 1) for v in edited], "abc").value == 0.5


def _rows(seed: int = 0, n: int = 60):
    draw = random.Random(seed)
    return [(draw.randint(0, 3), draw.randint(0, 1), draw.randint(0, 19)) for _ in range(n)]


def test_the_default_interval_is_pinned():
    """The number of resamples, the quantiles and the seed are part of every reported interval."""
    result = removal_rate(*zip(*_rows(), strict=True))
    assert (result.before, result.after) == (85, 27)
    assert (result.low, result.high) == pytest.approx((0.5, 0.82), abs=1e-9)


def test_the_result_does_not_depend_on_row_order():
    rows = _rows()
    shuffled = random.Random(1).sample(rows, len(rows))
    assert removal_rate(*zip(*shuffled, strict=True)) == removal_rate(*zip(*rows, strict=True))


def test_the_result_does_not_depend_on_cluster_names():
    base, edited, clusters = zip(*_rows(), strict=True)
    assert removal_rate(base, edited, [f"prompt {c}" for c in clusters]) == removal_rate(
        base, edited, clusters
    )


def test_the_interval_depends_on_the_seed_only():
    rows = list(zip(*_rows(), strict=True))
    assert removal_rate(*rows, seed=3) == removal_rate(*rows, seed=3)
    assert removal_rate(*rows, seed=3).value == removal_rate(*rows, seed=4).value


@pytest.mark.parametrize("seed", range(5))
def test_the_interval_contains_the_rate_and_the_wilson_interval_of_survivors(seed):
    found = removal_rate(*zip(*_rows(seed), strict=True))
    low, high = wilson_interval(found.after, found.before)
    assert found.low <= min(found.value, 1 - high)
    assert found.high >= max(found.value, 1 - low)


def test_clustering_widens_the_interval():
    base, edited = [1] * 40, [0, 1] * 20
    alone = removal_rate(base, edited, range(40))
    together = removal_rate(
        base, edited, [i // 2 % 4 * 2 + i % 2 for i in range(40)]
    )  # eight prompts, each all gone or all there
    assert together.value == alone.value
    assert together.high - together.low > alone.high - alone.low


def test_removal_to_json_has_plain_values():
    found = removal_rate([2, 1], [0, 1], "ab")
    assert json.loads(json.dumps(found.to_json())) == {
        "value": found.value,
        "low": found.low,
        "high": found.high,
        "before": 3,
        "after": 1,
        "n": 2,
        "unjudged": 0,
    }


def test_a_removal_rate_over_no_judged_pair_does_not_say_that_the_base_shows_nothing():
    with pytest.raises(ValueError, match="no pair of images was judged"):
        removal_rate([None, 3], [2, None], ["a", "b"])
