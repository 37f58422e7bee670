"""Concept ablation: losses, images and settings."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from safegen.core.concept import load_concept
from safegen.core.errors import ConfigError
from safegen.edits.concept_ablation import ConceptAblation, ConceptAblationObjective
from safegen.edits.functional.rollout import DdimRollout, frozen_predictor
from safegen.edits.training.config import Training
from safegen.models.selectors import select_parameters
from safegen.workflows.edit import make_edit

SHORT = {"erase": ("red cube", "ball"), "anchors": ("a tree", "grass"), "num_images": 4, "steps": 3}


def training(**changes):
    return Training(
        **{"updates": 3, "batch": 2, "accumulation": 1, "lr": 1e-3, "ema": 0.0, "weight_decay": 0.0}
        | changes
    )


def objective_of(edit, model):
    return ConceptAblationObjective(edit, model, select_parameters(model.denoiser, "attention"))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("target", "strength"), [("student", 0.0), ("base", 0.0), ("base", 1.5)])
def test_losses_equal_plain_forward_passes(make_model, prediction, target, strength):
    model, net = (
        make_model(prediction_type=prediction),
        make_model(prediction_type=prediction).denoiser,
    )
    with torch.no_grad():
        for name in select_parameters(net, "attention"):
            net.get_parameter(name).mul_(1.3)
    objective = objective_of(ConceptAblation(**SHORT, target=target, strength=strength), model)
    g = torch.Generator().manual_seed(0)
    z, eps, t = (
        torch.randn(2, 4, 8, 8, generator=g),
        torch.randn(2, 4, 8, 8, generator=g),
        torch.tensor([20, 600]),
    )
    text, anchor = model.encode_text(["red cube", "ball"]), model.encode_text(["a tree", "grass"])
    terms = objective.compare(net, z, eps, t, text, anchor)
    scheduler, before = model.pipeline.scheduler, make_model(prediction_type=prediction).denoiser
    with torch.no_grad():
        x = scheduler.add_noise(z, eps, t)
        plain = eps if prediction == "epsilon" else scheduler.get_velocity(z, eps, t)
        aim = net(x, t, anchor).sample
        kept = (aim - plain).pow(2).mean((1, 2, 3))
        if target == "base":
            aim = before(x, t, anchor).sample
            aim = aim - strength * (before(x, t, text).sample - aim)
        l_c = (net(x, t, text).sample - aim).pow(2).mean((1, 2, 3))
    assert_close(terms["L_c"].detach(), l_c, rtol=1e-3, atol=1e-6)
    assert_close(terms["L_p"].detach(), kept, rtol=1e-3, atol=1e-6)


def test_the_target_gets_no_gradient(make_model):
    model, net = make_model(), make_model().denoiser
    weights = [net.get_parameter(n).requires_grad_() for n in select_parameters(net, "attention")]
    objective = objective_of(ConceptAblation(**SHORT, weight_prior=0.0), model)
    g = torch.Generator().manual_seed(0)
    z, eps, t = (
        torch.randn(2, 4, 8, 8, generator=g),
        torch.randn(2, 4, 8, 8, generator=g),
        torch.tensor([20, 600]),
    )
    text, anchor = model.encode_text(["red cube", "ball"]), model.encode_text(["a tree", "grass"])
    x = model.pipeline.scheduler.add_noise(z, eps, t)
    with torch.no_grad():
        aim = net(x, t, anchor).sample
    want = torch.autograd.grad((net(x, t, text).sample - aim).pow(2).mean(), weights)
    terms = objective.compare(net, z, eps, t, text, anchor)
    assert terms.keys() == {"L_c"}
    for a, b in zip(torch.autograd.grad(terms["L_c"].mean(), weights), want, strict=True):
        assert_close(a, b, rtol=1e-3, atol=1e-7)


def test_images_are_generated_by_the_original_model_of_each_anchor_in_turn(tiny_model):
    edit = ConceptAblation(**SHORT, training=training())
    objective = objective_of(edit, tiny_model)
    rollout = DdimRollout(tiny_model, steps=3, guidance=6.0)
    noise = rollout.noise(4, torch.Generator().manual_seed(0))
    texts = tiny_model.encode_text(["a tree", "grass", "a tree", "grass"])
    assert_close(
        objective.latents,
        rollout.sample_until(3, noise, texts, frozen_predictor(tiny_model.denoiser)),
        rtol=1e-4,
        atol=1e-4,
    )


def test_training_lowers_the_loss(make_model):
    log = []
    edit = ConceptAblation(
        **SHORT, target="base", weight_prior=0.0, training=training(updates=40, lr=3e-3, batch=4)
    )
    edit.apply(make_model(), callback=lambda done, of, row: log.append(row))
    assert sum(row["L_c"] for row in log[-5:]) < 0.7 * sum(row["L_c"] for row in log[:5])


def test_a_concept_provides_phrases_and_anchors():
    skulls, edit = load_concept("skulls"), make_edit("concept_ablation", concept="skulls")
    assert (edit.erase, edit.anchors) == (skulls.words, skulls.counterpart)


def test_the_paper_preset_has_the_published_values():
    paper = make_edit("concept_ablation", "paper")
    assert (paper.target, paper.strength, paper.num_images, paper.weight_prior, paper.selector) == (
        "student",
        0.0,
        1000,
        1.0,
        "attention",
    )
    assert (paper.training.updates, paper.training.batch, paper.training.lr) == (400, 8, 3.2e-5)


REFUSED = {
    "erase and anchors must share no phrase, got 'b' in both": {
        "erase": ("a", "b"),
        "anchors": ("b",),
    },
    "phrases must not be blank": {"erase": ("",)},
    "anchors.0: phrases must not be blank": {"anchors": ("",)},
    "num_images": {"num_images": 0},
}


@pytest.mark.parametrize("words", sorted(REFUSED))
def test_an_invalid_setting_raises_one_line(words):
    with pytest.raises(ConfigError, match=words) as caught:
        make_edit("concept_ablation", **REFUSED[words])
    assert "\n" not in str(caught.value)


def test_missing_anchors_raise(tiny_model):
    with pytest.raises(ConfigError, match="concept_ablation needs anchors"):
        make_edit("concept_ablation", erase=("red cube",)).apply(tiny_model)
