"""What is promised of every guard: doing nothing is the base, a batch changes nothing, faults show no picture and the next call draws."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from safegen.core import registry as tables
from safegen.core.errors import ConfigError
from safegen.guards import GuardConfig, make_guard
from safegen.guards.core.adapter import EXTERNAL_POINTS, GUIDANCE_POINTS
from safegen.guards.core.pipeline import GuardedPipeline

NAMES = sorted(tables.GUARDS)
PROMPTS = ("a red cube on a white table", "a blue ball in the grass", "a green cone under a tree")
IDLE = {
    "sld": {"scale": 0.0},
    "negative-prompt": {"text": ""},
    "safree": {"strength": 0.0},
    "dual-latent": {"strength": 0.0},
}
"""Settings under which a guard of no strength does nothing.

The others do nothing where they stop nothing.
"""
VARIANTS = [
    *((name, {}) for name in NAMES),
    ("safree", {"reattend": True}),
    ("crops", {"moves": "embedding"}),
]
PLACES = {
    "prompt": "check_prompts",
    "probe": "probe",
    "image": "check_images",
    "negative_prompt_embeds": "edit_negative_embeds",
    "prompt_embeds": "edit_prompt_embeds",
    "guidance": "guidance_correction",
    "latents": "on_step_end",
}
"""Where a guard of a seam is asked: the method of it, or of its turn."""


def kind(name) -> type[GuardConfig]:
    return tables.resolve(tables.GUARDS, name, "guard")


def made(quiet, name, more=None):
    return make_guard(name, **(quiet[name] | (more or {})))


def pictures(drawn):
    return [d.image and d.image.tobytes() for d in drawn]


def pixels(drawn):
    return np.stack([np.asarray(d.image, dtype=int) for d in drawn])


@pytest.fixture
def pil(generate):
    """Return the drawing function for pictures that judges can look at."""
    return lambda pipe, guards, prompts=PROMPTS, **options: generate(
        pipe, guards, prompts, **{"output_type": "pil", **options}
    )


@pytest.fixture
def own(make_model):
    """Return the tiny pipeline, to be changed."""
    return make_model().pipeline


@pytest.mark.parametrize("name", NAMES)
def test_a_guard_that_does_nothing_is_the_base_bit_for_bit(name, tiny_model, pil, quiet):
    pipe = tiny_model.pipeline
    found = pil(pipe, [made(quiet, name, IDLE.get(name))])
    assert {d.trace.action for d in found} == {"none"}
    assert pictures(found) == [image.tobytes() for image in pil(pipe, None)]


@pytest.mark.parametrize(("name", "more"), VARIANTS)
def test_a_picture_does_not_depend_on_its_batch_beyond_rounding(name, more, tiny_model, pil, quiet):
    pipe, guard = tiny_model.pipeline, made(quiet, name, more)
    together = pil(pipe, [guard])
    for i, prompt in enumerate(PROMPTS):
        (alone,) = pil(pipe, [guard], [prompt], seed=i)
        assert np.abs(pixels([alone]) - pixels([together[i]])).max() <= 1
        mine, theirs = alone.trace.guards[0], together[i].trace.guards[0]
        assert (mine.action, mine.reason) == (theirs.action, theirs.reason)
        assert mine.scores == pytest.approx(theirs.scores, abs=1e-4)


APART = [
    (a, b)
    for a, b in itertools.combinations(NAMES, 2)
    if not kind(a).hook_points & kind(b).hook_points
]


def test_most_pairs_of_guards_touch_different_seams():
    assert len(APART) > 30


@pytest.mark.parametrize(("one", "other"), APART)
def test_two_guards_that_touch_different_seams_commute(one, other, tiny_model, pil, quiet):
    pipe, pair = tiny_model.pipeline, [made(quiet, one), made(quiet, other)]
    here, there = (
        pil(pipe, guards, PROMPTS[:2], num_inference_steps=2) for guards in (pair, pair[::-1])
    )
    assert pictures(here) == pictures(there)
    for a, b in zip(here, there, strict=True):
        assert a.trace.action == b.trace.action
        assert {n.guard: (n.action, n.scores, n.rows) for n in a.trace.guards} == {
            n.guard: (n.action, n.scores, n.rows) for n in b.trace.guards
        }


@pytest.mark.parametrize(
    ("name", "seam"), [(name, seam) for name in NAMES for seam in sorted(kind(name).hook_points)]
)
def test_a_guard_that_raises_at_any_of_its_seams_withholds_all_and_the_next_call_draws(
    name, seam, tiny_model, pil, quiet, monkeypatch
):
    def broken(*_):
        raise OSError("weights.safetensors is gone")

    engine = GuardedPipeline(tiny_model.pipeline, [made(quiet, name)])
    (ready,) = engine.guards
    with monkeypatch.context() as patched:
        if seam in EXTERNAL_POINTS:
            patched.setattr(ready, PLACES[seam], broken)
        else:
            begin = ready.start

            def begun(call):
                turn = begin(call)
                setattr(turn, PLACES[seam], broken)
                return turn

            patched.setattr(ready, "start", begun)
        found = pil(tiny_model.pipeline, None, engine=engine)
    assert [d.image for d in found] == [None] * 3
    assert {(d.trace.action, d.trace.reason) for d in found} == {
        ("withhold", f"error: {name}: OSError: weights.safetensors is gone")
    }
    assert all(d.image is not None for d in pil(tiny_model.pipeline, None, engine=engine))


@pytest.mark.parametrize("name", NAMES)
def test_latents_that_are_not_finite_cost_that_picture_alone_under_every_guard(
    name, tiny_model, pil, quiet
):
    def spoil(pipeline, i, t, kwargs):
        if i == 1:
            kwargs["latents"][0] = float("nan")
        return kwargs

    pipe = tiny_model.pipeline
    bad, *good = pil(pipe, [made(quiet, name)], callback_on_step_end=spoil)
    assert (bad.image, bad.trace.action, bad.trace.reason) == (
        None,
        "withhold",
        "not-finite: the latents hold NaN or infinity",
    )
    fine = pil(pipe, [made(quiet, name)])
    assert all(d.image is not None for d in fine)
    assert np.abs(pixels(good) - pixels(fine[1:])).max() <= 1


@pytest.mark.parametrize("name", NAMES)
def test_what_is_removed_behind_our_back_withholds_under_every_guard(name, tiny_model, pil, quiet):
    def uncount(pipeline, i, t, kwargs):
        vars(pipeline.scheduler).pop("step", None)
        return kwargs

    def unhook(pipeline, i, t, kwargs):
        pipeline.unet._forward_pre_hooks.clear()
        pipeline.unet._forward_hooks.clear()
        return kwargs

    pipe, guard = tiny_model.pipeline, made(quiet, name)
    found = pil(pipe, [guard], callback_on_step_end=uncount)
    assert {(d.image, d.trace.reason) for d in found} == {
        (None, "calls: 1 of 4 steps went through the guards")
    }
    found = pil(pipe, [guard], callback_on_step_end=unhook)
    if guard.hook_points - EXTERNAL_POINTS:
        assert {(d.image, d.trace.reason) for d in found} == {
            (None, "calls: the denoiser bypassed the guards in 3 of 4 steps")
        }
    assert all(d.image is not None for d in pil(pipe, [guard]))


@pytest.mark.parametrize("name", NAMES)
def test_a_users_callback_runs_once_a_step_under_every_guard(name, tiny_model, pil, quiet):
    seen = []
    pil(
        tiny_model.pipeline,
        [made(quiet, name)],
        callback_on_step_end=lambda pipe, i, t, kwargs: seen.append(i) or kwargs,
    )
    assert seen == [0, 1, 2, 3]  # and not for probes


@pytest.mark.parametrize(("name", "more"), VARIANTS)
def test_every_guard_stays_through_model_offloading(name, more, own, pil, quiet, monkeypatch):
    """What `enable_model_cpu_offload` does, with the CPU in the accelerator's place: hooks come and go around every call."""
    from accelerate import cpu_offload_with_hook
    from accelerate.hooks import remove_hook_from_module

    plain = pil(own, [made(quiet, name, more)])

    def offload():
        for part in (own.text_encoder, own.unet, own.vae):
            remove_hook_from_module(part)
            cpu_offload_with_hook(part, "cpu")

    monkeypatch.setattr(own, "maybe_free_model_hooks", offload)
    offload()
    engine = GuardedPipeline(own, [made(quiet, name, more)])
    for _ in range(2):
        found = pil(own, None, engine=engine)
        assert pictures(found) == pictures(plain)
        assert [d.trace.to_json(times=False) for d in found] == [
            d.trace.to_json(times=False) for d in plain
        ]


@pytest.mark.parametrize(("name", "more"), VARIANTS)
def test_every_guard_stays_through_sequential_offloading(name, more, own, pil, quiet):
    """What `enable_sequential_cpu_offload` does, with the CPU in the accelerator's place: weights are nowhere but while a layer runs."""
    from accelerate import cpu_offload

    plain = pil(own, [made(quiet, name, more)])
    for part in (own.text_encoder, own.unet, own.vae):
        cpu_offload(part, torch.device("cpu"), offload_buffers=bool(part._parameters))
    assert {p.device.type for p in own.unet.parameters()} == {"meta"}
    engine = GuardedPipeline(own, [made(quiet, name, more)])
    for _ in range(2):
        found = pil(own, None, engine=engine)
        assert pictures(found) == pictures(plain)
        assert [d.trace.to_json(times=False) for d in found] == [
            d.trace.to_json(times=False) for d in plain
        ]


def refused_or_drawn(draw_it, refused, says):
    """Refuse in one line what would have no effect, and go through with what has: drawn, or stopped by its own rule, as pno may here."""
    if not refused:
        assert {d.trace.action for d in draw_it()} <= {"none", "edit", "block"}
        return
    with pytest.raises(ConfigError, match=says) as caught:
        draw_it()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "more"), VARIANTS)
def test_a_guard_that_acts_through_guidance_is_refused_without_it_and_any_other_draws(
    name, more, own, pil, quiet
):
    from diffusers import UNet2DConditionModel

    guard = made(quiet, name, more)
    through = bool(guard.hook_points & GUIDANCE_POINTS) or "reattend" in more
    few = {"prompts": PROMPTS[:1], "num_inference_steps": 2}
    refused_or_drawn(
        lambda: pil(own, [guard], guidance_scale=1.0, **few),
        through,
        f"guidance_scale must be > 1 with {name}, got 1.0",
    )
    refused_or_drawn(
        lambda: pil(own, [guard], guidance_rescale=0.5, **few),
        through,
        f"guidance_rescale must be 0 with {name}, got 0.5",
    )
    config = {k: v for k, v in own.unet.config.items() if not k.startswith("_")}
    own.unet = UNet2DConditionModel(**config | {"time_cond_proj_dim": 8}).eval()
    refused_or_drawn(
        lambda: pil(own, [guard], **few),
        through,
        f"{name} has no effect on a guidance-distilled model",
    )


@pytest.mark.parametrize("name", ["negative-prompt", "prompt-filter", "sld"])
def test_a_guard_inside_the_denoiser_is_refused_with_a_cache_and_any_other_draws(
    name, tiny_wan, generate, quiet
):
    from diffusers import FirstBlockCacheConfig

    guard = made(quiet, name)
    small = {"height": 16, "width": 16, "num_frames": 1, "max_sequence_length": 16}
    tiny_wan.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    try:
        says = f"{name} must see every denoiser call, and a cache skips some. Call disable_cache"
        refused_or_drawn(
            lambda: generate(tiny_wan, [guard], **small),
            bool(guard.hook_points - EXTERNAL_POINTS),
            says,
        )
    finally:
        tiny_wan.transformer.disable_cache()
