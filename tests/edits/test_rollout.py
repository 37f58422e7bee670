"""Rollouts: latents, timesteps, the scheduler and autocast."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, PNDMScheduler
from torch.testing import assert_close

from safegen.core.errors import ConfigError
from safegen.edits.functional.rollout import Rollout, frozen_predictor
from safegen.models.families.denoisers import predict


@pytest.fixture(scope="module")
def rollout(tiny_model):
    return Rollout(tiny_model, steps=5, guidance=3.0)


@pytest.fixture(scope="module")
def start(rollout):
    return rollout.noise(2, torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def text(tiny_model):
    return tiny_model.encode_text(["a red cube", "a blue ball"])


def test_no_step_gives_pure_noise_and_the_first_timestep(rollout, start, text, tiny_model):
    """SDD as released denoises fully here."""
    assert torch.equal(
        rollout.sample_until(0, start, text, frozen_predictor(tiny_model.denoiser)), start
    )
    assert int(rollout.timesteps[0]) == max(rollout.timesteps.tolist())


def test_all_steps_give_the_latents_of_the_pipeline(rollout, start, text, tiny_model):
    made = tiny_model.pipeline(
        prompt=["a red cube", "a blue ball"],
        latents=start.clone(),
        num_inference_steps=5,
        guidance_scale=3.0,
        output_type="latent",
    ).images
    assert_close(
        rollout.sample_until(5, start, text, frozen_predictor(tiny_model.denoiser)),
        made,
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize(
    ("name", "kind"),
    [("pndm", PNDMScheduler), ("dpm-solver", DPMSolverMultistepScheduler), ("ddim", DDIMScheduler)],
)
def test_latents_of_every_step_are_those_of_a_pipeline_with_that_scheduler(
    make_model, start, text, name, kind
):
    """Released ESD stops a PNDM pipeline early; its 51 timesteps hold the second one twice."""
    model, steps = make_model(), 6
    predict = frozen_predictor(model.denoiser)
    rollout = Rollout(
        model, steps=steps, guidance=3.0, scheduler=name, negative_prompt="a green cone"
    )
    skip = {"skip_prk_steps": True} if name == "pndm" else {}
    model.pipeline.scheduler = kind.from_config(model.pipeline.scheduler.config, **skip)
    latents, timesteps = [start], []

    def collect(pipeline, i, t, values):
        latents.append(values["latents"].clone())
        timesteps.append(int(t))
        return {}

    model.pipeline(
        prompt=["a red cube", "a blue ball"],
        negative_prompt=["a green cone"] * 2,
        latents=start.clone(),
        num_inference_steps=steps,
        guidance_scale=3.0,
        output_type="latent",
        callback_on_step_end=collect,
    )
    assert rollout.timesteps.tolist() == timesteps
    assert len(timesteps) == steps + (name == "pndm")
    rows = rollout.trajectory(start, text, predict, {})
    for stop, x in enumerate(latents):
        assert_close(rollout.sample_until(stop, start, text, predict), x, rtol=1e-4, atol=1e-4)
        if stop < len(timesteps):
            assert_close(rows["x"][:, stop], x, rtol=1e-4, atol=1e-4)


def test_a_trajectory_holds_latents_and_predictions_of_every_timestep(
    rollout, start, text, tiny_model
):
    other = tiny_model.encode_text(["a green cone"] * 2)
    net = tiny_model.denoiser
    rows = rollout.trajectory(start, text, frozen_predictor(net), {"other": other})
    assert {name: tuple(value.shape) for name, value in rows.items()} == dict.fromkeys(
        ("x", "text", "blank", "other"), (2, 5, 4, 8, 8)
    )
    blank = tiny_model.encode_text([""] * 2)
    for i, t in enumerate(rollout.timesteps):
        x = rollout.sample_until(i, start, text, frozen_predictor(net))
        assert_close(rows["x"][:, i], x, rtol=1e-4, atol=1e-4)
        for name, words in (("text", text), ("blank", blank), ("other", other)):
            with torch.no_grad():
                assert_close(rows[name][:, i], predict(net, x, t, words), rtol=1e-4, atol=1e-4)


def test_the_noise_is_removed_along_the_schedule(rollout, start, text, tiny_model):
    """With a network that predicts zero, the noise is scaled by the schedule."""
    silent = [
        rollout.sample_until(i, start, text, lambda x, t, text: torch.zeros_like(x))
        for i in range(6)
    ]
    abar = [float(tiny_model.pipeline.scheduler.alphas_cumprod[t]) for t in rollout.timesteps]
    for x, a in zip(silent, abar, strict=False):
        assert_close(x, start * (a / abar[0]) ** 0.5, rtol=1e-4, atol=1e-5)


def test_a_rollout_is_ddim_for_every_pipeline_scheduler(
    make_model, text, start, rollout, tiny_model
):
    model = make_model()
    model.pipeline.scheduler = PNDMScheduler.from_config(
        model.pipeline.scheduler.config, skip_prk_steps=True
    )
    other = Rollout(model, steps=5, guidance=3.0)
    assert isinstance(other.scheduler, DDIMScheduler)
    assert_close(
        other.sample_until(3, start, text, frozen_predictor(model.denoiser)),
        rollout.sample_until(3, start, text, frozen_predictor(tiny_model.denoiser)),
    )


def test_other_weights_are_used_for_one_call(tiny_model, start, text):
    net, t = tiny_model.denoiser, torch.tensor([100, 100])
    name = next(n for n, _ in net.named_parameters() if "attn2.to_v" in n)
    plain = frozen_predictor(net)(start, t, text)
    other = frozen_predictor(net, {name: torch.zeros_like(net.get_parameter(name))})(start, t, text)
    assert (plain - other).abs().max() > 1e-4
    assert torch.equal(frozen_predictor(net)(start, t, text), plain)


def test_a_frozen_prediction_under_autocast_keeps_later_gradients(make_model, start, text):
    """Autocast caches the cast of a weight; one made without a gradient must not be reused."""
    net = make_model().denoiser
    weight = next(p for n, p in net.named_parameters() if "attn2.to_v" in n).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        frozen_predictor(net)(start, torch.tensor([100, 100]), text)
        predict(net, start, torch.tensor([100, 100]), text).float().pow(2).mean().backward()
    assert weight.grad is not None
    assert weight.grad.norm() > 0


def test_more_steps_than_the_schedule_has_raise(make_model):
    with pytest.raises(ConfigError, match="steps must be <= 99 on this model's schedule, got 100"):
        Rollout(make_model(num_train_timesteps=100), steps=100, guidance=3.0)
