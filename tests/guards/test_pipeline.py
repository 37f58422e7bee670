"""GuardedPipeline: equal to the pipeline without acting guards, and faults withhold the images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from safegen.core.errors import ConfigError, UserError
from safegen.guards import GuardConfig, GuardResult, read_guard
from safegen.guards.core.adapter import ALL_POINTS
from safegen.guards.core.base import Guard, GuardHook
from safegen.guards.core.checks import check_options
from safegen.guards.core.pipeline import GuardedPipeline

PROMPTS = ("a red cube on a white table", "a blue ball in the grass", "a green cone under a tree")
TEXT = "a red cube"
SLD = {"name": "sld", "preset": "max", "text": TEXT}
ZERO = SLD | {"scale": 0.0}
NEGATIVE = {"name": "negative-prompt", "text": "a cone"}
JUDGE = {"name": "judge-filter", "concept": "skulls"}


class FaultyConfig(GuardConfig):
    """Settings of a guard with one fault."""

    name: str = "faulty"
    fault: str = ""
    hook_points = ALL_POINTS - {"probe"}

    def build(self, adapter):
        return FaultyGuard(self)


class FaultyGuard(Guard):
    """A guard that raises in one method, or returns an invalid result."""

    def enter(self, method):
        if self.config.fault == method:
            raise ZeroDivisionError("raised on purpose")

    def check_prompts(self, prompts):
        self.enter("check_prompts")
        if self.config.fault == "early replacement":
            return [GuardResult("black", image=Image.new("RGB", (32, 32)))] * len(prompts)
        return [GuardResult()] * (len(prompts) + (self.config.fault == "too many"))

    def start(self, call):
        self.enter("start")
        return FaultyHook(self)

    def check_images(self, images, prompts):
        self.enter("check_images")
        if self.config.fault in ("mosaic", "hide"):
            return [GuardResult(self.config.fault)] * len(images)
        return [GuardResult()] * (len(images) - (self.config.fault == "too few"))


class FaultyHook(GuardHook):
    def __init__(self, guard):
        self.guard = guard

    def edit_negative_embeds(self, embeds):
        self.guard.enter("edit_negative_embeds")
        return embeds

    def edit_prompt_embeds(self, embeds):
        self.guard.enter("edit_prompt_embeds")
        if self.guard.config.fault == "out of memory":
            raise RuntimeError("CUDA out of memory")
        if self.guard.config.fault == "nan":
            hidden = embeds.hidden.clone()
            hidden[0] = float("nan")  # of the first image only
            return embeds.replace_hidden(hidden)
        return embeds

    def extra_conditions(self):
        self.guard.enter("extra_conditions")
        return {}

    def guidance_correction(self, predictions):
        self.guard.enter("guidance_correction")

    def submodule_hooks(self, network):
        return [(network.conv_in, lambda *_: self.guard.enter("submodule_hooks"))]

    def on_step_end(self, latents):
        self.guard.enter("on_step_end")
        return latents

    def results(self):
        self.guard.enter("results")
        return []


class AutocastConfig(FaultyConfig):
    """Settings of a guard that records whether autocast is on in each of its methods."""

    name: str = "autocast"

    def build(self, adapter):
        guard = FaultyGuard(self)
        guard.autocast = {}
        guard.enter = lambda method: guard.autocast.update(
            {method: torch.is_autocast_enabled("cpu")}
        )
        return guard


def arrays(outputs):
    return np.stack([np.asarray(o.image, dtype=np.float32) for o in outputs])


@pytest.fixture
def pipe(tiny_model):
    return tiny_model.pipeline


@pytest.mark.parametrize("guards", [[], [ZERO, {"name": "negative-prompt", "text": ""}]])
def test_guards_without_strength_are_bit_equal_to_base(pipe, generate, guards):
    outputs = generate(pipe, guards)
    assert np.array_equal(arrays(outputs), generate(pipe))
    assert [o.trace.action for o in outputs] == ["none", "none"]


def test_guards_without_strength_are_bit_equal_to_base_on_sdxl_and_wan(tiny_xl, tiny_wan, generate):
    small = {"height": 16, "width": 16, "num_frames": 1, "max_sequence_length": 16}
    assert np.array_equal(arrays(generate(tiny_xl, [ZERO])), generate(tiny_xl))
    assert np.array_equal(arrays(generate(tiny_wan, [ZERO], **small)), generate(tiny_wan, **small))


def test_a_call_restores_the_pipeline(pipe, generate):
    base = generate(pipe)
    assert np.abs(arrays(generate(pipe, [SLD, NEGATIVE])) - base).max() > 0.01
    assert np.array_equal(generate(pipe), base)
    assert not pipe.unet._forward_hooks
    assert not pipe.unet._forward_pre_hooks
    assert "step" not in vars(pipe.scheduler)


def test_a_failed_call_restores_the_pipeline(pipe, generate):
    base = generate(pipe)
    generate(pipe, [FaultyConfig(fault="guidance_correction")], output_type="pil")
    with pytest.raises(
        RuntimeError, match="out of memory"
    ):  # not a guard's failure: a run can retry with smaller batches
        generate(pipe, [FaultyConfig(fault="out of memory")], output_type="pil")
    assert np.array_equal(generate(pipe), base)
    assert not pipe.unet._forward_hooks
    assert "step" not in vars(pipe.scheduler)


@pytest.mark.parametrize("guards", [[SLD, NEGATIVE]])
def test_an_image_does_not_depend_on_its_batch(pipe, generate, guards):
    both = arrays(generate(pipe, guards, PROMPTS))
    for i, prompt in enumerate(PROMPTS):
        assert np.abs(arrays(generate(pipe, guards, [prompt], seed=i))[0] - both[i]).max() < 2e-4


def test_max_rows_changes_no_more_than_rounding(pipe, generate):
    whole = arrays(generate(pipe, [SLD]))
    for most in (1, 3):
        parted = generate(pipe, [SLD], max_rows=most)
        assert np.abs(arrays(parted) - whole).max() < 1e-4
        assert parted[0].trace.guards[0].rows == 4  # one per step, in any number of calls


def test_max_rows_bounds_the_rows_of_guards(pipe, generate):
    def most(max_rows):
        seen = []
        hook = pipe.unet.conv_in.register_forward_hook(
            lambda m, inputs, out: seen.append(len(inputs[0]))
        )
        generate(pipe, [SLD], PROMPTS, max_rows=max_rows)
        hook.remove()
        return sorted(set(seen))

    assert most(None) == [9]  # negative prompt, prompt and safety text of three images
    assert most(8) == [3, 6]
    assert most(2) == [1, 2, 6]  # the pipeline's own six rows stay together
    with pytest.raises(ConfigError, match="max_rows must be >= 1, got 0"):
        GuardedPipeline(pipe, [], max_rows=0)


@pytest.mark.parametrize("pair", [(SLD, NEGATIVE), (NEGATIVE, JUDGE), (SLD, JUDGE)])
def test_guards_with_different_hook_points_commute(pipe, generate, pair):
    one, other = (generate(pipe, guards, output_type="pil") for guards in (pair, pair[::-1]))
    for a, b in zip(one, other, strict=True):
        assert a.image.tobytes() == b.image.tobytes()
        assert {n.guard: n.scores for n in a.trace.guards} == {
            n.guard: n.scores for n in b.trace.guards
        }


def test_images_of_one_prompt_are_adjacent_as_in_the_pipeline(pipe, tiny_xl, generate):
    for each in (pipe, tiny_xl):
        assert np.array_equal(
            arrays(generate(each, [ZERO], num_images_per_prompt=2)),
            generate(each, num_images_per_prompt=2),
        )
        assert (
            arrays(generate(each, [SLD], num_images_per_prompt=2)).shape
            == generate(each, num_images_per_prompt=2).shape
        )


def test_a_callback_sees_every_step(pipe, generate):
    seen = []

    def record(pipeline, i, t, kwargs):
        seen.append((i, tuple(kwargs["latents"].shape)))
        return kwargs

    assert generate(pipe, [SLD], callback_on_step_end=record)[0].image is not None
    assert seen == [(i, (2, 4, 8, 8)) for i in range(4)]


@pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning"
)  # raised by diffusers with numpy 2
def test_a_second_order_scheduler_is_counted_by_its_own_steps(pipe, generate, monkeypatch):
    from diffusers import HeunDiscreteScheduler

    monkeypatch.setattr(pipe, "scheduler", HeunDiscreteScheduler.from_config(pipe.scheduler.config))
    (one, _) = generate(pipe, [SLD])
    assert one.image is not None
    assert one.trace.guards[0].scores["steps"] == len(pipe.scheduler.timesteps) > 4


def test_guards_work_with_model_offloading(pipe, generate, monkeypatch):
    """Accelerate restores `forward` of modules at the end of each call, see its hooks.py."""
    from accelerate import cpu_offload_with_hook
    from accelerate.hooks import remove_hook_from_module

    def offload():
        for part in (pipe.text_encoder, pipe.unet, pipe.vae):
            remove_hook_from_module(part)
            cpu_offload_with_hook(part, "cpu")

    plain = arrays(generate(pipe, [SLD]))
    monkeypatch.setattr(pipe, "maybe_free_model_hooks", offload)
    offload()
    engine = GuardedPipeline(pipe, [read_guard(SLD)])
    for _ in range(3):
        outputs = generate(pipe, engine=engine)
        assert [o.trace.guards[0].scores["steps"] for o in outputs] == [4, 4]
        assert np.array_equal(arrays(outputs), plain)
    for part in (pipe.text_encoder, pipe.unet, pipe.vae):
        remove_hook_from_module(part)


FAULTS = [
    "check_prompts",
    "too many",
    "start",
    "edit_negative_embeds",
    "edit_prompt_embeds",
    "extra_conditions",
    "guidance_correction",
    "submodule_hooks",
    "on_step_end",
    "results",
    "check_images",
    "too few",
]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_guard_that_raises_withholds_every_image_of_the_batch(pipe, generate, fault):
    outputs = generate(pipe, [FaultyConfig(fault=fault)], output_type="pil")
    assert [o.image for o in outputs] == [None, None]
    assert {o.trace.action for o in outputs} == {"withhold"}
    assert all(o.trace.reason.startswith("error: faulty: ") and o.trace.withheld for o in outputs)
    raised = all("ZeroDivisionError in test_pipeline.enter" in o.trace.reason for o in outputs)
    assert raised != fault.startswith("too")


def test_guards_run_without_autocast_except_for_encoding(pipe, generate):
    engine = GuardedPipeline(pipe, [AutocastConfig()])
    with torch.autocast("cpu", torch.bfloat16):
        generate(pipe, engine=engine, output_type="pil")
    autocast = engine.guards[0].autocast
    assert autocast.pop("start")  # texts are encoded as the pipeline encodes its own
    assert len(autocast) == 9
    assert not any(autocast.values())


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("mosaic", "the action 'mosaic' needs an image to show"),
        ("hide", "unknown action 'hide'"),
        ("early replacement", "the action 'black' needs an image to show"),
    ],
)
def test_a_replacement_without_an_image_withholds(pipe, generate, fault, reason):
    outputs = generate(pipe, [FaultyConfig(fault=fault)], output_type="pil")
    assert [o.image for o in outputs] == [None, None]
    assert all(reason in o.trace.reason for o in outputs)


@pytest.mark.parametrize("guard", [SLD, NEGATIVE])
def test_guidance_turned_off_by_a_callback_withholds(pipe, generate, guard):
    def off(pipeline, i, t, kwargs):
        if i == 1:
            pipeline._guidance_scale, kwargs["prompt_embeds"] = (
                0.0,
                kwargs["prompt_embeds"].chunk(2)[-1],
            )
        return kwargs

    outputs = generate(
        pipe,
        [guard],
        callback_on_step_end=off,
        callback_on_step_end_tensor_inputs=["prompt_embeds"],
    )
    assert [o.image for o in outputs] == [None, None]
    assert (
        outputs[0].trace.reason
        == "calls: guidance was off or rescaled in 2 of 4 steps, and a guard needs it"
    )


def test_a_guard_without_hook_points_is_refused(pipe):
    class Idle(FaultyConfig):
        hook_points = frozenset()

    with pytest.raises(ConfigError, match="'faulty' must have a hook point, got none"):
        GuardedPipeline(pipe, [Idle()])


def test_a_guard_of_images_is_refused_on_a_video_pipeline(tiny_wan):
    with pytest.raises(
        ConfigError,
        match=r"it checks images, and .* makes videos\. Guards that can: negative-prompt, ",
    ):
        GuardedPipeline(tiny_wan, [read_guard(JUDGE)])


def test_a_text_instead_of_a_list_is_refused(pipe):
    with pytest.raises(
        ConfigError, match="prompts must be a list of texts, got the text 'a castle'"
    ):
        GuardedPipeline(pipe, []).generate("a castle")


def test_rows_count_generated_images_only(pipe, generate):
    gone, *shown = generate(pipe, [{"name": "prompt-filter", "words": ["red cube"]}, SLD], PROMPTS)
    assert gone.image is None
    assert [o.trace.guards[1].rows for o in (gone, *shown)] == [0, 4, 4]


@pytest.mark.parametrize("when", [0, 2, 3])
def test_removed_denoiser_hooks_withhold(pipe, generate, when):
    def remove(pipeline, i, t, kwargs):
        if i == when:
            pipeline.unet._forward_pre_hooks.clear()
            pipeline.unet._forward_hooks.clear()
        return kwargs

    outputs = generate(pipe, [NEGATIVE], callback_on_step_end=remove)
    if when == 3:  # the last step was guarded
        assert all(o.image is not None for o in outputs)
    else:
        assert [o.image for o in outputs] == [None, None]
        assert (
            outputs[0].trace.reason
            == f"calls: the denoiser bypassed the guards in {3 - when} of 4 steps"
        )
    assert all(o.image is not None for o in generate(pipe, [NEGATIVE]))


def test_a_removed_scheduler_patch_withholds(pipe, generate):
    def remove(pipeline, i, t, kwargs):
        vars(pipeline.scheduler).pop("step", None)
        return kwargs

    outputs = generate(pipe, [NEGATIVE], callback_on_step_end=remove)
    assert [o.image for o in outputs] == [None, None]
    assert outputs[0].trace.reason == "calls: 1 of 4 steps went through the guards"


def test_an_interrupted_call_withholds(pipe, generate):
    def stop(pipeline, i, t, kwargs):
        pipeline._interrupt = i == 1
        return kwargs

    outputs = generate(pipe, [SLD], callback_on_step_end=stop)
    assert [o.trace.reason for o in outputs] == ["calls: 2 of 4 steps went through the guards"] * 2


def test_latents_that_are_not_finite_withhold_one_image_only(pipe, generate):
    bad, good = generate(pipe, [FaultyConfig(fault="nan")], output_type="pil")
    assert (bad.image, bad.trace.action, bad.trace.reason) == (
        None,
        "withhold",
        "not-finite: the latents hold NaN or infinity",
    )
    (_, alone) = generate(pipe, [], output_type="pil")
    assert np.abs(np.asarray(good.image, dtype=int) - np.asarray(alone.image, dtype=int)).max() <= 2


@pytest.mark.parametrize(
    ("guard", "options", "says"),
    [
        (SLD, {"guidance_scale": 1.0}, "guidance_scale must be > 1 with sld, got 1.0"),
        (NEGATIVE, {"guidance_scale": 1.0}, "guidance_scale must be > 1 with negative-prompt"),
        (SLD, {"guidance_scale": float("nan")}, "must be > 1 with sld, got nan"),
        (SLD, {"guidance_rescale": 0.5}, "guidance_rescale must be 0 with sld, got 0.5"),
        (
            SLD,
            {"prompt_embeds": torch.zeros(2, 32, 32)},
            "prompt_embeds must not be given with guards",
        ),
        (SLD, {"prompt_2": ["another", "text"]}, "prompt_2 must not be given with guards"),
        (JUDGE, {"prompt_3": ["another", "text"]}, "prompt_3 must not be given with guards"),
        (
            JUDGE,
            {"negative_prompt_2": ["another", "text"]},
            "negative_prompt_2 must not be given with guards",
        ),
        (
            JUDGE,
            {"pooled_prompt_embeds": torch.zeros(2, 32)},
            "pooled_prompt_embeds must not be given with guards",
        ),
        (
            JUDGE,
            {"ip_adapter_image_embeds": [torch.zeros(2, 32)]},
            "ip_adapter_image_embeds must not be given with guards",
        ),
        (
            JUDGE,
            {"output_type": "latent"},
            "output_type must be 'pil', 'np' or 'pt' with judge-filter, got 'latent'",
        ),
    ],
)
def test_options_without_effect_of_a_guard_are_refused_in_one_line(
    pipe, generate, guard, options, says
):
    with pytest.raises(ConfigError, match=says) as caught:
        generate(pipe, [guard], **options)
    assert "\n" not in str(caught.value)


def test_a_guidance_distilled_model_is_refused(pipe, generate):
    pipe.unet.register_to_config(time_cond_proj_dim=8)
    try:
        with pytest.raises(ConfigError, match="guidance-distilled"):
            generate(pipe, [SLD])
    finally:
        pipe.unet.register_to_config(time_cond_proj_dim=None)


def test_a_denoiser_with_a_cache_is_refused(tiny_wan, generate):
    from diffusers import FirstBlockCacheConfig

    small = {"height": 16, "width": 16, "num_frames": 1, "max_sequence_length": 16}
    tiny_wan.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    try:
        with pytest.raises(
            ConfigError, match="sld must see every denoiser call, and a cache skips some"
        ):
            generate(tiny_wan, [SLD], **small)
    finally:
        tiny_wan.transformer.disable_cache()
    assert generate(tiny_wan, [SLD], **small)[0].image is not None


def test_an_unknown_pipeline_class_names_the_guards_that_can_run(generate):
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    odd = DDPMPipeline(
        UNet2DModel(
            sample_size=8,
            block_out_channels=(8, 8),
            norm_num_groups=4,
            layers_per_block=1,
            down_block_types=("DownBlock2D",) * 2,
            up_block_types=("UpBlock2D",) * 2,
        ),
        DDPMScheduler(num_train_timesteps=10),
    )
    with pytest.raises(
        ConfigError,
        match=r"'sld' cannot run on a DDPMPipeline: it acts inside .*Guards that can: judge-filter",
    ) as caught:
        GuardedPipeline(odd, [read_guard(SLD)])
    assert "negative-prompt," not in str(caught.value)
    assert GuardedPipeline(odd, [read_guard(JUDGE)]).guards


def test_equal_images_have_equal_traces_without_times(pipe, generate):
    one, other = (generate(pipe, [SLD, JUDGE], output_type="pil")[0].trace for _ in range(2))
    assert one.to_json(times=False) == other.to_json(times=False)
    record = one.to_json()["guards"][1]
    assert set(record) == {
        "guard",
        "action",
        "reason",
        "scores",
        "thresholds",
        "calls",
        "rows",
        "ms",
    }
    assert (record["guard"], record["calls"], record["rows"], record["thresholds"]) == (
        "judge-filter",
        1,
        0,
        {"score": 0.5},
    )
    assert record["ms"] > 0


def test_a_user_error_in_a_guard_is_raised(pipe, generate):
    long = " ".join(["cube"] * 40)
    with pytest.raises(
        UserError,
        match="a negative prompt together with that of the guard 'negative-prompt' must have",
    ):
        generate(pipe, [NEGATIVE], negative_prompt=[long, "x"])


def test_images_have_the_pipelines_size(pipe, generate):
    assert all(
        isinstance(o.image, Image.Image) and o.image.size == (32, 32)
        for o in generate(pipe, [SLD], output_type="pil")
    )


def test_calls_on_one_pipeline_wait_for_each_other(pipe, generate):
    """The scheduler counts the steps of one call; a call in between would break both."""
    from threading import Thread

    first, second = (generate(pipe, [SLD], num_inference_steps=n) for n in (4, 5))
    outputs, others = {}, []

    def between(pipeline, i, t, kwargs):
        if i == 1:
            others.append(
                Thread(
                    target=lambda: outputs.update(
                        other=generate(pipe, [SLD], num_inference_steps=5)
                    )
                )
            )
            others[0].start()
            others[0].join(0.5)
        return kwargs

    own = generate(pipe, [SLD], callback_on_step_end=between)
    others[0].join()
    assert np.array_equal(arrays(own), arrays(first))
    assert np.array_equal(arrays(outputs["other"]), arrays(second))
    assert "step" not in vars(pipe.scheduler)
    assert not pipe.unet._forward_hooks


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"negative_prompt": ["x"]},
            "negative_prompt must be one value or one per prompt, 2, got 1",
        ),
        (
            {"negative_prompt": ["x"] * 3},
            "negative_prompt must be one value or one per prompt, 2, got 3",
        ),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt must be >= 1, got 0"),
        (
            {"generator": [torch.Generator()]},
            "generator must be one value or one per image, 2, got 1",
        ),
        ({"generator": [torch.Generator()] * 3}, "one per image, 2, got 3"),
        (
            {"generator": [torch.Generator()] * 2, "num_images_per_prompt": 2},
            "one value or one per image, 4, got 2",
        ),
    ],
)
def test_options_of_a_wrong_length_are_refused_in_one_line(pipe, options, says):
    with pytest.raises(ConfigError, match=says) as caught:
        GuardedPipeline(pipe, [read_guard(SLD)]).generate(
            PROMPTS[:2], num_inference_steps=1, **options
        )
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def image_to_image(tiny_folder):
    """Return a tiny image-to-image pipeline."""
    from diffusers import StableDiffusionImg2ImgPipeline

    outputs = StableDiffusionImg2ImgPipeline.from_pretrained(
        tiny_folder, safety_checker=None, feature_extractor=None
    )
    outputs.set_progress_bar_config(disable=True)
    return outputs


@pytest.mark.parametrize("kind", ["list", "batch", "array"])
def test_input_images_follow_their_prompts(image_to_image, generate, kind):
    given = [Image.new("RGB", (32, 32), color) for color in ("red", "green", "blue")]
    batch = torch.stack([torch.from_numpy(np.array(one)).permute(2, 0, 1) / 255 for one in given])
    own = {"list": given, "batch": batch, "array": batch.permute(0, 2, 3, 1).numpy()}[kind]
    gone, *shown = generate(
        image_to_image,
        [{"name": "prompt-filter", "words": ["red cube"]}],
        PROMPTS,
        image=own,
        strength=0.5,
    )
    assert gone.image is None
    assert gone.trace.action == "block"
    assert [one.trace.action for one in shown] == ["none", "none"]
    alone = generate(image_to_image, [], PROMPTS, image=own, strength=0.5)
    assert np.allclose(arrays(shown), arrays(alone)[1:], atol=1e-4)
    swapped = generate(image_to_image, [], PROMPTS, image=given[:1] * 3, strength=0.5)
    assert not np.allclose(arrays(shown), arrays(swapped)[1:], atol=1e-2)


def test_several_input_images_of_one_prompt_are_passed_unchanged(image_to_image, generate):
    seen = []

    class Several(type(image_to_image)):
        """A pipeline that takes several images per prompt, as image-editing pipelines do."""

        @torch.no_grad()
        def __call__(self, prompt=None, image=None, **rest):
            seen.append(list(image))
            return super().__call__(prompt=prompt, image=image[0], **rest)

    pipe = Several(**image_to_image.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    given = [Image.new("RGB", (32, 32), color) for color in ("red", "green")]
    (one,) = generate(
        pipe,
        [{"name": "prompt-filter", "words": ["red cube"]}],
        PROMPTS[1:2],
        image=given,
        strength=0.5,
    )
    assert one.trace.action == "none"
    assert seen == [given]


def test_a_wrong_number_of_input_images_is_refused_in_one_line(image_to_image):
    with pytest.raises(ConfigError, match="image must be one value or one per prompt, 3, got 2"):
        GuardedPipeline(image_to_image, []).generate(
            PROMPTS, image=[Image.new("RGB", (32, 32))] * 2, num_inference_steps=2
        )


@pytest.mark.parametrize(
    "guard",
    [NEGATIVE, {"name": "crops", "judge": "mini", "threshold": 1.0, "probes": 1, "steps": 1}],
)
def test_negative_prompts_may_be_one_text_a_list_or_a_tuple(pipe, generate, guard):
    one, each, pair = (
        generate(pipe, [guard], negative_prompt=away)
        for away in ("a tree", ["a tree"] * 2, ("a tree", "a tree"))
    )
    assert np.array_equal(arrays(one), arrays(each))
    assert np.array_equal(arrays(pair), arrays(each))


def test_several_images_per_prompt_on_wan_and_on_a_pipeline_without_them(tiny_wan, pipe):
    small = {
        "height": 16,
        "width": 16,
        "num_frames": 1,
        "max_sequence_length": 16,
        "num_inference_steps": 2,
        "output_type": "np",
    }
    rng = torch.Generator()
    base = tiny_wan(
        prompt=list(PROMPTS[:2]), num_videos_per_prompt=2, generator=rng.manual_seed(0), **small
    ).frames
    outputs = GuardedPipeline(tiny_wan, [read_guard(ZERO)]).generate(
        PROMPTS[:2], num_images_per_prompt=2, generator=rng.manual_seed(0), **small
    )
    assert np.array_equal(arrays(outputs), base)

    class Single(type(pipe)):
        def __call__(self, prompt):
            raise AssertionError

    single = Single(**pipe.components, requires_safety_checker=False)
    with pytest.raises(
        ConfigError, match=r"num_images_per_prompt must be 1 on a Single, got 2\. Repeat the prompt"
    ):
        GuardedPipeline(single, [read_guard(JUDGE)]).generate(PROMPTS[:2], num_images_per_prompt=2)


def test_guidance_rescale_none_is_allowed(pipe, generate):
    engine = GuardedPipeline(pipe, [read_guard(SLD)])
    check_options(
        engine.adapter, {"guidance_rescale": None}, guided=["sld"], inside=["sld"], reading=["sld"]
    )


def test_a_keyboard_interrupt_restores_the_pipeline(pipe, generate):
    def stop(pipeline, i, t, kwargs):
        raise KeyboardInterrupt

    base = generate(pipe)
    guards = [SLD, NEGATIVE, {"name": "safree", "phrases": [TEXT, "red"], "reattend": True}]
    with pytest.raises(KeyboardInterrupt):
        generate(pipe, guards, callback_on_step_end=stop)
    assert np.array_equal(generate(pipe), base)
    assert not any(
        module._forward_hooks or module._forward_pre_hooks for module in pipe.unet.modules()
    )
    assert "step" not in vars(pipe.scheduler)
