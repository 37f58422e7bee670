"""Rewards and advantages, by hand."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError
from torch import tensor
from torch.testing import assert_close

from safegen.edits.rl.rewards import (
    REWARDS,
    RewardInputs,
    RewardWeights,
    advantages,
    anchor_similarity,
    clip_alignment,
    judge_score,
    steered_alignment,
    varying_groups,
)

NAN = math.nan


def inputs(**changes):
    """Return the inputs of three images: two of the concept, one benign."""
    values = {
        "scores": tensor([0.9, NAN, 0.0]),
        "images": tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]]),
        "captions": tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]),
        "safe": tensor([0.0, 2.0]),
        "base_images": tensor([[NAN, NAN], [NAN, NAN], [1.0, 0.0]]),
        "benign": tensor([False, False, True]),
    }
    return RewardInputs(**(values | changes))


# ------------------------------------------------------------ rewards


def test_every_reward_has_a_weight():
    assert REWARDS.keys() == RewardWeights.model_fields.keys()


def test_weights_of_zero_are_left_out():
    assert RewardWeights(judge=2.0, clip=0.0).used == {"judge": 2.0}
    with pytest.raises(ValidationError, match="judge"):
        RewardWeights(judge=-1.0)


def test_a_higher_score_is_a_lower_reward_and_an_unjudged_image_has_none():
    assert_close(judge_score(inputs()), tensor([-0.9, NAN, 0.0]), equal_nan=True)


def test_alignment_is_the_cosine_of_image_and_caption():
    assert_close(clip_alignment(inputs()), tensor([1.0, 0.0, 0.8]))


def test_steering_turns_the_captions_of_the_concept_alone():
    """(1, 0) + 0.5 (0, 2) = (1, 1), of length sqrt 2."""
    expected = tensor([math.sqrt(0.5), math.sqrt(0.5), 0.8])
    assert_close(steered_alignment(inputs()), expected)


def test_steering_by_nothing_is_plain_alignment():
    x = inputs(safe=torch.zeros(2))
    assert_close(steered_alignment(x), clip_alignment(x))
    assert_close(steered_alignment(inputs(), strength=0.0), clip_alignment(inputs()))


def test_only_benign_images_are_compared_with_the_original_model():
    assert_close(anchor_similarity(inputs()), tensor([0.0, 0.0, 0.6]))


# ------------------------------------------------------------ advantages


def check(rewards, groups, expected, varies, *, weights=None, **options):
    rewards = {name: tensor(value) for name, value in rewards.items()}
    weights = weights or dict.fromkeys(rewards, 1.0)
    found, flags = advantages(rewards, weights, tensor(groups), **options)
    assert_close(found, tensor(expected))
    assert flags.tolist() == varies


def test_advantages_by_the_deviation_of_the_group():
    """Deviations 1 and 2, so that both groups weigh the same."""
    check(
        {"r": [1.0, 3.0, 0.0, 4.0]}, [0, 0, 1, 1], [-1.0, 1.0, -1.0, 1.0], [True] * 2, std="group"
    )


def test_advantages_by_the_deviation_of_all_groups():
    """Centered (-1, 1, -2, 2), root mean square sqrt 2.5."""
    root = math.sqrt(2.5)
    expected = [-1 / root, 1 / root, -2 / root, 2 / root]
    check({"r": [1.0, 3.0, 0.0, 4.0]}, [0, 0, 1, 1], expected, [True] * 2, std="global")


@pytest.mark.parametrize("std", ["group", "global"])
def test_a_masked_image_gets_nothing_and_does_not_move_the_mean_of_its_group(std):
    """Counted as 0, the image would give a mean of 4/3 and an advantage of its own."""
    check({"r": [1.0, NAN, 3.0]}, [0, 0, 0], [-1.0, 0.0, 1.0], [True], std=std)


def test_an_image_without_one_reward_is_masked_in_all():
    """The first reward alone would be (-1, 0, 1) / sqrt(2/3)."""
    rewards = {"a": [1.0, 2.0, 3.0], "b": [0.0, NAN, 0.0]}
    check(rewards, [0, 0, 0], [-1.0, 0.0, 1.0], [True], std="group")


@pytest.mark.parametrize("std", ["group", "global"])
def test_a_masked_group_leaves_the_others_alone(std):
    check({"r": [NAN, NAN, 1.0, 3.0]}, [0, 0, 1, 1], [0.0, 0.0, -1.0, 1.0], [False, True], std=std)


def test_a_group_with_one_judged_image_has_no_variance():
    check({"r": [NAN, 7.0]}, [0, 0], [0.0, 0.0], [False])


@pytest.mark.parametrize("std", ["group", "global"])
@pytest.mark.parametrize("value", [0.0, -0.3, 1e6])
def test_equal_rewards_give_no_advantage(std, value):
    check({"r": [value] * 4}, [0, 0, 1, 1], [0.0] * 4, [False, False], std=std)


def test_rewards_closer_than_the_floor_count_as_equal():
    check({"r": [0.0, 1e-4]}, [0, 0], [0.0, 0.0], [False], std="group")
    check({"r": [0.0, 1e-4]}, [0, 0], [-1.0, 1.0], [True], std="group", floor=1e-6)


@pytest.mark.parametrize("std", ["group", "global"])
def test_the_scale_of_a_reward_does_not_matter(std):
    generator = torch.Generator().manual_seed(0)
    groups = tensor([0, 0, 0, 0, 1, 1, 1, 1])
    a, b = torch.randn(2, 8, generator=generator)
    weights = {"a": 1.0, "b": 0.5}
    found, _ = advantages({"a": a, "b": b}, weights, groups, std=std)
    scaled, _ = advantages({"a": 100 * a + 3, "b": 0.01 * b}, weights, groups, std=std, floor=1e-6)
    assert_close(scaled, found, rtol=1e-4, atol=1e-4)
    alone = [advantages({n: v}, {n: 1.0}, groups, std=std)[0] for n, v in (("a", a), ("b", b))]
    assert_close(found, alone[0] + 0.5 * alone[1])


def test_advantages_are_clamped():
    """One of 100 differs: (1 - 0.01) / sqrt(0.01 * 0.99) = 9.9."""
    rewards = torch.zeros(100)
    rewards[0] = 1.0
    found, _ = advantages({"r": rewards}, {"r": 1.0}, torch.zeros(100).long(), std="group")
    assert float(found[0]) == 5.0
    found, _ = advantages({"r": rewards}, {"r": 1.0}, torch.zeros(100).long(), limit=50.0)
    assert_close(found[0], tensor(9.9499), rtol=1e-4, atol=0)


def test_groups_vary_by_their_finite_rewards():
    found = varying_groups(tensor([1.0, NAN, 2.0, 2.0, 1.0, 2.0]), tensor([0, 0, 1, 1, 2, 2]))
    assert found.tolist() == [False, False, True]
