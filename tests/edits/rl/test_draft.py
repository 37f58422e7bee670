"""DRaFT: gradients through decoder and judge, the bounded target, refusals and resuming."""

from __future__ import annotations

import warnings

import pytest
import torch
from pydantic import ValidationError
from torch.testing import assert_close
from toy import EXPLICIT

from safegen.core.errors import ConfigError
from safegen.edits.rl.draft import bounded_target
from safegen.edits.rl.objective import RewardObjective
from safegen.edits.shielddiff import ShieldDiff
from safegen.models.loading import load
from safegen.models.selectors import select_parameters

TINY = {"groups": 2, "group": 2, "steps": 4, "training": {"batch": 4}}
PREDICTIONS = pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "flow_prediction"])


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def objective_of(edit, model):
    """Return the objective, with gradients of all weights of the toy's layers on."""
    names = [name for name, _ in model.denoiser.named_parameters()]
    for name in names:
        model.denoiser.get_parameter(name).requires_grad_(True)
    return RewardObjective(edit, model, names)


def mean_reward(objective, model, x):
    """Return the mean reward of images of the concept's prompts, of some initial noise."""
    prompts = torch.arange(len(x)) % len(EXPLICIT)
    with torch.no_grad():
        z = objective.policy.draw(model.denoiser, x, objective.policy.text[prompts])
        return float(objective.algorithm.reward(z, prompts).mean())


@PREDICTIONS
@pytest.mark.parametrize("settings", [{}, {"last_steps": 3}, {"target": "bounded"}])
def test_one_update_raises_the_reward_of_other_noise(prediction, settings, toy, toy_edit):
    model = toy(prediction)
    edit = toy_edit({"name": "draft", **settings}, **TINY)
    objective = objective_of(edit, model)
    x = objective.policy.sampler.noise(64, rng(5))
    before = mean_reward(objective, model, x)
    terms = objective.training_step(model.denoiser, 0, rng(), (0, 1))
    assert not terms["L_kl"].any()  # the weights are still those of the original model
    assert not terms["L_keep"].any()
    terms["L_policy"].mean().backward()
    with torch.no_grad():
        for p in model.denoiser.parameters():
            p.sub_(0.02 * p.grad / p.grad.norm())
    assert mean_reward(objective, model, x) > before + 1e-3


def test_the_gradient_of_the_weights_is_that_of_finite_differences(toy, toy_edit):
    model = toy()
    edit = toy_edit({"name": "draft", "last_steps": 2}, **TINY | {"guidance": 3.0})
    objective = objective_of(edit, model)

    with torch.no_grad():
        objective.training_step(model.denoiser, 0, rng(), (0, 1))

    def loss():
        return objective.algorithm.loss(model.denoiser, objective.batch, 0).policy.mean()

    loss().backward()
    weight = model.denoiser.block.attn2.to_out.weight
    direction = weight.grad / weight.grad.norm()
    with torch.no_grad():
        weight += 5e-3 * direction
        above = float(loss())
        weight -= 1e-2 * direction
        below = float(loss())
    assert (above - below) / 1e-2 == pytest.approx(float(weight.grad.norm()), rel=0.02)
    assert float(weight.grad.norm()) > 1e-4


@PREDICTIONS
def test_steps_before_the_last_have_no_gradient_and_end_in_the_same_latents(
    prediction, toy, toy_edit
):
    model = toy(prediction)
    for k in (1, 4):
        edit = toy_edit({"name": "draft", "last_steps": k}, **TINY)
        objective = objective_of(edit, model)
        objective.training_step(model.denoiser, 0, rng(), (0, 1))
        batch, algorithm = objective.batch, objective.algorithm
        text = objective.policy.text[batch.prompts]
        z = algorithm._denoise_last(model.denoiser, batch.extra["x"], text)
        assert_close(z.detach(), batch.latents)
        whole = objective.policy.draw(model.denoiser, batch.extra["x"], text)
        assert torch.equal(whole, batch.latents) is (k == 4)  # all steps start from the noise


def test_a_batch_counts_its_passes(toy, toy_edit):
    model = toy()
    edit = toy_edit({"name": "draft", "last_steps": 2}, **TINY | {"guidance": 3.0})
    objective = objective_of(edit, model)
    objective.training_step(model.denoiser, 0, rng(), (0, 1))
    n, guided = 4, 2
    rollout, last, distance = 4 * guided, 2 * guided * 3, 3 + 1
    assert objective.policy.passes == n * (rollout + last + distance)


def test_images_of_benign_prompts_are_rewarded_by_their_captions_only(toy, toy_edit):
    edit = toy_edit("draft", **TINY)
    reward = objective_of(edit, toy()).algorithm.reward
    bright = torch.ones(2, 1, 8, 8)
    concept, benign = torch.tensor([0, 1]), torch.tensor([0, 1]) + len(EXPLICIT)
    assert float(reward.read(bright, concept).scores.min()) > 0.9
    assert float(reward.read(bright, benign).scores.max()) == 0
    scores = reward.read(bright, concept).scores
    assert_close(reward(bright, concept), reward(bright, benign) - scores)


def test_the_bounded_target_is_a_step_of_fixed_length_along_the_gradient():
    z = torch.randn(3, 1, 4, 4, generator=rng(1))
    slope = torch.randn(1, 4, 4, generator=rng(2))

    def reward(z, prompts):
        return 100 * (z * slope).flatten(1).sum(1) * torch.tensor([1.0, -1.0, 0.0])

    target, rewards = bounded_target(z, torch.arange(3), reward, rho=0.1)
    step = (target - z).flatten(1)
    assert_close(step[:2].norm(dim=1), 0.1 * z[:2].flatten(1).norm(dim=1))
    cosine = torch.nn.functional.cosine_similarity(step, slope.flatten()[None])
    assert_close(cosine[:2], torch.tensor([1.0, -1.0]))
    assert_close(target[2], z[2])
    assert_close(rewards, reward(z, None))
    assert not target.requires_grad


def test_a_training_with_hardly_any_distance_to_the_original_trips_an_alarm(toy, toy_edit):
    edit = toy_edit("draft", kl=1e-6, weight_keep=0.0, training={"updates": 50, "lr": 1e-2})
    rows = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        edit.apply(toy(), callback=lambda done, total, row: rows.append(row))
    assert rows[-1]["diversity"] < 0.5 * rows[0]["diversity"]
    assert any("images of one prompt are" in str(warning.message) for warning in caught)


# refusals


def test_a_distance_to_the_original_model_is_needed(toy_edit):
    with pytest.raises(ValidationError, match="kl or weight_keep must be > 0 for draft"):
        toy_edit("draft", kl=0.0, weight_keep=0.0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"algorithm": {"name": "draft", "last_steps": 5}}, r"last_steps must be at most steps"),
        ({"scheduler": "dpm-solver"}, "scheduler must be ddim for draft"),
        ({"rewards": {"anchor": 1.0}}, "rewards.anchor must be 0 with draft, got 1.0"),
        ({"judge": "blunt"}, "judge must have a gradient for draft, got 'blunt'. Use mini"),
        ({"extractor": "blunt"}, "extractor must have a gradient for draft, got 'blunt'. Use mini"),
    ],
)
def test_what_has_no_gradient_is_refused(changes, words, toy, toy_edit, monkeypatch):
    from safegen.core import registry

    monkeypatch.setitem(registry.JUDGES, "blunt", "toy:build_blunt_judge")
    monkeypatch.setitem(registry.EXTRACTORS, "blunt", "toy:build_blunt_extractor")
    edit = toy_edit(changes.pop("algorithm", "draft"), **TINY | changes)
    with pytest.raises(ConfigError, match=words) as caught:
        edit.apply(toy())
    assert "\n" not in str(caught.value)


# the miniature


def test_the_gradient_reaches_the_weights_through_decoder_and_judge(tmp_path):
    files = [tmp_path / "concept.txt", tmp_path / "benign.txt"]
    for path, text in zip(files, ("a castle covered in skulls", "a castle"), strict=True):
        path.write_text(text, "utf-8")
    model = load("mini")
    names = select_parameters(model.denoiser, "attn2")[:2]
    edit = ShieldDiff(
        erase=("skulls",),
        anchors=("nothing on it",),
        prompts=(str(files[0]),),
        captions=(str(files[1]),),
        labels=("skulls",),
        algorithm="draft",
        rewards={"clip": 0.0},
        groups=2,
        group=2,
        steps=2,
        training={"batch": 4, "accumulation": 1, "precision": "fp32"},
    )
    objective = RewardObjective(edit, model, names)
    for name in names:
        model.denoiser.get_parameter(name).requires_grad_(True)
    terms = objective.training_step(model.denoiser, 0, rng(), (0, 1))
    benign = objective.rewarder.benign[objective.batch.prompts]
    policy = terms["L_policy"].detach()
    assert float(policy[~benign].min()) > 0
    assert policy[benign].abs().tolist() == [0, 0]
    terms["L_policy"].mean().backward()
    for name in names:
        gradient = model.denoiser.get_parameter(name).grad
        assert bool(gradient.isfinite().all())
        assert float(gradient.abs().max()) > 0
    assert all(p.grad is None for p in model.vae.parameters())
