"""Callbacks of the user beside guards: those that replace the final latents withhold."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

SLD = {"name": "sld", "preset": "max", "text": "a red cube"}
SAFREE = {"name": "safree", "phrases": ["a red cube", "red"]}
CROPS = {"name": "crops", "judge": "mini", "threshold": 1.0, "probes": 1, "steps": 1}
JUDGE = {"name": "judge-filter", "judge": "mini", "threshold": 1.0}
LAST = 3
REASON = "calls: a callback replaced the latents after the last step"


def returns_other(when):
    def callback(pipe, step, timestep, tensors):
        return {"latents": torch.zeros_like(tensors["latents"])} if step == when else tensors

    return callback


def changes_in_place(when):
    def callback(pipe, step, timestep, tensors):
        if step == when:
            tensors["latents"][0] += 0.5
        return tensors

    return callback


class ReplacingCallback(PipelineCallback):
    """An official callback that replaces the latents in the step `cutoff_step_index`."""

    tensor_inputs = ("prompt_embeds",)

    def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
        assert list(callback_kwargs) == ["prompt_embeds"]
        if step_index != self.config.cutoff_step_index:
            return callback_kwargs
        return callback_kwargs | {"latents": torch.zeros(2, 4, 8, 8)}


def official(when):
    return ReplacingCallback(cutoff_step_ratio=None, cutoff_step_index=when)


def several(when):
    return MultiPipelineCallbacks([official(when)])


WAYS = {"other": returns_other, "in place": changes_in_place, "own": official, "many": several}


@pytest.fixture
def pil(tiny_model, generate):
    """Return the function that generates PIL images with guards."""
    return lambda guards, **more: generate(tiny_model.pipeline, guards, output_type="pil", **more)


@pytest.mark.parametrize("guard", [SLD, SAFREE, CROPS], ids=lambda guard: guard["name"])
@pytest.mark.parametrize("way", sorted(WAYS))
def test_latents_replaced_after_the_last_step_withhold(pil, way, guard):
    outputs = pil([guard], callback_on_step_end=WAYS[way](LAST))
    assert [(o.image, o.trace.reason) for o in outputs] == [(None, REASON)] * 2
    outputs = pil([guard], callback_on_step_end=WAYS[way](LAST - 1))  # one guarded step follows
    assert all(o.image is not None for o in outputs)


def test_a_deprecated_callback_that_changes_the_final_latents_withholds(pil):
    def callback(step, timestep, latents):
        if step == LAST:
            latents.zero_()

    with pytest.warns(FutureWarning, match="callback"):
        outputs = pil([SLD], callback=callback, callback_steps=1)
    assert [(o.image, o.trace.reason) for o in outputs] == [(None, REASON)] * 2


def test_a_judge_sees_the_image_of_replaced_latents(pil):
    """Its promise is about the image, however it was made."""
    outputs = pil([JUDGE], callback_on_step_end=returns_other(LAST))
    assert all(o.image is not None for o in outputs)


def test_a_callback_that_only_looks_changes_nothing(pil):
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append(float(tensors["latents"].mean()))
        return {}

    looked, plain = pil([SLD], callback_on_step_end=callback), pil([SLD])
    assert len(seen) == LAST + 1
    for one, other in zip(looked, plain, strict=True):
        assert np.array_equal(np.asarray(one.image), np.asarray(other.image))


def test_tensor_inputs_of_the_call_stay_beside_a_callback_with_such_an_attribute(pil):
    """Only diffusers' own callbacks replace those of the call."""
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append(sorted(tensors))
        return {}

    callback.tensor_inputs = ["latents"]
    inputs = ["prompt_embeds"]
    pil([SLD], callback_on_step_end=callback, callback_on_step_end_tensor_inputs=inputs)
    assert seen == [inputs] * (LAST + 1)


@pytest.mark.parametrize("family", ["sd", "xl"])
def test_guidance_rescaled_by_a_callback_withholds(tiny_model, tiny_xl, generate, family):
    def rescale(pipe, step, timestep, tensors):
        pipe._guidance_rescale = 1.0 if step == 1 else 0.0
        return {}

    pipe = tiny_model.pipeline if family == "sd" else tiny_xl
    outputs = generate(pipe, [SLD], callback_on_step_end=rescale)
    reason = "calls: guidance was off or rescaled in 1 of 4 steps, and a guard needs it"
    assert [(o.image, o.trace.reason) for o in outputs] == [(None, reason)] * 2
    assert all(o.image is not None for o in generate(pipe, [SAFREE], callback_on_step_end=rescale))
