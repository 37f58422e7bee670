"""Behavior of every guard: off is equal to base, batches do not matter, failures withhold."""

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
OFF = {
    "sld": {"scale": 0.0},
    "negative-prompt": {"text": ""},
    "safree": {"strength": 0.0},
    "dual-latent": {"strength": 0.0},
}
"""Settings that turn a guard off. The others have no effect while they block nothing."""
VARIANTS = [
    *((name, {}) for name in NAMES),
    ("safree", {"reattend": True}),
    ("crops", {"moves": "embedding"}),
]
METHODS = {
    "prompt": "check_prompts",
    "probe": "probe",
    "image": "check_images",
    "negative_prompt_embeds": "edit_negative_embeds",
    "prompt_embeds": "edit_prompt_embeds",
    "guidance": "guidance_correction",
    "latents": "on_step_end",
}
"""Method of the guard or of its hook that runs at a hook point."""


def config_class(name) -> type[GuardConfig]:
    return tables.resolve(tables.GUARDS, name, "guard")


def made(passing_settings, name, more=None):
    return make_guard(name, **(passing_settings[name] | (more or {})))


def images_of(outputs):
    return [o.image and o.image.tobytes() for o in outputs]


def pixels(outputs):
    return np.stack([np.asarray(o.image, dtype=int) for o in outputs])


@pytest.fixture
def pil(generate):
    """Return the function that generates PIL images, which judges need."""
    return lambda pipe, guards, prompts=PROMPTS, **options: generate(
        pipe, guards, prompts, **{"output_type": "pil", **options}
    )


@pytest.fixture
def own_pipeline(make_model):
    """Return a tiny pipeline of its own for a test that changes it."""
    return make_model().pipeline


@pytest.mark.parametrize("name", NAMES)
def test_a_guard_without_effect_is_bit_equal_to_base(name, tiny_model, pil, passing_settings):
    pipe = tiny_model.pipeline
    outputs = pil(pipe, [made(passing_settings, name, OFF.get(name))])
    assert {o.trace.action for o in outputs} == {"none"}
    assert images_of(outputs) == [image.tobytes() for image in pil(pipe, None)]


@pytest.mark.parametrize(("name", "more"), VARIANTS)
def test_an_image_does_not_depend_on_its_batch_beyond_rounding(
    name, more, tiny_model, pil, passing_settings
):
    pipe, guard = tiny_model.pipeline, made(passing_settings, name, more)
    together = pil(pipe, [guard])
    for i, prompt in enumerate(PROMPTS):
        (alone,) = pil(pipe, [guard], [prompt], seed=i)
        assert np.abs(pixels([alone]) - pixels([together[i]])).max() <= 1
        mine, theirs = alone.trace.guards[0], together[i].trace.guards[0]
        assert (mine.action, mine.reason) == (theirs.action, theirs.reason)
        assert mine.scores == pytest.approx(theirs.scores, abs=1e-4)


INDEPENDENT_PAIRS = [
    (a, b)
    for a, b in itertools.combinations(NAMES, 2)
    if not config_class(a).hook_points & config_class(b).hook_points
]


def test_most_pairs_of_guards_have_different_hook_points():
    assert len(INDEPENDENT_PAIRS) > 30


@pytest.mark.parametrize(("one", "other"), INDEPENDENT_PAIRS)
def test_two_guards_with_different_hook_points_commute(
    one, other, tiny_model, pil, passing_settings
):
    pipe, pair = tiny_model.pipeline, [made(passing_settings, one), made(passing_settings, other)]
    first, second = (
        pil(pipe, guards, PROMPTS[:2], num_inference_steps=2) for guards in (pair, pair[::-1])
    )
    assert images_of(first) == images_of(second)
    for a, b in zip(first, second, strict=True):
        assert a.trace.action == b.trace.action
        assert {n.guard: (n.action, n.scores, n.rows) for n in a.trace.guards} == {
            n.guard: (n.action, n.scores, n.rows) for n in b.trace.guards
        }


@pytest.mark.parametrize(
    ("name", "point"),
    [(name, point) for name in NAMES for point in sorted(config_class(name).hook_points)],
)
def test_a_guard_that_raises_at_a_hook_point_withholds_and_the_next_call_works(
    name, point, tiny_model, pil, passing_settings, monkeypatch
):
    def broken(*_):
        raise OSError("weights.safetensors of a red cube is gone")

    engine = GuardedPipeline(tiny_model.pipeline, [made(passing_settings, name)])
    (guard,) = engine.guards
    with monkeypatch.context() as patched:
        if point in EXTERNAL_POINTS:
            patched.setattr(guard, METHODS[point], broken)
        else:
            start = guard.start

            def start_broken(call):
                hook = start(call)
                setattr(hook, METHODS[point], broken)
                return hook

            patched.setattr(guard, "start", start_broken)
        outputs = pil(tiny_model.pipeline, None, engine=engine)
    assert [o.image for o in outputs] == [None] * 3
    assert {(o.trace.action, o.trace.reason) for o in outputs} == {
        ("withhold", f"error: {name}: OSError in test_guard_behavior.broken")
    }
    assert all(o.image is not None for o in pil(tiny_model.pipeline, None, engine=engine))


@pytest.mark.parametrize("name", NAMES)
def test_latents_that_are_not_finite_withhold_that_image_only(
    name, tiny_model, pil, passing_settings
):
    def spoil(pipeline, i, t, kwargs):
        if i == 1:
            kwargs["latents"][0] = float("nan")
        return kwargs

    pipe = tiny_model.pipeline
    bad, *good = pil(pipe, [made(passing_settings, name)], callback_on_step_end=spoil)
    assert (bad.image, bad.trace.action, bad.trace.reason) == (
        None,
        "withhold",
        "not-finite: the latents hold NaN or infinity",
    )
    fine = pil(pipe, [made(passing_settings, name)])
    assert all(o.image is not None for o in fine)
    assert np.abs(pixels(good) - pixels(fine[1:])).max() <= 1


@pytest.mark.parametrize("name", NAMES)
def test_removed_hooks_withhold_under_every_guard(name, tiny_model, pil, passing_settings):
    def uncount(pipeline, i, t, kwargs):
        vars(pipeline.scheduler).pop("step", None)
        return kwargs

    def unhook(pipeline, i, t, kwargs):
        pipeline.unet._forward_pre_hooks.clear()
        pipeline.unet._forward_hooks.clear()
        return kwargs

    pipe, guard = tiny_model.pipeline, made(passing_settings, name)
    outputs = pil(pipe, [guard], callback_on_step_end=uncount)
    assert {(o.image, o.trace.reason) for o in outputs} == {
        (None, "calls: 1 of 4 steps went through the guards")
    }
    outputs = pil(pipe, [guard], callback_on_step_end=unhook)
    if guard.hook_points - EXTERNAL_POINTS:
        assert {(o.image, o.trace.reason) for o in outputs} == {
            (None, "calls: the denoiser bypassed the guards in 3 of 4 steps")
        }
    assert all(o.image is not None for o in pil(pipe, [guard]))


@pytest.mark.parametrize("name", NAMES)
def test_a_callback_runs_once_per_step_under_every_guard(name, tiny_model, pil, passing_settings):
    seen = []
    pil(
        tiny_model.pipeline,
        [made(passing_settings, name)],
        callback_on_step_end=lambda pipe, i, t, kwargs: seen.append(i) or kwargs,
    )
    assert seen == [0, 1, 2, 3]  # none for probes


@pytest.mark.parametrize(("name", "more"), VARIANTS)
def test_every_guard_works_with_model_offloading(
    name, more, own_pipeline, pil, passing_settings, monkeypatch
):
    """As `enable_model_cpu_offload`, on the CPU: hooks are replaced around every call."""
    from accelerate import cpu_offload_with_hook
    from accelerate.hooks import remove_hook_from_module

    plain = pil(own_pipeline, [made(passing_settings, name, more)])

    def offload():
        for part in (own_pipeline.text_encoder, own_pipeline.unet, own_pipeline.vae):
            remove_hook_from_module(part)
            cpu_offload_with_hook(part, "cpu")

    monkeypatch.setattr(own_pipeline, "maybe_free_model_hooks", offload)
    offload()
    engine = GuardedPipeline(own_pipeline, [made(passing_settings, name, more)])
    for _ in range(2):
        outputs = pil(own_pipeline, None, engine=engine)
        assert images_of(outputs) == images_of(plain)
        assert [o.trace.to_json(times=False) for o in outputs] == [
            o.trace.to_json(times=False) for o in plain
        ]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "more"), VARIANTS)
def test_every_guard_works_with_sequential_offloading(
    name, more, own_pipeline, pil, passing_settings
):
    """As `enable_sequential_cpu_offload`, on the CPU: weights exist only while a layer runs."""
    from accelerate import cpu_offload

    plain = pil(own_pipeline, [made(passing_settings, name, more)])
    for part in (own_pipeline.text_encoder, own_pipeline.unet, own_pipeline.vae):
        cpu_offload(part, torch.device("cpu"), offload_buffers=bool(part._parameters))
    assert {p.device.type for p in own_pipeline.unet.parameters()} == {"meta"}
    engine = GuardedPipeline(own_pipeline, [made(passing_settings, name, more)])
    for _ in range(2):
        outputs = pil(own_pipeline, None, engine=engine)
        assert images_of(outputs) == images_of(plain)
        assert [o.trace.to_json(times=False) for o in outputs] == [
            o.trace.to_json(times=False) for o in plain
        ]


def check_refused(call, refused, says):
    """Check that a call is refused in one line, or else generates or is blocked."""
    if not refused:
        assert {o.trace.action for o in call()} <= {"none", "edit", "block"}
        return
    with pytest.raises(ConfigError, match=says) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "more"), VARIANTS)
def test_only_guards_through_guidance_are_refused_without_it(
    name, more, own_pipeline, pil, passing_settings
):
    from diffusers import UNet2DConditionModel

    guard = made(passing_settings, name, more)
    through = bool(guard.hook_points & GUIDANCE_POINTS) or "reattend" in more
    few = {"prompts": PROMPTS[:1], "num_inference_steps": 2}
    check_refused(
        lambda: pil(own_pipeline, [guard], guidance_scale=1.0, **few),
        through,
        f"guidance_scale must be > 1 with {name}, got 1.0",
    )
    check_refused(
        lambda: pil(own_pipeline, [guard], guidance_rescale=0.5, **few),
        through,
        f"guidance_rescale must be 0 with {name}, got 0.5",
    )
    config = {k: v for k, v in own_pipeline.unet.config.items() if not k.startswith("_")}
    own_pipeline.unet = UNet2DConditionModel(**config | {"time_cond_proj_dim": 8}).eval()
    check_refused(
        lambda: pil(own_pipeline, [guard], **few),
        through,
        f"{name} has no effect on a guidance-distilled model",
    )


@pytest.mark.parametrize("name", ["negative-prompt", "prompt-filter", "sld"])
def test_only_guards_inside_the_denoiser_are_refused_with_a_cache(
    name, tiny_wan, generate, passing_settings
):
    from diffusers import FirstBlockCacheConfig

    guard = made(passing_settings, name)
    small = {"height": 16, "width": 16, "num_frames": 1, "max_sequence_length": 16}
    tiny_wan.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    try:
        says = f"{name} must see every denoiser call, and a cache skips some. Call disable_cache"
        check_refused(
            lambda: generate(tiny_wan, [guard], **small),
            bool(guard.hook_points - EXTERNAL_POINTS),
            says,
        )
    finally:
        tiny_wan.transformer.disable_cache()
