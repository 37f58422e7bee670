"""GRPO on a window: where the noise is, what is stored, and the advantages of groups."""

from __future__ import annotations

import pytest
import torch
from sampling import Trial, build_policy, draws
from torch.testing import assert_close
from toy import BENIGN

from safegen.core.errors import ConfigError
from safegen.edits.rl.ddim import DDIMSteps
from safegen.edits.rl.grpo_window import GRPOWindow

NAMES = ("block.attn2.to_v.weight", "block.attn2.to_out.weight")


@pytest.fixture
def build_trial(toy):
    """Return a builder of a trial on the toy, by settings of the algorithm."""

    def build(steps=6, **settings):
        policy = build_policy(toy(), BENIGN, names=NAMES, steps=steps)
        return Trial(policy, GRPOWindow(**settings))

    return build


def starts(trial, rollouts):
    """Return the first step of the window in some more rollouts."""
    found = []
    for _ in range(rollouts):
        trial.roll_out()
        steps = trial.batch.extra["step"]
        assert (steps == steps[0]).all()  # one window for all batches of a rollout
        assert (steps.diff(dim=1) == 1).all()
        found.append(int(steps[0, 0]))
    return found


@pytest.mark.parametrize("window", [1, 3])
def test_only_the_latents_of_the_window_are_stored(build_trial, window):
    batch = build_trial(steps=20, window=window).batch
    images, values = len(batch.prompts), 64
    floats = [value.numel() for value in batch.extra.values() if value.is_floating_point()]
    assert sum(floats) == images * (window + 1) * values + images * window
    assert not any(value.requires_grad for value in batch.extra.values())


def test_there_is_noise_in_the_window_only(build_trial):
    trial = build_trial(steps=20)
    policy, net, extra = trial.policy, trial.net, trial.batch.extra
    first, text = int(extra["step"][0, 0]), policy.text[trial.batch.prompts]
    trajectory, timesteps = extra["trajectory"], policy.sampler.timesteps
    before = policy.draw(net, trial.noise, text, timesteps[:first])
    assert_close(trajectory[:, 0], before, rtol=1e-5, atol=1e-5)
    after = policy.draw(net, trajectory[:, -1], text, timesteps[first + 2 :])
    assert_close(trial.batch.latents, after, rtol=1e-5, atol=1e-5)
    without = policy.draw(net, trajectory[:, 0], text, timesteps[first : first + 1])
    std = DDIMSteps(policy, 1.0).std[first]
    assert_close((trajectory[:, 1] - without).std(), std, rtol=0.3, atol=0)


def test_a_random_window_lies_in_the_first_half_and_changes(build_trial):
    trial = build_trial(steps=11)
    found = starts(trial, 40)
    assert set(found) == set(range(5))
    assert starts(build_trial(steps=11), 40) == found  # drawn from the generator alone


def test_a_progressive_window_moves_by_one_step_and_starts_again(build_trial):
    trial = build_trial(steps=8, placement="progressive")
    assert int(trial.batch.extra["step"][0, 0]) == 0
    assert starts(trial, 4) == [1, 2, 0, 1]
    assert trial.algorithm.state["rollouts"].tolist() == [5]


def test_a_rollout_that_failed_does_not_place_the_next_window(build_trial):
    """`prepare` ends a rollout, and does not come if no image is finite."""
    trial, found = build_trial(steps=11), set()
    for seed in range(8):
        generator, text = torch.Generator().manual_seed(seed), trial.policy.text[:4]
        _, extra = trial.algorithm.rollout(trial.net, trial.noise[:4], text, draws(4, generator))
        found.add(int(extra["step"][0, 0]))
    assert len(found) > 1


def test_the_steps_of_the_window_are_trained_in_order(build_trial):
    trial = build_trial(window=3)
    assert GRPOWindow(window=3).batches_per_image(6) == 3
    assert trial.batch.extra["order"].tolist() == [[0, 1, 2]] * 8


def test_a_window_longer_than_half_of_the_steps_is_refused(toy):
    policy = build_policy(toy(), BENIGN, names=NAMES, steps=5)
    GRPOWindow(window=3).build(policy, 2, 2, updates=1)
    with pytest.raises(ConfigError, match=r"window must be <= 3, half of the steps, got 4. Raise"):
        GRPOWindow(window=4).build(policy, 2, 2, updates=1)


def test_rewards_are_compared_within_groups(build_trial):
    """(r - mean) / std of the group; equal rewards and a masked image get 0."""
    algorithm, nan = build_trial().algorithm, float("nan")
    rewards = torch.tensor([1.0, 2.0, 3.0, nan, 7.0, 7.0, 7.0, 7.0])
    groups = torch.arange(2).repeat_interleave(4)
    values, varies = algorithm.advantages({"r": rewards}, {"r": 1.0}, groups, groups)
    deviation = (2 / 3) ** 0.5
    assert_close(values, torch.tensor([-1 / deviation, 0, 1 / deviation, 0, 0, 0, 0, 0]))
    assert varies.tolist() == [True, False]
