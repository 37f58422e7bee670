"""Dual latent: its limits, when streams are mixed, and which prompts have two."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from safegen.core.errors import ConfigError
from safegen.guards import make_guard
from safegen.guards.core.pipeline import GuardedPipeline
from safegen.guards.dual_latent import mix_streams

DUAL = {"name": "dual-latent", "phrases": ["a red cube", "red"], "start": 0.0}
PROMPTS = ["a red cube on a white table", "a blue ball in the grass"]


def arrays(outputs):
    return np.stack([o.image for o in outputs])


def test_mix_streams_follows_then_interpolates():
    u, s = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    assert all(torch.equal(a, u) for a in mix_streams(u, s, strength=0.7, follow=True))
    for strength in (0.0, 0.25, 1.0):
        first, second = mix_streams(u, s, strength=strength, follow=False)
        assert torch.equal(second, s)
        assert torch.allclose(first, (1 - strength) * u + strength * s)


def test_zero_strength_is_bit_equal_to_base_without_a_reference_stream(tiny_model, generate):
    rows = []
    hook = tiny_model.denoiser.conv_in.register_forward_hook(
        lambda m, inputs, out: rows.append(len(inputs[0]))
    )
    outputs = generate(tiny_model.pipeline, [DUAL | {"strength": 0.0}], PROMPTS)
    hook.remove()
    assert set(rows) == {4}
    assert np.array_equal(arrays(outputs), generate(tiny_model.pipeline, None, PROMPTS))


def test_start_1_equals_base_and_strength_1_equals_safree(tiny_model, generate):
    base = generate(tiny_model.pipeline, None, PROMPTS)
    late = generate(tiny_model.pipeline, [DUAL | {"start": 1.0}], PROMPTS)
    assert np.abs(arrays(late) - base).max() < 2e-4
    assert [(o.trace.action, o.trace.guards[0].scores["steps"]) for o in late] == [
        ("none", 0.0)
    ] * 2
    full = arrays(generate(tiny_model.pipeline, [DUAL | {"strength": 1.0}], PROMPTS))
    safree = arrays(
        generate(tiny_model.pipeline, [{"name": "safree", "phrases": DUAL["phrases"]}], PROMPTS)
    )
    assert np.abs(full - base).max() > 1e-3
    assert np.abs(full - safree).max() < 2e-4  # the reference stream uses SAFREE's projection
    half = arrays(generate(tiny_model.pipeline, [DUAL], PROMPTS))
    assert np.abs(half - base).max() > 1e-4 < np.abs(half - full).max()


def test_only_prompts_beyond_the_gate_get_a_reference_stream(tiny_model, generate):
    seen = generate(tiny_model.pipeline, [DUAL], PROMPTS)
    near, far = sorted(range(2), key=lambda i: seen[i].trace.guards[0].scores["distance"])
    gate = sum(o.trace.guards[0].scores["distance"] for o in seen) / 2
    outputs = generate(tiny_model.pipeline, [DUAL | {"gate": gate}], PROMPTS)
    assert [outputs[i].trace.action for i in (near, far)] == ["none", "edit"]
    assert (
        np.abs(outputs[near].image - generate(tiny_model.pipeline, None, PROMPTS)[near]).max()
        < 2e-4
    )
    assert np.abs(outputs[far].image - seen[far].image).max() < 2e-4


def test_combines_with_a_negative_prompt(tiny_model, generate):
    both = generate(
        tiny_model.pipeline,
        [DUAL, {"name": "negative-prompt", "text": "a cone"}],
        PROMPTS,
        negative_prompt=["x", "y"],
    )
    assert [[n.action for n in o.trace.guards] for o in both] == [["edit", "edit"]] * 2


def test_refuses_several_images_per_prompt_and_schedulers_with_state(
    tiny_model, generate, monkeypatch
):
    from diffusers import PNDMScheduler

    with pytest.raises(
        ConfigError, match="num_images_per_prompt must be 1 with dual-latent, got 2"
    ):
        generate(tiny_model.pipeline, [DUAL], PROMPTS, num_images_per_prompt=2)
    monkeypatch.setattr(
        tiny_model.pipeline,
        "scheduler",
        PNDMScheduler.from_config(tiny_model.pipeline.scheduler.config),
    )
    with pytest.raises(ConfigError, match="'dual-latent', got PNDMScheduler"):
        GuardedPipeline(tiny_model.pipeline, [make_guard(**DUAL)])


def test_refuses_a_scheduler_with_state_at_call_time(tiny_model, generate, monkeypatch):
    from diffusers import DPMSolverMultistepScheduler

    engine = GuardedPipeline(tiny_model.pipeline, [make_guard(**DUAL)])
    monkeypatch.setattr(
        tiny_model.pipeline,
        "scheduler",
        DPMSolverMultistepScheduler.from_config(tiny_model.pipeline.scheduler.config),
    )
    with pytest.raises(ConfigError, match="'dual-latent', got DPMSolverMultistepScheduler"):
        generate(tiny_model.pipeline, engine=engine, prompts=PROMPTS)
