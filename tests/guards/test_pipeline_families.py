"""Pipelines that extend a supported class, and pipelines that start from an image."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from PIL import Image

from safegen.core.errors import ConfigError
from safegen.core.registry import GUARDS, resolve
from safegen.guards import make_guard, read_guard
from safegen.guards.core.adapter import PipelineAdapter
from safegen.guards.core.pipeline import GuardedPipeline

PROMPTS = ("a red cube on a white table", "a blue ball in the grass")
TEXT = "a red cube"
INSIDE = {
    "sld": {"preset": "max", "text": TEXT},
    "negative-prompt": {"text": "a cone"},
    "safree": {"phrases": [TEXT, "red"]},
    "reattend": {"name": "safree", "phrases": [TEXT, "red"], "reattend": True},
    "dual-latent": {"phrases": [TEXT, "red"], "start": 0.0},
}
"""Guards inside the denoiser that change the first prompt's image."""
OFF = {
    "sld": {"scale": 0.0},
    "negative-prompt": {"text": ""},
    "safree": {"strength": 0.0},
    "reattend": {"strength": 0.0},
    "dual-latent": {"strength": 0.0},
}
CASES = [
    (kind, name)
    for kind in ("img2img", "inpaint", "inpaint9", "xl img2img", "xl inpaint")
    for name in INSIDE
    if not (name == "dual-latent" and "inpaint" in kind)
]
FROM_IMAGE = ("img2img", "inpaint", "inpaint9", "xl img2img", "xl inpaint")


def guard_of(name, more=()):
    settings = {"name": name} | INSIDE[name] | dict(more)
    return make_guard(**settings)


@pytest.fixture(scope="module")
def pipelines(make_model, make_xl):
    """Return the pipelines that start from an image, by name."""
    import diffusers

    sd, xl = make_model().pipeline, make_xl()
    parts = sd.components | {"requires_safety_checker": False}
    nine = diffusers.UNet2DConditionModel(
        **{k: v for k, v in sd.unet.config.items() if k[0] != "_"} | {"in_channels": 9}
    )
    built = {
        "img2img": diffusers.StableDiffusionImg2ImgPipeline(**parts),
        "inpaint": diffusers.StableDiffusionInpaintPipeline(**parts),
        "inpaint9": diffusers.StableDiffusionInpaintPipeline(**parts | {"unet": nine.eval()}),
        "xl img2img": diffusers.StableDiffusionXLImg2ImgPipeline(
            **xl.components, add_watermarker=False
        ),
        "xl inpaint": diffusers.StableDiffusionXLInpaintPipeline(
            **xl.components, add_watermarker=False
        ),
    }
    for pipe in built.values():
        pipe.set_progress_bar_config(disable=True)
    return built


def options_of(name, n=2):
    """Return the options with images for `n` prompts."""
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(n)]
    options = {"image": images, "strength": 0.8, "num_inference_steps": 5}
    if "inpaint" in name:
        mask = np.zeros((32, 32), dtype=np.uint8)
        mask[:, 16:] = 255
        options |= {"mask_image": [Image.fromarray(mask)] * n, "height": 32, "width": 32}
    return options


def arrays(outputs):
    return np.stack([np.asarray(o.image, dtype=np.float32) for o in outputs])


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_a_guard_without_effect_is_bit_equal_to_the_pipeline(pipelines, generate, kind, name):
    pipe, options = pipelines[kind], options_of(kind)
    outputs = generate(pipe, [guard_of(name, OFF[name])], PROMPTS, **options)
    assert {o.trace.action for o in outputs} == {"none"}
    assert np.array_equal(arrays(outputs), generate(pipe, None, PROMPTS, **options))


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_a_guard_acts_in_every_step_from_an_image(pipelines, generate, kind, name):
    pipe, options = pipelines[kind], options_of(kind)
    outputs = generate(pipe, [guard_of(name)], PROMPTS, **options)
    base = generate(pipe, None, PROMPTS, **options)
    assert outputs[0].trace.action == "edit"
    assert np.abs(arrays(outputs)[0] - base[0]).max() > 1e-3
    (record,) = outputs[0].trace.guards
    assert record.scores.get("steps", 4.0) == 4.0  # strength 0.8 of 5 steps
    single = {k: v[:1] if isinstance(v, list) else v for k, v in options.items()}
    alone = generate(pipe, [guard_of(name)], PROMPTS[:1], **single)
    assert np.abs(arrays(alone)[0] - arrays(outputs)[0]).max() < 2e-3


@pytest.mark.parametrize("kind", FROM_IMAGE)
def test_a_negative_prompt_equals_the_pipelines_own(pipelines, generate, kind):
    pipe, options = pipelines[kind], options_of(kind)
    outputs = generate(pipe, [guard_of("negative-prompt")], PROMPTS, **options)
    own = generate(pipe, None, PROMPTS, negative_prompt=["a cone"] * 2, **options)
    assert np.abs(arrays(outputs) - own).max() < 1e-4


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("kind", ["img2img", "xl img2img"])
def test_both_streams_of_dual_latent_start_alike_from_an_image(pipelines, generate, kind, single):
    dual = guard_of("dual-latent", {"strength": 1e-6, "gate": 0.0})
    engine = GuardedPipeline(pipelines[kind], [dual])
    seen = []
    network = pipelines[kind].unet
    hook = network.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    options = options_of(kind)
    if single:
        options["image"] = options["image"][0]
    generate(pipelines[kind], engine=engine, prompts=PROMPTS, **options)
    hook.remove()
    first = seen[0].chunk(2)[1]
    streams = len(first) - len(PROMPTS)
    assert streams > 0
    assert torch.equal(first[len(PROMPTS) :], first[:streams])


@pytest.mark.parametrize("kind", FROM_IMAGE)
@pytest.mark.parametrize("name", ["crops", "pno"])
def test_guards_that_move_the_noise_are_refused_with_a_reason(
    pipelines, passing_settings, kind, name
):
    guard = make_guard(name, **passing_settings[name])
    with pytest.raises(ConfigError, match=r"it moves the initial noise, and a .* starts from an i"):
        GuardedPipeline(pipelines[kind], [guard])


@pytest.mark.parametrize("kind", FROM_IMAGE)
def test_every_other_guard_runs_from_an_image(pipelines, kind):
    adapter = PipelineAdapter(pipelines[kind])
    refused = {n for n in GUARDS if resolve(GUARDS, n, "guard").unsupported_reason(adapter)}
    assert refused == {"crops", "pno"} | ({"dual-latent"} if "inpaint" in kind else set())


def test_dual_latent_is_refused_for_inpainting_with_a_reason(pipelines):
    with pytest.raises(ConfigError, match="two streams of equal noise, and inpainting does not"):
        GuardedPipeline(pipelines["inpaint"], [guard_of("dual-latent")])


def extend(pipe, **members):
    """Return a pipeline of a subclass with these members and the parts of another."""
    kind = type("MyPipe", (type(pipe),), members)
    own = kind(**pipe.components, requires_safety_checker=False)
    own.set_progress_bar_config(disable=True)
    return own


@pytest.mark.parametrize("name", [*INSIDE, "crops"])
def test_a_plain_subclass_is_guarded_as_its_class(tiny_model, generate, passing_settings, name):
    pipe = tiny_model.pipeline
    guard = make_guard(name, **passing_settings[name]) if name == "crops" else guard_of(name)
    own, base = (
        generate(each, [guard], PROMPTS, output_type="pil") for each in (extend(pipe), pipe)
    )
    assert [o.image.tobytes() for o in own] == [o.image.tobytes() for o in base]
    assert [o.trace.to_json(times=False) for o in own] == [
        o.trace.to_json(times=False) for o in base
    ]


def own_call(self, *args, **kwargs):
    raise AssertionError


@pytest.mark.parametrize("method", ["__call__", "encode_prompt"])
@pytest.mark.parametrize("name", [*INSIDE, "crops"])
def test_a_subclass_with_its_own_call_is_refused_inside_it(
    tiny_model, passing_settings, method, name
):
    """Its rows may stand in another order, and its prompts may be other tokens."""
    pipe = extend(tiny_model.pipeline, **{method: own_call})
    guard = make_guard(name, **passing_settings[name]) if name == "crops" else guard_of(name)
    says = rf"on a MyPipe: it acts inside .* MyPipe replaces {method} of StableDiffusionPipeline\."
    with pytest.raises(ConfigError, match=says) as caught:
        GuardedPipeline(pipe, [guard])
    assert "\n" not in str(caught.value)
    assert GuardedPipeline(pipe, [read_guard({"name": "prompt-filter", "words": ["x"]})]).guards


def test_an_encode_prompt_of_the_pipeline_alone_is_refused_too(make_model):
    pipe = make_model().pipeline
    pipe.encode_prompt = lambda *args, **kwargs: None
    with pytest.raises(ConfigError, match="replaces encode_prompt of StableDiffusionPipeline"):
        GuardedPipeline(pipe, [guard_of("safree")])


def own_reading(self, *args, **kwargs):
    return type(self).encode_prompt(self, *args, **kwargs)


def wrapped_reading(method):
    """Return a method of another module that claims to be that of diffusers."""

    @functools.wraps(method)
    def reading(self, *args, **kwargs):
        return method(self, *args, **kwargs)

    return reading


def of_the_instance(pipe, monkeypatch):
    pipe.encode_prompt = own_reading.__get__(pipe)


def of_a_subclass(pipe, monkeypatch):
    pipe.__class__ = type("MyPipe", (type(pipe),), {"encode_prompt": own_reading})


def of_the_class(pipe, monkeypatch):
    monkeypatch.setattr(type(pipe), "encode_prompt", own_reading)


def of_the_class_by_a_wrapper(pipe, monkeypatch):
    monkeypatch.setattr(type(pipe), "encode_prompt", wrapped_reading(type(pipe).encode_prompt))


REPLACEMENTS = [of_the_instance, of_a_subclass, of_the_class, of_the_class_by_a_wrapper]


@pytest.mark.parametrize("built", ["before", "after"])
@pytest.mark.parametrize("replace", REPLACEMENTS, ids=lambda replace: replace.__name__)
def test_a_replaced_prompt_reading_is_refused_before_and_after_the_build(
    make_model, generate, monkeypatch, replace, built
):
    pipe, guard = make_model().pipeline, guard_of("safree")
    engine = GuardedPipeline(pipe, [guard]) if built == "before" else None
    replace(pipe, monkeypatch)
    with pytest.raises(
        ConfigError, match=r"replaces encode_prompt of Stable.*\. Guards that can: "
    ):
        generate(pipe, [guard], engine=engine, prompts=PROMPTS)


def test_a_class_that_only_has_the_name_is_not_supported(tiny_model):
    foreign = type("StableDiffusionPipeline", (), {"__module__": "elsewhere"})()
    assert PipelineAdapter(foreign).spec is None
    assert PipelineAdapter(extend(tiny_model.pipeline)).family == "StableDiffusionPipeline"
