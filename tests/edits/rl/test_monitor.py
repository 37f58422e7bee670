"""Known failures of training by reward: each is detected and acted on, and its bounds hold."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch.testing import assert_close

from safegen.core.errors import ConfigError
from safegen.edits.rl.figures import group_diversity, rollout_figures
from safegen.edits.rl.monitor import BOUND, FACTOR, Limits, Monitor, TrainingHealthWarning
from safegen.edits.rl.rewards import RewardInputs

HEALTHY = {
    "zero_variance": 0.0,
    "zero_variance_judge": 0.0,
    "diversity": 0.4,
    "alignment_benign": 0.8,
    "judge_unsafe_concept": 0.5,
    "judge_unsafe_concept_n": 40.0,
    "held_out_unsafe_concept": 0.5,
    "held_out_unsafe_concept_n": 40.0,
}
ONE = Limits(window=1)


def monitor(kl=0.1, keep=1.0, *, window=1, **options):
    return Monitor(kl, keep, limits=Limits(window=window, **options.pop("limits", {})), **options)


def follow(m, n=1, **changes):
    for _ in range(n):
        m.follow_rollout(HEALTHY | changes)


# ------------------------------------------------------------ collapse and over-erasure


@pytest.mark.parametrize(
    ("weight", "other", "figure", "low"),
    [("kl", "keep", "diversity", 0.19), ("keep", "kl", "alignment_benign", 0.70)],
)
def test_an_event_raises_its_weight_while_it_lasts_and_warns_once(weight, other, figure, low):
    m = monitor()
    follow(m)
    start, untouched = getattr(m, weight), getattr(m, other)
    with pytest.warns(TrainingHealthWarning, match=f"The weight {weight} is raised") as seen:
        follow(m, 3, **{figure: low})
    assert len(seen) == 1
    assert getattr(m, weight) == pytest.approx(start * FACTOR**3)
    follow(m, 2)
    assert getattr(m, weight) == pytest.approx(start * FACTOR)
    follow(m, 5)
    assert getattr(m, weight) == pytest.approx(start)
    assert getattr(m, other) == untouched
    with pytest.warns(TrainingHealthWarning, match="is raised"):  # another event
        follow(m, **{figure: low})


def test_a_small_fall_is_no_event():
    m = monitor()
    follow(m)
    follow(m, 5, diversity=0.21, alignment_benign=0.71)
    assert (m.kl, m.keep) == pytest.approx((0.1, 1.0))


def test_events_are_those_of_the_mean_of_the_window():
    m = monitor(window=2)
    follow(m, diversity=0.6)
    follow(m, diversity=0.2)  # the first mean is 0.4
    follow(m, diversity=0.2)  # 0.2, not below half
    assert m.kl == pytest.approx(0.1)
    with pytest.warns(TrainingHealthWarning, match=r"are 0\.195 apart, at first 0\.400"):
        follow(m, diversity=0.19)


@pytest.mark.parametrize("limits", [{"diversity": 0.0, "alignment": 0.0}])
def test_limits_can_be_switched_off(limits):
    m = monitor(limits=limits)
    follow(m)
    follow(m, diversity=0.0, alignment_benign=-0.0)
    assert (m.kl, m.keep) == pytest.approx((0.1, 1.0))


@pytest.mark.parametrize("start", [0.1, 0.0])
def test_a_raised_weight_is_bounded(start):
    m = monitor(kl=start)
    follow(m)
    with pytest.warns(TrainingHealthWarning):
        follow(m, 100, diversity=0.0)
    assert m.kl == pytest.approx(max(start, 1e-3) * BOUND)
    follow(m, 100)
    assert m.kl == pytest.approx(start, abs=1e-6)


@pytest.mark.parametrize(("now", "is_event"), [(-0.111, False), (-0.113, True), (0.5, False)])
def test_a_negative_alignment_is_compared_by_its_size(now, is_event):
    m = monitor()
    follow(m, alignment_benign=-0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TrainingHealthWarning)
        follow(m, alignment_benign=now)
    assert (m.keep > 1.0) == is_event


def test_without_benign_prompts_alignment_is_no_event():
    m, figures = monitor(), {k: v for k, v in HEALTHY.items() if k != "alignment_benign"}
    for _ in range(3):
        m.follow_rollout(figures)
    assert m.keep == 1.0


# ------------------------------------------------------------ retention by budget


def test_the_weight_follows_the_measured_distance():
    m = monitor(budget=0.3)
    m.follow_distance(0.31)
    assert m.keep == pytest.approx(FACTOR)
    m.follow_distance(0.25)  # between budget / 1.5 and budget
    assert m.keep == pytest.approx(FACTOR)
    m.follow_distance(0.1)
    m.follow_distance(0.1)
    assert m.keep == pytest.approx(1 / FACTOR)
    assert m.kl == pytest.approx(0.1)


def test_the_weight_stays_within_its_bounds():
    m = monitor(budget=0.3)
    for distance, bound in ((1.0, BOUND), (0.0, 1 / BOUND)):
        for _ in range(60):
            m.follow_distance(distance)
        assert m.keep == pytest.approx(bound)
    for _ in range(60):  # it comes back from the lower bound
        m.follow_distance(1.0)
    assert m.keep == pytest.approx(BOUND)


def test_without_a_budget_the_weight_stays():
    m = monitor()
    m.follow_distance(100.0)
    assert m.keep == 1.0


def test_the_budget_does_not_lower_the_weight_during_over_erasure():
    m = monitor(budget=0.3)
    follow(m)
    with pytest.warns(TrainingHealthWarning, match="other content is lost"):
        follow(m, alignment_benign=0.5)
    m.follow_distance(0.0)
    assert m.keep == pytest.approx(FACTOR)
    follow(m)  # the event is over, and the budget alone rules
    assert m.keep == pytest.approx(FACTOR)
    m.follow_distance(0.0)
    assert m.keep == pytest.approx(1.0)


# ------------------------------------------------------------ sparse reward


def test_a_training_that_never_varies_is_refused():
    m = monitor()
    follow(m, 4, zero_variance=1.0, judge_unsafe_concept=1.0)
    with pytest.raises(
        ConfigError, match=r"in 5 rollouts they do not. Start from a patch .*--from"
    ):
        follow(m, zero_variance=1.0, judge_unsafe_concept=1.0)
    m = monitor()
    with pytest.raises(ConfigError, match="in no image, so there is nothing to remove"):
        follow(m, 5, zero_variance=1.0, judge_unsafe_concept=0.0)


def test_a_judge_that_never_varies_is_warned_about_once():
    m, sparse = monitor(), {"zero_variance_judge": 1.0, "judge_unsafe_concept": 1.0}
    with pytest.warns(TrainingHealthWarning, match="teaches nothing. Start from a patch") as seen:
        follow(m, 12, **sparse)
    assert len(seen) == 1
    assert m.stop_reason is None


def test_a_judge_that_finds_nothing_at_first_is_warned_about_once():
    m, nothing = monitor(window=2), {"judge_unsafe_concept": 0.0, "held_out_unsafe_concept": 0.1}
    with pytest.warns(TrainingHealthWarning, match="in none of the first 80 images") as seen:
        follow(m, 4, **nothing)
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        follow(monitor(window=2), 2, **nothing, judge_unsafe_concept_n=20.0)  # too few images
        learned = monitor(window=2)
        follow(learned)
        follow(learned, 4, **nothing)


def test_a_reward_that_was_seen_once_is_enough():
    m, sparse = monitor(), {"zero_variance": 1.0, "judge_unsafe_concept": 1.0}
    follow(m, 4, **sparse)
    follow(m)
    follow(m, 20, **sparse)


def test_an_algorithm_that_follows_a_gradient_needs_no_variance():
    follow(monitor(needs_variance=False), 20, zero_variance=1.0, judge_unsafe_concept=1.0)


# ------------------------------------------------------------ reward hacking and success


def test_a_judge_that_is_deceived_ends_the_training():
    m = monitor(window=2)
    follow(m, 4)
    follow(m, judge_unsafe_concept=0.0, held_out_unsafe_concept=0.4)  # means 0.25 and 0.45
    assert m.stop_reason is None
    with pytest.warns(TrainingHealthWarning, match="the training ends: the held-out judge"):
        follow(m, judge_unsafe_concept=0.0, held_out_unsafe_concept=0.4)
    assert m.stop_reason == (
        "the held-out judge finds the concept in 40% of the last images of its prompts, the judge "
        "that rewards in 0%: the training deceives that judge, or it misses the concept"
    )


@pytest.mark.parametrize(
    ("changes", "limits"),
    [
        ({"held_out_unsafe_concept_n": 10.0}, {}),  # too few images
        ({"held_out_unsafe_concept": 0.2}, {}),  # too small a gap
        ({"judge_unsafe_concept": 0.9, "held_out_unsafe_concept": 0.1}, {}),  # the other way
        ({}, {"judge_gap": None}),
    ],
)
def test_a_gap_that_is_not_clear_does_not_end_it(changes, limits):
    m = monitor(window=2, limits=limits)
    figures = {"judge_unsafe_concept": 0.05, "held_out_unsafe_concept": 0.9}
    follow(m, 5, **(figures | changes))
    assert m.stop_reason is None


def test_rates_are_weighted_by_their_images():
    """30 of 40 and 0 of 200 are 12.5 %, although the mean of the rates is 37.5 %."""
    m = monitor(window=2, target=0.13)
    follow(m, held_out_unsafe_concept=0.75)
    follow(m, held_out_unsafe_concept=0.0, held_out_unsafe_concept_n=200.0)
    assert "the held-out judge finds the concept in 12.5% of" in m.stop_reason


def test_success_ends_the_training_after_a_whole_window():
    m = monitor(window=3, target=0.03)
    follow(m, 2, judge_unsafe_concept=0.0, held_out_unsafe_concept=0.0)
    assert m.stop_reason is None
    follow(m, judge_unsafe_concept=0.0, held_out_unsafe_concept=0.05)
    assert m.stop_reason == (
        "the held-out judge finds the concept in 1.7% of the last images of its prompts, and the "
        "target is 3.0%"
    )


def test_the_held_out_judge_decides_on_success():
    m = monitor(target=0.1)
    follow(m, 3, judge_unsafe_concept=0.0, held_out_unsafe_concept=0.2)
    assert m.stop_reason is None


def test_without_a_held_out_judge_the_judge_decides():
    figures = {k: v for k, v in HEALTHY.items() if not k.startswith("held_out")}
    m = monitor(target=0.1)
    m.follow_rollout(figures | {"judge_unsafe_concept": 0.2})
    assert m.stop_reason is None
    m.follow_rollout(figures | {"judge_unsafe_concept": 0.1})
    assert m.stop_reason.startswith("the judge finds the concept in 10.0%")


def test_images_that_were_not_judged_are_no_success():
    m = monitor(target=0.5)
    m.follow_rollout({"zero_variance": 0.0, "diversity": 0.4})
    assert m.stop_reason is None


@pytest.mark.parametrize("end", ["judge", "held_out"])
def test_the_state_holds_everything(end):
    """A monitor with the tensors of another one goes on like it."""
    first, second = (monitor(window=3, target=0.2, budget=0.3) for _ in range(2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TrainingHealthWarning)
        follow(first, 4)
        follow(first, 3, diversity=0.0, alignment_benign=0.0)
        first.follow_distance(1.0)
        follow(first, 2, **{f"{end}_unsafe_concept": 0.0})
        for name, value in second.state.items():
            value.copy_(first.state[name])
        for m in (first, second):
            follow(m, **{f"{end}_unsafe_concept": 0.0})
            m.follow_distance(0.0)
    assert first.stop_reason
    assert second.stop_reason == first.stop_reason
    assert all(torch.equal(first.state[name], value) for name, value in second.state.items())
    assert all(v.isfinite().all() and v.dtype == torch.float32 for v in first.state.values())


# ------------------------------------------------------------ figures


def test_figures_of_a_rollout():
    nan = math.nan
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0], [nan, nan]])
    x = RewardInputs(
        scores=torch.tensor([0.8, 0.6, 0.0, 0.2, nan]),
        images=features,
        captions=torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.6, 0.8], [1.0, 0.0], [1.0, 0.0]]),
        safe=torch.zeros(2),
        base_images=torch.full((5, 2), nan),
        benign=torch.tensor([False, False, True, True, True]),
    )
    groups = torch.tensor([0, 0, 1, 1, 1])
    verdicts = {
        "judge": torch.tensor([1.0, 1.0, 0.0, 0.0, nan]),
        "held_out": torch.tensor([1.0, 0.0, nan, nan, nan]),
    }
    varies = torch.tensor([True, False])
    found = rollout_figures(x, {"judge": -x.scores}, groups, varies, verdicts)
    assert found == pytest.approx(
        {
            "reward_judge_concept": -0.7,
            "reward_judge_concept_std": 0.1,
            "reward_judge_benign": -0.1,
            "reward_judge_benign_std": 0.1,
            "judge_unsafe_concept": 1.0,
            "judge_unsafe_concept_n": 2.0,
            "judge_unsafe_benign": 0.0,
            "judge_unsafe_benign_n": 2.0,
            "held_out_unsafe_concept": 0.5,
            "held_out_unsafe_concept_n": 2.0,
            "zero_variance": 0.5,
            "zero_variance_judge": 0.0,
            "masked": 0.2,
            "diversity": 0.5,  # 1 - 0 in the first group, 1 - 1 in the second
            "alignment_benign": 0.8,
        },
        rel=1e-5,
    )
    assert all(type(value) is float for value in found.values())


def test_diversity_is_that_within_groups():
    features = torch.eye(4)
    assert group_diversity(features, torch.tensor([0, 0, 1, 1])) == 1.0
    assert group_diversity(features[[0, 0, 1, 1]], torch.tensor([0, 0, 1, 1])) == 0.0
    assert group_diversity(features, torch.arange(4)) == 0.0
    a = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), dim=1)
    assert_close(group_diversity(a, torch.zeros(2).long()), 1 - math.sqrt(0.5))
