"""Partly denoised latents: they agree with their timestep, with the pipeline's own pictures, and leave no cast behind."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler
from torch.testing import assert_close

from safegen.core.errors import ConfigError
from safegen.edits.functional.rollout import DdimRollout, frozen_predictor


@pytest.fixture(scope="module")
def walk(tiny_model):
    return DdimRollout(tiny_model, steps=5, guidance=3.0)


@pytest.fixture(scope="module")
def start(walk):
    return walk.noise(2, torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def text(tiny_model):
    return tiny_model.encode_text(["a red cube", "a blue ball"])


def test_no_step_gives_pure_noise_and_the_first_timestep(walk, start, text, tiny_model):
    """SDD as released denoises fully here and pairs the picture with the noisiest timestep, one time in fifty."""
    assert torch.equal(walk.until(0, start, text, frozen_predictor(tiny_model.denoiser)), start)
    assert int(walk.timesteps[0]) == max(walk.timesteps.tolist())


def test_all_steps_give_the_pipelines_own_latents(walk, start, text, tiny_model):
    made = tiny_model.pipeline(
        prompt=["a red cube", "a blue ball"],
        latents=start.clone(),
        num_inference_steps=5,
        guidance_scale=3.0,
        output_type="latent",
    ).images
    assert_close(
        walk.until(5, start, text, frozen_predictor(tiny_model.denoiser)),
        made,
        rtol=1e-4,
        atol=1e-4,
    )


def test_a_record_holds_the_latents_of_every_timestep_and_what_is_said_there(
    walk, start, text, tiny_model
):
    other = tiny_model.encode_text(["a green cone"] * 2)
    net = tiny_model.denoiser
    rows = walk.record(start, text, frozen_predictor(net), {"other": other})
    assert {name: tuple(value.shape) for name, value in rows.items()} == dict.fromkeys(
        ("x", "text", "blank", "other"), (2, 5, 4, 8, 8)
    )
    blank = tiny_model.encode_text([""] * 2)
    for i, t in enumerate(walk.timesteps):
        x = walk.until(i, start, text, frozen_predictor(net))
        assert_close(rows["x"][:, i], x, rtol=1e-4, atol=1e-4)
        for name, words in (("text", text), ("blank", blank), ("other", other)):
            with torch.no_grad():
                assert_close(rows[name][:, i], net(x, t, words).sample, rtol=1e-4, atol=1e-4)


def test_the_noise_is_taken_out_along_the_schedule(walk, start, text, tiny_model):
    """The variance that a latent of timestep t keeps of its noise falls with each step, where the network says nothing."""
    silent = [walk.until(i, start, text, lambda x, t, text: torch.zeros_like(x)) for i in range(6)]
    abar = [float(tiny_model.alphas_cumprod()[t]) for t in walk.timesteps]
    for x, a in zip(silent, abar, strict=False):
        assert_close(x, start * (a / abar[0]) ** 0.5, rtol=1e-4, atol=1e-5)


def test_the_walk_is_ddim_whatever_the_pipelines_sampler(make_model, text, start, walk, tiny_model):
    model = make_model()
    model.pipeline.scheduler = PNDMScheduler.from_config(
        model.pipeline.scheduler.config, skip_prk_steps=True
    )
    other = DdimRollout(model, steps=5, guidance=3.0)
    assert isinstance(other.ddim, DDIMScheduler)
    assert_close(
        other.sample_until(3, start, text, frozen_predictor(model.denoiser)),
        walk.until(3, start, text, frozen_predictor(tiny_model.denoiser)),
    )


def test_other_values_are_used_for_the_call_alone(tiny_model, start, text):
    net, t = tiny_model.denoiser, torch.tensor([100, 100])
    name = next(n for n, _ in net.named_parameters() if "attn2.to_v" in n)
    plain = frozen_predictor(net)(start, t, text)
    other = frozen_predictor(net, {name: torch.zeros_like(net.get_parameter(name))})(start, t, text)
    assert (plain - other).abs().max() > 1e-4
    assert torch.equal(frozen_predictor(net)(start, t, text), plain)


def test_looking_under_autocast_leaves_the_gradient_of_what_follows(make_model, start, text):
    """Autocast keeps a weight's cast.

    One made without a gradient would be used again, and nothing would be learnt.
    """
    net = make_model().denoiser
    weight = next(p for n, p in net.named_parameters() if "attn2.to_v" in n).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        frozen_predictor(net)(start, torch.tensor([100, 100]), text)
        net(start, torch.tensor([100, 100]), text).sample.float().pow(2).mean().backward()
    assert weight.grad is not None
    assert weight.grad.norm() > 0


def test_more_steps_than_the_schedule_has_are_refused(make_model):
    with pytest.raises(
        ConfigError,
        match="steps must be <= 99 on this model's schedule, got 100",
    ):
        DdimRollout(make_model(num_train_timesteps=100), steps=100, guidance=3.0)
