"""DDPO: statistics of prompts, order of steps, and the released training step."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from sampling import Trial, build_policy
from torch.testing import assert_close
from toy import BENIGN

from safegen.edits.base import TrainedEdit
from safegen.edits.rl.ddpo import DDPO, PromptTracker
from safegen.edits.shielddiff import ShieldDiff
from safegen.edits.training.lora import trainable_parameters
from safegen.edits.training.trainer import train

NAMES = ("block.attn2.to_v.weight", "block.attn2.to_out.weight")

# ------------------------------------------------------------ advantages


def test_the_statistics_of_a_prompt_equal_a_hand_computation():
    """Few rewards: (r - 4) / 3.162. Then those of the prompt, of which the last four count."""
    tracker = PromptTracker(2, 4, 3)
    first = tracker.normalize(torch.tensor([0, 0, 1]), torch.tensor([1.0, 2.0, 9.0]))
    deviation = math.sqrt((9 + 4 + 25) / 3)
    assert_close(first, torch.tensor([-3, -2, 5]) / deviation)
    second = tracker.normalize(torch.tensor([0, 1]), torch.tensor([6.0, 5.0]))
    deviation = math.sqrt((4 + 1 + 9) / 3)  # of 1, 2 and 6
    assert_close(second, torch.tensor([3 / deviation, -0.5 / 0.5]))
    third = tracker.normalize(torch.tensor([0, 0]), torch.tensor([2.0, 4.0]))
    assert_close(third, torch.tensor([-1.5, 0.5]) / math.sqrt((2.25 + 6.25 + 2.25 + 0.25) / 4))
    assert tracker.rewards[0].tolist() == [2, 6, 2, 4]
    assert tracker.count.tolist() == [4, 2]


def test_statistics_equal_those_of_a_queue_for_each_prompt():
    """Restates the released tracker: a queue of rewards for each prompt, across rollouts."""
    generator = torch.Generator().manual_seed(3)
    tracker, queues = PromptTracker(3, 16, 8), [[], [], []]
    for _ in range(6):
        prompts = torch.randint(3, (12,), generator=generator)
        rewards = torch.randn(12, generator=generator)
        expected = np.empty(12)
        for prompt in range(3):
            rows = (prompts == prompt).numpy()
            queues[prompt] = [*queues[prompt], *rewards[rows].double().tolist()][-16:]
            used = queues[prompt] if len(queues[prompt]) >= 8 else rewards.double().tolist()
            expected[rows] = (rewards[rows].double().numpy() - np.mean(used)) / (
                np.std(used) + 1e-6
            )
        assert_close(tracker.normalize(prompts, rewards), torch.from_numpy(expected).float())


def test_without_a_buffer_the_images_of_a_rollout_are_compared():
    tracker = PromptTracker(2, 0, 1)
    for _ in range(2):
        values = tracker.normalize(torch.tensor([0, 1]), torch.tensor([1.0, 3.0]))
        assert_close(values, torch.tensor([-1.0, 1.0]))


@pytest.fixture
def algorithm(toy):
    policy = build_policy(toy(), BENIGN, names=NAMES)
    return DDPO(buffer=8, min_count=4).build(policy, 2, 4, updates=1)


def test_rewards_are_summed_by_weight_and_a_masked_image_does_not_count(algorithm):
    rewards = {
        "judge": torch.tensor([0.0, 1.0, 2.0, math.nan, 5.0, 5.0, 5.0, 5.0]),
        "clip": torch.tensor([0.5, 0.5, 0.5, 0.5, 0.0, 0.0, math.nan, 0.0]),
    }
    groups = torch.arange(2).repeat_interleave(4)
    prompts = torch.tensor([2, 3])[groups]
    weights = {"judge": 1.0, "clip": 2.0}
    values, varies = algorithm.advantages(rewards, weights, prompts, groups)
    total = torch.tensor([1.0, 2.0, 3.0, 5.0, 5.0, 5.0])
    expected = (total - total.mean()) / total.std(correction=0)
    assert_close(values[values != 0], expected, rtol=1e-5, atol=1e-5)
    assert values[[3, 6]].tolist() == [0, 0]
    assert varies.tolist() == [True, False]
    assert algorithm.state["count"].tolist() == [0, 0, 3, 3]


def test_equal_rewards_have_no_advantage_and_large_ones_are_limited(algorithm):
    groups = torch.arange(2).repeat_interleave(4)
    equal, varies = algorithm.advantages({"r": torch.full((8,), 0.1)}, {"r": 1.0}, groups, groups)
    assert equal.abs().max() == 0
    assert not varies.any()
    groups = torch.zeros(40, dtype=torch.long)
    outlier = torch.zeros(40)
    outlier[0] = -100.0
    limited, _ = (
        DDPO(buffer=None)
        .build(algorithm.policy, 1, 40, updates=1)
        .advantages({"r": outlier}, {"r": 1.0}, groups, groups)
    )
    assert limited[0] == -5  # -6.2 without the limit
    masked = torch.full((40,), math.nan)
    none, varies = algorithm.advantages({"r": masked}, {"r": 1.0}, groups, groups)
    assert none.abs().max() == 0
    assert not varies.any()


def test_a_minimum_above_the_buffer_is_refused():
    with pytest.raises(ValidationError, match=r"min_count must be <= buffer \(8\), got 16"):
        DDPO(buffer=8)


# ------------------------------------------------------------ rollout


def test_every_step_is_trained_in_an_order_of_each_image(toy):
    trial = Trial(build_policy(toy(), BENIGN, names=NAMES), DDPO())
    order = trial.batch.extra["order"]
    assert torch.equal(order.sort(1).values, torch.arange(6).expand(8, -1))
    assert len(order.unique(dim=0)) > 4
    assert torch.equal(trial.batch.extra["trajectory"][:, -1], trial.batch.latents)
    assert trial.batch.extra["trajectory"].shape == (8, 7, 1, 8, 8)


# ------------------------------------------------------------ the released training step


def released_update(net, optimizer, images, *, abar, ratio, guidance, kind, clip):
    """Restate one update of kvablack/ddpo-pytorch 1958463, for batches of images and steps.

    `images` are tuples of latents before and after a step, timestep, text, blank text, old
    log-probability and advantage. `ratio` is the distance of two timesteps.
    """
    optimizer.zero_grad()
    for x, x_next, t, text, blank, old, advantage in images:
        out = net(torch.cat([x] * 2), torch.cat([t] * 2), torch.cat([blank, text])).sample
        unguided, guided = out.chunk(2)
        out = unguided + guidance * (guided - unguided)
        t_next = (t - ratio).clamp(min=0)
        a, b = abar[t].view(-1, 1, 1, 1), abar[t_next].view(-1, 1, 1, 1)
        noise = out if kind == "epsilon" else a.sqrt() * out + (1 - a).sqrt() * x
        clean = (x - (1 - a).sqrt() * noise) / a.sqrt()
        std = ((1 - b) / (1 - a) * (1 - a / b)).sqrt()
        mean = b.sqrt() * clean + (1 - b - std**2).sqrt() * noise
        density = -((x_next - mean) ** 2) / (2 * std**2) - std.log() - math.log(2 * math.pi) / 2
        quotient = (density.mean(dim=(1, 2, 3)) - old).exp()
        plain = -advantage.clamp(-5, 5) * quotient
        limited = -advantage.clamp(-5, 5) * quotient.clamp(1 - clip, 1 + clip)
        (torch.maximum(plain, limited).mean() / len(images)).backward()
    torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()


def test_updates_equal_those_of_the_released_training_step(make_model, cubes, tmp_path):
    """Two rollouts of two updates each, with guidance, on the tiny model."""
    (tmp_path / "cubes.txt").write_text("a red cube\na red cube in the grass\n", "utf-8")
    (tmp_path / "balls.txt").write_text("a blue ball\na green cone\n", "utf-8")
    files = {"prompts": [str(tmp_path / "cubes.txt")], "captions": [str(tmp_path / "balls.txt")]}
    model = make_model()
    edit = ShieldDiff.preset(
        "paper",
        concept=cubes,
        **files,
        **{"steps": 3, "groups": 2, "group": 4, "rank": None, "selector": "attn2"},
        training={"updates": 4, "batch": 4, "accumulation": 3, "precision": "fp32"},
    )
    assert (edit.guidance, edit.algorithm.clip, edit.updates_per_rollout) == (5.0, 1e-4, 2)
    batches, results = [], []
    with trainable_parameters(model, edit.selector, rank=None, alpha=None, seed=0) as trainable:
        names = trainable.names
        objective = edit.build_objective(model, None, names)
        policy = objective.policy

        def follow(done, total, row):
            batches.append(objective.batch)
            results.append({n: policy.trained[n].detach().clone() for n in names})

        train(model.denoiser, names, objective, edit.training, fingerprint="", callback=follow)
    assert batches[0] is batches[1] is not batches[2]
    assert batches[2].advantages.abs().min() > 0

    net, weights = model.denoiser, {n: model.denoiser.get_parameter(n) for n in names}
    for p in weights.values():
        p.requires_grad_(True)
    optimizer = torch.optim.AdamW(weights.values(), 3e-4, (0.9, 0.999), 1e-8, 1e-4)
    schedule = {
        "abar": model.pipeline.scheduler.alphas_cumprod,
        "ratio": 333,
        "guidance": 5.0,
        "clip": 1e-4,
    }
    for update, (batch, result) in enumerate(zip(batches, results, strict=True)):
        rows, images = torch.arange(4) + 4 * (update % 2), []
        for index in range(3):
            i, extra = batch.extra["order"][rows, index], batch.extra
            x, x_next = extra["trajectory"][rows, i], extra["trajectory"][rows, i + 1]
            t, text = policy.sampler.timesteps[i], policy.text[batch.prompts[rows]].hidden
            blank = policy.sampler.negative_text.hidden.expand_as(text)
            old, advantage = extra["log_prob"][rows, i], batch.advantages[rows]
            images.append((x, x_next, t, text, blank, old, advantage))
        released_update(net, optimizer, images, kind=model.prediction, **schedule)
        for name, value in result.items():
            apart = (weights[name].detach() - value).abs()
            size = optimizer.state[weights[name]]["exp_avg_sq"].sqrt()
            assert apart[size > 1e-7].max() < 1e-6
            # AdamW magnifies the rounding of smaller gradients, which are near its eps
            assert apart.norm() < 1e-2 * (value - policy.reference[name]).norm()
            with torch.no_grad():  # an update is compared from equal weights
                weights[name].copy_(value)
            assert (size > 1e-7).float().mean() > 0.9
    moved = max((results[-1][n] - policy.reference[n]).abs().max() for n in names)
    assert moved > 5e-4


def test_the_preset_of_the_paper_has_the_published_values(cubes):
    edit = ShieldDiff.preset("paper", concept=cubes)
    assert isinstance(edit, TrainedEdit)
    assert edit.algorithm == DDPO(eta=1.0, clip=1e-4, buffer=32, min_count=16)
    assert (edit.steps, edit.guidance, edit.rank) == (50, 5.0, 4)
    assert (edit.kl, edit.weight_keep) == (0, 0)
    assert edit.groups * edit.group == 256
    assert edit.updates_per_rollout == 4
    training = edit.training
    assert (training.lr, training.weight_decay, training.clip) == (3e-4, 1e-4, 1.0)
    assert (training.betas, training.ema) == ((0.9, 0.999), 0)
    assert training.updates == 4 * 100
