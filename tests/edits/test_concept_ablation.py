"""Concept ablation: losses, images and settings."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
from diffusers.models.attention_processor import AttnProcessor
from PIL import ImageOps
from torch.nn import functional as F
from torch.testing import assert_close

from safegen.core.concept import load_concept
from safegen.core.errors import ConfigError
from safegen.edits.concept_ablation import ConceptAblation, ConceptAblationObjective, Samples
from safegen.edits.functional.rollout import Rollout, frozen_predictor
from safegen.edits.training.config import Training
from safegen.edits.training.lora import trainable_parameters
from safegen.edits.training.samples import preprocess
from safegen.models.families.conditioning import Conditioning
from safegen.models.families.denoisers import predict
from safegen.models.selectors import select_parameters
from safegen.workflows.edit import make_edit

PLAIN = {
    name: value
    for name, value in ConceptAblation.PRESETS["mini"].items()
    if name not in ("target", "training")
}
"""The preset `mini`, with the released target."""
SHORT = PLAIN | {
    "erase": ("red cube", "ball"),
    "anchors": ("a tree", "grass"),
    "num_images": 4,
    "steps": 3,
}
PAPER = {"erase": ("red cube, ball",), "anchors": ("a tree", "grass"), "num_images": 5, "steps": 4}


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
    terms = objective.compare(net, Samples(z, eps, t, anchor), text)
    scheduler, before = model.pipeline.scheduler, make_model(prediction_type=prediction).denoiser
    with torch.no_grad():
        x = scheduler.add_noise(z, eps, t)
        plain = eps if prediction == "epsilon" else scheduler.get_velocity(z, eps, t)
        aim = predict(net, x, t, anchor)
        kept = (aim - plain).pow(2).mean((1, 2, 3))
        if target == "base":
            aim = predict(before, x, t, anchor)
            aim = aim - strength * (predict(before, x, t, text) - aim)
        l_c = (predict(net, x, t, text) - aim).pow(2).mean((1, 2, 3))
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
        aim = predict(net, x, t, anchor)
    want = torch.autograd.grad((predict(net, x, t, text) - aim).pow(2).mean(), weights)
    terms = objective.compare(net, Samples(z, eps, t, anchor), text)
    assert terms.keys() == {"L_c"}
    for a, b in zip(torch.autograd.grad(terms["L_c"].mean(), weights), want, strict=True):
        assert_close(a, b, rtol=1e-3, atol=1e-7)


def test_images_are_generated_by_the_original_model_of_each_anchor_in_turn(tiny_model):
    edit = ConceptAblation(**SHORT, training=training())
    objective = objective_of(edit, tiny_model)
    rollout = Rollout(tiny_model, steps=3, guidance=6.0)
    noise = rollout.noise(4, torch.Generator().manual_seed(0))
    texts = tiny_model.encode_text(["a tree", "grass", "a tree", "grass"])
    assert_close(
        objective.latents[0],
        rollout.sample_until(3, noise, texts, frozen_predictor(tiny_model.denoiser)),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.slow
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
    """The command for nudity of the released code, on its two machines.

    4e-6 x 4 images x 2 machines x 2 with prior preservation is 6.4e-5.
    """
    paper = make_edit("concept_ablation", "paper")
    assert (paper.target, paper.strength, paper.num_images, paper.weight_prior, paper.selector) == (
        "student",
        0.0,
        1000,
        1.0,
        "attention",
    )
    assert (paper.scheduler, paper.steps, paper.guidance) == ("dpm-solver", 25, 6.0)
    assert (paper.training.updates, paper.training.batch, paper.training.lr) == (400, 8, 6.4e-5)


class StartTokenProcessor(AttnProcessor):
    """Attention written out, in which row 0 of the text's keys and values is a constant."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **rest):
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = attn.to_q(hidden_states), attn.to_k(text), attn.to_v(text)
        if encoder_hidden_states is not None:
            first = (torch.arange(k.shape[1]) == 0)[:, None]
            k, v = (torch.where(first, rows.detach(), rows) for rows in (k, v))
        q, k, v = (rows.unflatten(2, (attn.heads, -1)).transpose(1, 2) for rows in (q, k, v))
        weights = (q @ k.transpose(2, 3) * attn.scale).softmax(-1)
        return attn.to_out[1](attn.to_out[0]((weights @ v).transpose(1, 2).flatten(2)))


def record_samples(monkeypatch):
    calls, compare = [], ConceptAblationObjective.compare

    def record(self, denoiser, *given):
        calls.append(given)
        return compare(self, denoiser, *given)

    monkeypatch.setattr(ConceptAblationObjective, "compare", record)
    return calls


@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_paper_preset_trains_as_the_released_code(make_model, monkeypatch, checkpointing):
    """The released training step restated, for 12 updates on the samples that ours drew.

    The mask has one channel and the error four: L_c is a mean over the mask only.
    """
    calls, model = record_samples(monkeypatch), make_model()
    changes = {"updates": 12, "batch": 3, "gradient_checkpointing": checkpointing}
    edit = ConceptAblation.preset("paper", **PAPER, training=changes)
    patch = edit.apply(model)
    net = make_model().denoiser.train()
    net.set_attn_processor(StartTokenProcessor())
    weights = {name: net.get_parameter(name) for name in select_parameters(net, "attention")}
    start = {name: weight.detach().clone() for name, weight in weights.items()}
    optimizer = torch.optim.AdamW(
        [weight.requires_grad_() for weight in weights.values()], lr=6.4e-5, weight_decay=1e-2
    )
    schedule = DDPMScheduler.from_config(model.pipeline.scheduler.config)
    assert len(calls) == 12
    for images, text, prior in calls:
        eps, t = torch.cat([images.eps, prior.eps]), torch.cat([images.t, prior.t])
        x = schedule.add_noise(torch.cat([images.z, prior.z]), eps, t)
        prediction = predict(net, x, t, Conditioning.concat([text, prior.anchor]))
        with torch.no_grad():
            target = predict(net, x[:3], t[:3], images.anchor)
        mask = torch.ones(3, 1, *x.shape[2:])
        error = ((prediction[:3] - target) ** 2 * mask).sum((1, 2, 3)) / mask.sum((1, 2, 3))
        (error.mean() + F.mse_loss(prediction[3:], eps[3:])).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert set(patch.tensors) == set(weights)
    gap = sum(float((patch.tensors[n] - w.detach()).norm() ** 2) for n, w in weights.items())
    change = sum(float((start[n] - w.detach()).norm() ** 2) for n, w in weights.items())
    assert change > 0
    assert (gap / change) ** 0.5 < 1e-4


def test_samples_of_the_paper_preset(make_model, monkeypatch):
    """Three texts with the caption, mirrored images, and samples of its own for the prior."""
    calls, model = record_samples(monkeypatch), make_model()
    edit = ConceptAblation.preset("paper", **PAPER, training={"updates": 8, "batch": 4})
    edit.apply(model)
    objective = objective_of(edit, make_model())
    captions = model.encode_text(["a tree", "grass"]).hidden
    texts = {
        (form, i): model.encode_text([form.format(caption)]).hidden[0]
        for i, caption in enumerate(["a tree", "grass"])
        for form in ("red cube, ball, {}", "in red cube, ball style, {}", "{}, red cube, ball")
    }
    seen, views = set(), set()
    for images, text, prior in calls:
        assert not torch.equal(images.eps, prior.eps)
        for i in range(4):
            caption = next(n for n in (0, 1) if torch.equal(captions[n], images.anchor.hidden[i]))
            (form,) = (key for key, value in texts.items() if torch.allclose(value, text.hidden[i]))
            assert form[1] == caption
            seen.add(form)
        for samples in (images, prior):
            for z, anchor in zip(samples.z, samples.anchor.hidden, strict=True):
                (view,) = (objective.latents == z).flatten(2).all(2).nonzero().tolist()
                views.add((samples is prior, view[0]))
                assert torch.equal(captions[view[1] % 2], anchor)
    assert seen == set(texts)
    assert views == {(False, 0), (False, 1), (True, 0), (True, 1)}
    assert any((images.t != prior.t).any() for images, _, prior in calls)
    assert any((images.z != prior.z).any() for images, _, prior in calls)


def test_images_of_the_paper_preset_are_those_of_the_pipeline(make_model):
    """DPM-Solver, guidance 6, the phrases as negative prompt; the second half is mirrored."""
    model = make_model()
    edit = ConceptAblation.preset("paper", **PAPER)
    latents = objective_of(edit, model).latents
    noise = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    model.pipeline.scheduler = DPMSolverMultistepScheduler.from_config(
        model.pipeline.scheduler.config
    )
    made = model.pipeline(
        prompt=["a tree", "grass", "a tree", "grass", "a tree"],
        negative_prompt=["red cube, ball"] * 5,
        latents=noise,
        num_inference_steps=4,
        guidance_scale=6.0,
        output_type="latent",
    ).images
    assert_close(latents[0], made, rtol=1e-3, atol=1e-3)
    images = [ImageOps.mirror(image) for image in model.decode_images(latents[0])]
    pixels = torch.stack([preprocess(image, model.size) for image in images])
    assert_close(latents[1], model.encode_images(pixels), rtol=1e-3, atol=1e-3)


def test_the_noise_target_is_the_noise_of_the_sample(make_model):
    model, net = make_model(), make_model().denoiser
    objective = objective_of(ConceptAblation(**SHORT, target="noise"), model)
    g = torch.Generator().manual_seed(0)
    z, eps = torch.randn(2, 2, 4, 8, 8, generator=g)
    t, text = torch.tensor([20, 600]), model.encode_text(["red cube", "ball"])
    terms = objective.compare(net, Samples(z, eps, t, model.encode_text(["grass"] * 2)), text)
    with torch.no_grad():
        prediction = predict(net, model.pipeline.scheduler.add_noise(z, eps, t), t, text)
    assert_close(
        terms["L_c"].detach(), (prediction - eps).pow(2).mean((1, 2, 3)), rtol=1e-4, atol=0
    )


def test_a_lora_gets_no_gradient_from_the_start_token(make_model):
    """A text of start tokens only leaves keys and values as they are."""
    model = make_model()
    edit = ConceptAblation.preset("paper", **PAPER, selector="kv2", rank=2, weight_prior=0.0)
    with trainable_parameters(model, "kv2", rank=2, alpha=None, seed=0) as trainable:
        factors = [model.denoiser.get_parameter(n).requires_grad_() for n in trainable.names]
        objective = ConceptAblationObjective(edit, model, trainable.names)
        z, eps = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        text = model.encode_text(["red cube"])
        samples = Samples(z, eps, torch.tensor([400]), model.encode_text(["a tree"]))
        norms = []
        for given in (text, text.replace_hidden(text.hidden[:, :1])):
            loss = objective.compare(model.denoiser, samples, given)["L_c"].sum()
            gradients = torch.autograd.grad(loss, factors)
            norms.append(sum(float(g.norm()) for g in gradients))
    assert norms[0] > 1e-6
    assert norms[1] == 0


REFUSED = {
    "erase and anchors must share no phrase, got 'b' in both": {
        "erase": ("a", "b"),
        "anchors": ("b",),
    },
    "phrases must not be blank": {"erase": ("",)},
    "anchors.0: phrases must not be blank": {"anchors": ("",)},
    "num_images": {"num_images": 0},
    "templates.0: a template must contain {phrase}, got 'a tree'": {"templates": ("a tree",)},
    "templates": {"templates": ()},
}


@pytest.mark.parametrize("words", sorted(REFUSED))
def test_an_invalid_setting_raises_one_line(words):
    with pytest.raises(ConfigError, match=words) as caught:
        make_edit("concept_ablation", **REFUSED[words])
    assert "\n" not in str(caught.value)


def test_missing_anchors_raise(tiny_model):
    with pytest.raises(ConfigError, match="concept_ablation needs anchors"):
        make_edit("concept_ablation", erase=("red cube",)).apply(tiny_model)
