"""Calls of denoisers: those of the pipelines, with every input that they have."""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from diffusers import FluxPipeline
from torch import nn
from torch.testing import assert_close

from safegen.core.errors import ConfigError
from safegen.core.generation import GenerationConfig
from safegen.models.families.conditioning import Conditioning
from safegen.models.families.denoisers import (
    UNSCALED_TIMESTEPS,
    pack_latents,
    predict,
    unpack_latents,
)
from safegen.models.families.pipeline_specs import LENGTH_OPTION, call_defaults
from safegen.models.generation import autocast_for
from tests.tiny import FAMILIES, PROMPTS, build_model

tiny = lru_cache(build_model)
"""Models of this file's tests, which change none."""


def inputs_of(model, n=1):
    """Return noised latents, timesteps and conditioning of `n` samples."""
    x = torch.randn(n, *model.latent_shape, generator=torch.Generator().manual_seed(1))
    return x, model.noise_schedule.timesteps[[600] * n], model.encode_text(PROMPTS[:n])


def calls_of(model):
    """Return latents, timestep and prediction of each denoiser call of a guided generation."""
    calls, shape = [], (1, *model.latent_shape)

    def record(network, args, inputs, output):
        by_name = dict(zip(("sample", "timestep"), args, strict=False)) | inputs
        x, t, out = (
            by_name.get("sample", inputs.get("hidden_states")),
            by_name["timestep"],
            output[0],
        )
        if x.ndim == 3:
            x, out, t = unpack_latents(x, shape), unpack_latents(out, shape), 1000 * t
        calls.append((x.clone(), t.expand(len(x)).clone(), out.clone()))

    handle = model.denoiser.register_forward_hook(record, with_kwargs=True)
    start = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    packed = pack_latents(start) if type(model.pipeline).__name__ == "FluxPipeline" else start
    options = {"latents": packed, "num_inference_steps": 2, "output_type": "latent"}
    defaults = call_defaults(model.pipeline)
    options |= {k: defaults[k] for k in (LENGTH_OPTION,) if k in defaults}
    model.pipeline(PROMPTS[0], **options)
    handle.remove()
    return calls


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prediction_is_that_of_the_pipelines_own_call(family):
    """Guided calls have two rows: the negative prompt, then the prompt."""
    model = tiny(family)
    calls = calls_of(model)
    assert len(calls) == 2
    for x, t, want in calls:
        text = model.encode_text([PROMPTS[0]] if len(x) == 1 else ["", PROMPTS[0]])
        with torch.no_grad():
            assert_close(predict(model.denoiser, x, t, text), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_part_of_the_conditioning_reaches_the_network(family):
    """Token embeddings, pooled ones, `time_ids` of SDXL, `guidance` of FLUX."""
    model = tiny(family)
    x, t, text = inputs_of(model)
    others = {"hidden": replace(text, hidden=1.5 * text.hidden)}
    if text.pooled is not None:
        others["pooled"] = replace(text, pooled=1.5 * text.pooled)
    for name, value in text.added.items():
        others[name] = replace(text, added={**text.added, name: value + 8})
    has_pooled = {"hidden"} if family.startswith(("sd1", "sd2")) else {"hidden", "pooled"}
    more = {"sdxl": {"time_ids"}, "sdxl-v": {"time_ids"}, "flux": {"guidance"}}
    assert others.keys() == has_pooled | more.get(family, set())
    with torch.no_grad():
        plain = predict(model.denoiser, x, t, text)
        for name, other in others.items():
            assert (predict(model.denoiser, x, t, other) - plain).abs().max() > 1e-5, name
        assert (predict(model.denoiser, x, t - 100, text) - plain).abs().max() > 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_samples_of_a_batch_are_independent(family):
    model = tiny(family)
    x, t, text = inputs_of(model, 3)
    t = model.noise_schedule.timesteps[[10, 500, 900]]
    with torch.no_grad():
        together = predict(model.denoiser, x, t, text)
        for i in range(3):
            alone = predict(model.denoiser, x[[i]], t[[i]], text[[i]])
            assert_close(together[[i]], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["sdxl", "sd35", "flux"])
def test_weights_are_replaced_for_one_call_inside_a_wrapper_too(family):
    model = tiny(family)
    inputs = inputs_of(model)
    name = next(n for n, _ in model.denoiser.named_parameters() if n.endswith("to_v.weight"))
    zeros = {name: torch.zeros_like(model.denoiser.get_parameter(name))}
    with torch.no_grad():
        plain = predict(model.denoiser, *inputs)
        other = predict(model.denoiser, *inputs, zeros)
        assert (plain - other).abs().max() > 1e-6
        wrapped = nn.DataParallel(model.denoiser)
        assert torch.equal(predict(wrapped, *inputs, zeros), other)
        assert torch.equal(predict(wrapped, *inputs), plain)
        assert torch.equal(predict(model.denoiser, *inputs), plain)


def test_unpacked_latents_are_those_before_packing():
    x = torch.randn(2, 16, 6, 8, generator=torch.Generator().manual_seed(0))
    packed = pack_latents(x)
    assert torch.equal(packed, FluxPipeline._pack_latents(x, *x.shape))
    assert torch.equal(unpack_latents(packed, x.shape), x)
    assert UNSCALED_TIMESTEPS == 1000


def test_a_network_of_another_class_raises_one_line():
    text = Conditioning(torch.zeros(1, 2, 3))
    with pytest.raises(ConfigError, match=r"one of UNet2D.*, got Linear") as caught:
        predict(nn.Linear(1, 1), torch.zeros(1, 1, 2, 2), torch.zeros(1), text)
    assert "\n" not in str(caught.value)


def test_what_another_thread_hides_meanwhile_is_seen_afterwards():
    """A judge's thread ignores all warnings, as a reader of weights does, while a batch begins."""
    before = list(warnings.filters)
    with warnings.catch_warnings():
        generation = autocast_for(tiny("sd1"), GenerationConfig(precision="bf16"))
        with warnings.catch_warnings(action="ignore"):
            generation.__enter__()
        generation.__exit__(None, None, None)
        hidden = [entry[1] for entry in warnings.filters if entry not in before]
    assert all(message is not None for message in hidden)
