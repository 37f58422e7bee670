"""The guarded pipeline: it is the pipeline where no guard acts, and whatever went by a guard is withheld."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from safegen.core.errors import ConfigError, UserError
from safegen.guards import GuardConfig, GuardResult, read_guard
from safegen.guards.core.adapter import Text
from safegen.guards.core.base import Guard, GuardHook
from safegen.guards.core.pipeline import GuardedPipeline

PROMPTS = ("a red cube on a white table", "a blue ball in the grass", "a green cone under a tree")
TEXT = "a red cube"
SLD = {"name": "sld", "preset": "max", "text": TEXT}
ZERO = SLD | {"scale": 0.0}
NEGATIVE = {"name": "negative-prompt", "text": "a cone"}
JUDGE = {"name": "judge-filter", "concept": "skulls"}


class Rogue(GuardConfig):
    """A guard that raises, or does something it must not, at one place."""

    name: str = "rogue"
    at: str = ""
    hook_points = frozenset({"prompt", "uncond", "text", "branch", "latents", "image"})

    def build(self, border):
        return RogueReady(self)


class RogueReady(Guard):
    def trip(self, at):
        if self.guard.at == at:
            raise ZeroDivisionError("tripped")

    def check(self, prompts):
        self.trip("check")
        if self.guard.at == "covered unseen":
            return [GuardResult("black", image=Image.new("RGB", (32, 32)))] * len(prompts)
        return [GuardResult()] * (len(prompts) + (self.guard.at == "too many"))

    def start(self, call):
        self.trip("begin")
        self.call = call
        return RogueTurn(self)

    def look(self, images, prompts):
        self.trip("look")
        if self.guard.at in ("mosaic", "hide"):
            return [GuardResult(self.guard.at)] * len(images)
        return [GuardResult()] * (len(images) - (self.guard.at == "too few"))


class Arithmetic(Rogue):
    """A guard that notes in which arithmetic it is asked."""

    name: str = "arithmetic"

    def build(self, border):
        class Noting(RogueReady):
            coarse = []

            def trip(self, at):
                self.coarse.append((at, torch.is_autocast_enabled("cpu")))

        return Noting(self)


class RogueTurn(GuardHook):
    def __init__(self, ready):
        self.ready, self.call = ready, ready.call

    def edit_negative_embeds(self, text):
        self.ready.trip("uncond")
        return text

    def edit_prompt_embeds(self, text):
        self.ready.trip("cond")
        if self.ready.guard.at == "no memory":
            raise RuntimeError("CUDA out of memory")
        if self.ready.guard.at == "nan":
            hidden = text.hidden.clone()
            hidden[0] = float("nan")  # of the first picture only
            return Text(hidden, text.extra)
        return text

    def extra_conditions(self):
        self.ready.trip("branches")
        return {}

    def guidance_correction(self, said):
        self.ready.trip("combine")

    def on_step_end(self, latents):
        self.ready.trip("latents")
        return latents

    def results(self):
        self.ready.trip("findings")
        return []


def arrays(drawn):
    return np.stack([np.asarray(d.image, dtype=np.float32) for d in drawn])


@pytest.fixture
def pipe(tiny_model):
    return tiny_model.pipeline


@pytest.mark.parametrize("guards", [[], [ZERO, {"name": "negative-prompt", "text": ""}]])
def test_a_guard_of_no_strength_is_the_base_bit_for_bit(pipe, draw, guards):
    drawn = draw(pipe, guards)
    assert np.array_equal(arrays(drawn), draw(pipe))
    assert [d.trail.action for d in drawn] == ["none", "none"]


def test_a_guard_of_no_strength_is_the_base_bit_for_bit_on_other_families(tiny_xl, tiny_wan, draw):
    small = {"height": 16, "width": 16, "num_frames": 1, "max_sequence_length": 16}
    assert np.array_equal(arrays(draw(tiny_xl, [ZERO])), draw(tiny_xl))
    assert np.array_equal(arrays(draw(tiny_wan, [ZERO], **small)), draw(tiny_wan, **small))


def test_after_a_guarded_call_the_pipeline_is_as_it_was(pipe, draw):
    base = draw(pipe)
    assert np.abs(arrays(draw(pipe, [SLD, NEGATIVE])) - base).max() > 0.01
    assert np.array_equal(draw(pipe), base)
    assert not pipe.unet._forward_hooks
    assert not pipe.unet._forward_pre_hooks
    assert "step" not in vars(pipe.scheduler)


def test_the_pipeline_is_as_it_was_after_a_fault_too(pipe, draw):
    base = draw(pipe)
    draw(pipe, [Rogue(at="combine")], output_type="pil")
    with pytest.raises(
        RuntimeError, match="out of memory"
    ):  # which is no fault of the guard, and lets a run go on with smaller batches
        draw(pipe, [Rogue(at="no memory")], output_type="pil")
    assert np.array_equal(draw(pipe), base)
    assert not pipe.unet._forward_hooks
    assert "step" not in vars(pipe.scheduler)


@pytest.mark.parametrize("guards", [[SLD, NEGATIVE]])
def test_a_picture_does_not_depend_on_its_batch(pipe, draw, guards):
    both = arrays(draw(pipe, guards, PROMPTS))
    for i, prompt in enumerate(PROMPTS):
        assert np.abs(arrays(draw(pipe, guards, [prompt], seed=i))[0] - both[i]).max() < 2e-4


def test_a_short_batch_of_rows_changes_no_more_than_rounding(pipe, draw):
    whole = arrays(draw(pipe, [SLD]))
    for most in (1, 3):
        parted = draw(pipe, [SLD], max_rows=most)
        assert np.abs(arrays(parted) - whole).max() < 1e-4
        assert parted[0].trail.guards[0].rows == 4  # one a step, however they were asked


def test_max_rows_bounds_the_rows_that_are_asked_at_once(pipe, draw):
    def most(max_rows):
        seen = []
        hook = pipe.unet.conv_in.register_forward_hook(
            lambda m, inputs, out: seen.append(len(inputs[0]))
        )
        draw(pipe, [SLD], PROMPTS, max_rows=max_rows)
        hook.remove()
        return sorted(set(seen))

    assert most(None) == [9]  # blank, prompt and safety text of three pictures
    assert most(8) == [3, 6]
    assert most(2) == [1, 2, 6]  # the pipeline's own six rows are not ours to cut
    with pytest.raises(ConfigError, match="max_rows must be >= 1, got 0"):
        GuardedPipeline(pipe, [], max_rows=0)


@pytest.mark.parametrize("pair", [(SLD, NEGATIVE), (NEGATIVE, JUDGE), (SLD, JUDGE)])
def test_guards_on_different_seams_commute(pipe, draw, pair):
    one, other = (draw(pipe, guards, output_type="pil") for guards in (pair, pair[::-1]))
    for a, b in zip(one, other, strict=True):
        assert a.image.tobytes() == b.image.tobytes()
        assert {n.guard: n.scores for n in a.trail.guards} == {
            n.guard: n.scores for n in b.trail.guards
        }


def test_copies_of_a_prompt_stand_side_by_side_as_the_pipeline_puts_them(pipe, tiny_xl, draw):
    for each in (pipe, tiny_xl):
        assert np.array_equal(arrays(draw(each, [ZERO], copies=2)), draw(each, copies=2))
        assert arrays(draw(each, [SLD], copies=2)).shape == draw(each, copies=2).shape


def test_a_users_own_callback_still_runs_and_sees_every_step(pipe, draw):
    seen = []

    def note(pipeline, i, t, kwargs):
        seen.append((i, tuple(kwargs["latents"].shape)))
        return kwargs

    assert draw(pipe, [SLD], callback_on_step_end=note)[0].image is not None
    assert seen == [(i, (2, 4, 8, 8)) for i in range(4)]


@pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning"
)  # diffusers' own, with numpy 2
def test_a_second_order_scheduler_is_counted_by_its_own_turns(pipe, draw, monkeypatch):
    from diffusers import HeunDiscreteScheduler

    monkeypatch.setattr(pipe, "scheduler", HeunDiscreteScheduler.from_config(pipe.scheduler.config))
    (one, _) = draw(pipe, [SLD])
    assert one.image is not None
    assert one.trail.guards[0].scores["steps"] == len(pipe.scheduler.timesteps) > 4


def test_guards_stay_through_model_offloading(pipe, draw, monkeypatch):
    """Accelerate gives modules back their old `forward` at the end of each call, and takes it again.

    See its hooks.py.
    """
    from accelerate import cpu_offload_with_hook
    from accelerate.hooks import remove_hook_from_module

    def offload():
        for part in (pipe.text_encoder, pipe.unet, pipe.vae):
            remove_hook_from_module(part)
            cpu_offload_with_hook(part, "cpu")

    plain = arrays(draw(pipe, [SLD]))
    monkeypatch.setattr(pipe, "maybe_free_model_hooks", offload)
    offload()
    engine = GuardedPipeline(pipe, [read_guard(SLD)])
    for _ in range(3):
        drawn = draw(pipe, engine=engine)
        assert [d.trail.guards[0].scores["steps"] for d in drawn] == [4, 4]
        assert np.array_equal(arrays(drawn), plain)
    for part in (pipe.text_encoder, pipe.unet, pipe.vae):
        remove_hook_from_module(part)


PLACES = [
    "check",
    "too many",
    "begin",
    "uncond",
    "cond",
    "branches",
    "combine",
    "latents",
    "findings",
    "look",
    "too few",
]


@pytest.mark.parametrize("at", PLACES)
def test_a_guard_that_raises_withholds_every_picture_of_its_batch_and_the_next_is_drawn(
    pipe, draw, at
):
    found = draw(pipe, [Rogue(at=at)], output_type="pil")
    assert [d.image for d in found] == [None, None]
    assert {d.trail.action for d in found} == {"withhold"}
    assert all(d.trail.reason.startswith("error: rogue: ") and d.trail.withheld for d in found)
    assert all("tripped" in d.trail.reason for d in found) != at.startswith("too")


def test_guards_compute_in_full_precision_whatever_the_drawing_does(pipe, draw):
    engine = GuardedPipeline(pipe, [Arithmetic()])
    with torch.autocast("cpu", torch.bfloat16):
        draw(pipe, engine=engine, output_type="pil")
    coarse = dict(engine.ready[0].coarse)
    assert coarse.pop("begin")  # texts are encoded as the pipeline encodes its own
    assert len(coarse) == 8
    assert not any(coarse.values())


@pytest.mark.parametrize("at", ["mosaic", "hide", "covered unseen"])
def test_a_guard_that_covers_a_picture_and_brings_none_to_show_shows_none(pipe, draw, at):
    found = draw(pipe, [Rogue(at=at)], output_type="pil")
    assert [d.image for d in found] == [None, None]
    assert all("hides nothing without a picture to show" in d.trail.reason for d in found)


@pytest.mark.parametrize("guard", [SLD, NEGATIVE])
def test_guidance_that_a_callback_turns_off_on_the_way_withholds_the_pictures(pipe, draw, guard):
    def off(pipeline, i, t, kwargs):
        if i == 1:
            pipeline._guidance_scale, kwargs["prompt_embeds"] = (
                0.0,
                kwargs["prompt_embeds"].chunk(2)[-1],
            )
        return kwargs

    found = draw(
        pipe,
        [guard],
        callback_on_step_end=off,
        callback_on_step_end_tensor_inputs=["prompt_embeds"],
    )
    assert [d.image for d in found] == [None, None]
    assert (
        found[0].trail.reason
        == "calls: in 2 of 4 steps guidance was off, through which a guard acts"
    )


def test_a_guard_that_would_never_be_asked_is_refused(pipe):
    class Idle(Rogue):
        hook_points = frozenset()

    with pytest.raises(ConfigError, match="'rogue' takes hold nowhere, so it would never be asked"):
        GuardedPipeline(pipe, [Idle()])


def test_a_guard_of_pictures_is_refused_where_videos_are_drawn(tiny_wan):
    with pytest.raises(
        ConfigError,
        match="'judge-filter' cannot run on a WanPipeline: it looks at pictures, and this draws videos; guards that can: negative-prompt, ",
    ):
        GuardedPipeline(tiny_wan, [read_guard(JUDGE)])


def test_a_text_in_the_place_of_a_list_is_refused(pipe):
    with pytest.raises(
        ConfigError, match="prompts must be a list of texts, got the text 'a castle'"
    ):
        GuardedPipeline(pipe, []).draw("a castle")


def test_rows_are_those_of_the_pictures_that_were_drawn(pipe, draw):
    gone, *shown = draw(pipe, [{"name": "prompt-filter", "words": ["red cube"]}, SLD], PROMPTS)
    assert gone.image is None
    assert [d.trail.guards[1].rows for d in (gone, *shown)] == [0, 4, 4]


@pytest.mark.parametrize("when", [0, 2, 3])
def test_a_hook_that_is_removed_behind_our_back_withholds_the_pictures(pipe, draw, when):
    def remove(pipeline, i, t, kwargs):
        if i == when:
            pipeline.unet._forward_pre_hooks.clear()
            pipeline.unet._forward_hooks.clear()
        return kwargs

    found = draw(pipe, [NEGATIVE], callback_on_step_end=remove)
    if when == 3:  # the last step was guarded
        assert all(d.image is not None for d in found)
    else:
        assert [d.image for d in found] == [None, None]
        assert (
            found[0].trail.reason
            == f"calls: in {3 - when} of 4 steps the denoiser did not go through the guards"
        )
    assert all(d.image is not None for d in draw(pipe, [NEGATIVE]))


def test_a_counter_that_is_removed_withholds_the_pictures(pipe, draw):
    def remove(pipeline, i, t, kwargs):
        vars(pipeline.scheduler).pop("step", None)
        return kwargs

    found = draw(pipe, [NEGATIVE], callback_on_step_end=remove)
    assert [d.image for d in found] == [None, None]
    assert found[0].trail.reason == "calls: 1 of 4 steps went through the guards"


def test_a_call_that_is_interrupted_is_withheld(pipe, draw):
    def stop(pipeline, i, t, kwargs):
        pipeline._interrupt = i == 1
        return kwargs

    found = draw(pipe, [SLD], callback_on_step_end=stop)
    assert [d.trail.reason for d in found] == ["calls: 2 of 4 steps went through the guards"] * 2


def test_latents_that_are_not_finite_cost_no_other_picture(pipe, draw):
    bad, good = draw(pipe, [Rogue(at="nan")], output_type="pil")
    assert (bad.image, bad.trail.action, bad.trail.reason) == (
        None,
        "withhold",
        "not-finite: the latents hold NaN or infinity",
    )
    (_, alone) = draw(pipe, [], output_type="pil")
    assert np.abs(np.asarray(good.image, dtype=int) - np.asarray(alone.image, dtype=int)).max() <= 2


@pytest.mark.parametrize(
    ("guard", "options", "says"),
    [
        (
            SLD,
            {"guidance_scale": 1.0},
            "sld has no effect without guidance; guidance scale must be > 1, got 1.0",
        ),
        (NEGATIVE, {"guidance_scale": 1.0}, "negative-prompt has no effect without guidance"),
        (SLD, {"guidance_scale": float("nan")}, "must be > 1, got nan"),
        (SLD, {"guidance_rescale": 0.5}, "guidance_rescale, which must be 0, got 0.5"),
        (
            SLD,
            {"prompt_embeds": torch.zeros(2, 32, 32)},
            "guards do not see prompt_embeds; leave it out",
        ),
        (SLD, {"prompt_2": ["another", "text"]}, "guards do not see prompt_2"),
        (JUDGE, {"prompt_3": ["another", "text"]}, "guards do not see prompt_3"),
        (JUDGE, {"negative_prompt_2": ["another", "text"]}, "guards do not see negative_prompt_2"),
        (
            JUDGE,
            {"pooled_prompt_embeds": torch.zeros(2, 32)},
            "guards do not see pooled_prompt_embeds",
        ),
        (
            JUDGE,
            {"ip_adapter_image_embeds": [torch.zeros(2, 32)]},
            "guards do not see ip_adapter_image_embeds",
        ),
        (JUDGE, {"output_type": "latent"}, "need output_type='pil', got 'latent'"),
    ],
)
def test_settings_under_which_a_guard_has_no_effect_are_refused_in_one_line(
    pipe, draw, guard, options, says
):
    with pytest.raises(ConfigError, match=says) as caught:
        draw(pipe, [guard], **options)
    assert "\n" not in str(caught.value)


def test_a_distilled_model_is_refused(pipe, draw):
    pipe.unet.register_to_config(time_cond_proj_dim=8)
    try:
        with pytest.raises(ConfigError, match="guidance-distilled"):
            draw(pipe, [SLD])
    finally:
        pipe.unet.register_to_config(time_cond_proj_dim=None)


def test_a_denoiser_with_a_cache_is_refused(tiny_wan, draw):
    from diffusers import FirstBlockCacheConfig

    small = {"height": 16, "width": 16, "num_frames": 1, "max_sequence_length": 16}
    tiny_wan.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    try:
        with pytest.raises(
            ConfigError, match="sld would miss the denoiser calls that a cache skips"
        ):
            draw(tiny_wan, [SLD], **small)
    finally:
        tiny_wan.transformer.disable_cache()
    assert draw(tiny_wan, [SLD], **small)[0].image is not None


def test_a_pipeline_of_an_unknown_family_is_told_which_guards_can_run(draw):
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
        match=r"'sld' cannot run on a DDPMPipeline: it acts inside the denoiser.*guards that can: judge-filter",
    ) as caught:
        GuardedPipeline(odd, [read_guard(SLD)])
    assert "negative-prompt," not in str(caught.value)
    assert GuardedPipeline(odd, [read_guard(JUDGE)]).guards


def test_a_trail_is_the_same_for_equal_pictures_but_for_its_times(pipe, draw):
    one, other = (draw(pipe, [SLD, JUDGE], output_type="pil")[0].trail for _ in range(2))
    assert one.to_json(times=False) == other.to_json(times=False)
    note = one.to_json()["guards"][1]
    assert set(note) == {"guard", "action", "reason", "scores", "thresholds", "calls", "rows", "ms"}
    assert (note["guard"], note["calls"], note["rows"], note["thresholds"]) == (
        "judge-filter",
        1,
        0,
        {"score": 0.5},
    )
    assert note["ms"] > 0


def test_a_users_error_inside_a_guard_is_the_users(pipe, draw):
    long = " ".join(["cube"] * 40)
    with pytest.raises(
        UserError, match="a negative prompt together with that of the guard 'negative-prompt' has"
    ):
        draw(pipe, [NEGATIVE], negative_prompt=[long, "x"])


def test_pictures_are_plain_images_of_the_pipelines_size(pipe, draw):
    assert all(
        isinstance(d.image, Image.Image) and d.image.size == (32, 32)
        for d in draw(pipe, [SLD], output_type="pil")
    )


def test_calls_on_one_pipeline_wait_for_each_other(pipe, draw):
    """One scheduler counts for one call: a second that came between would cost the first its pictures, or leave its hand on the step."""
    from threading import Thread

    first, second = (draw(pipe, [SLD], num_inference_steps=n) for n in (4, 5))
    found, others = {}, []

    def between(pipeline, i, t, kwargs):
        if i == 1:
            others.append(
                Thread(target=lambda: found.update(other=draw(pipe, [SLD], num_inference_steps=5)))
            )
            others[0].start()
            others[0].join(0.5)
        return kwargs

    own = draw(pipe, [SLD], callback_on_step_end=between)
    others[0].join()
    assert np.array_equal(arrays(own), arrays(first))
    assert np.array_equal(arrays(found["other"]), arrays(second))
    assert "step" not in vars(pipe.scheduler)
    assert not pipe.unet._forward_hooks


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"negative_prompt": ["x"]},
            "negative_prompt must be one text, or one a prompt, 2 in all, got 1",
        ),
        (
            {"negative_prompt": ["x"] * 3},
            "negative_prompt must be one text, or one a prompt, 2 in all, got 3",
        ),
        ({"copies": 0}, "copies must be >= 1, got 0"),
        (
            {"generator": [torch.Generator()]},
            "generator must be one, or a list with one a picture, 2 in all, got 1",
        ),
        ({"generator": [torch.Generator()] * 3}, "one a picture, 2 in all, got 3"),
        ({"generator": [torch.Generator()] * 2, "copies": 2}, "one a picture, 4 in all, got 2"),
    ],
)
def test_what_does_not_go_with_the_prompts_is_refused_in_one_line(pipe, options, says):
    with pytest.raises(ConfigError, match=says) as caught:
        GuardedPipeline(pipe, [read_guard(SLD)]).draw(PROMPTS[:2], num_inference_steps=1, **options)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def redraws(tiny_folder):
    """Return a tiny pipeline that draws over pictures."""
    from diffusers import StableDiffusionImg2ImgPipeline

    found = StableDiffusionImg2ImgPipeline.from_pretrained(
        tiny_folder, safety_checker=None, feature_extractor=None
    )
    found.set_progress_bar_config(disable=True)
    return found


@pytest.mark.parametrize("kind", ["list", "batch", "array"])
def test_pictures_to_draw_over_go_with_the_prompts_that_are_drawn(redraws, draw, kind):
    given = [Image.new("RGB", (32, 32), colour) for colour in ("red", "green", "blue")]
    batch = torch.stack([torch.from_numpy(np.array(one)).permute(2, 0, 1) / 255 for one in given])
    own = {"list": given, "batch": batch, "array": batch.permute(0, 2, 3, 1).numpy()}[kind]
    gone, *shown = draw(
        redraws,
        [{"name": "prompt-filter", "words": ["red cube"]}],
        PROMPTS,
        image=own,
        strength=0.5,
    )
    assert gone.image is None
    assert gone.trail.action == "block"
    assert [one.trail.action for one in shown] == ["none", "none"]
    alone = draw(redraws, [], PROMPTS, image=own, strength=0.5)
    assert np.allclose(arrays(shown), arrays(alone)[1:], atol=1e-4)
    swapped = draw(redraws, [], PROMPTS, image=given[:1] * 3, strength=0.5)
    assert not np.allclose(arrays(shown), arrays(swapped)[1:], atol=1e-2)


def test_several_pictures_to_one_prompt_are_the_pipelines_own_affair(redraws, draw):
    seen = []

    class Several(type(redraws)):
        """A pipeline that takes several pictures to a prompt, as those that edit pictures do."""

        @torch.no_grad()
        def __call__(self, prompt=None, image=None, **rest):
            seen.append(list(image))
            return super().__call__(prompt=prompt, image=image[0], **rest)

    pipe = Several(**redraws.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    given = [Image.new("RGB", (32, 32), colour) for colour in ("red", "green")]
    (one,) = draw(
        pipe,
        [{"name": "prompt-filter", "words": ["red cube"]}],
        PROMPTS[1:2],
        image=given,
        strength=0.5,
    )
    assert one.trail.action == "none"
    assert seen == [given]


def test_pictures_that_do_not_go_with_the_prompts_are_refused_in_one_line(redraws):
    with pytest.raises(
        ConfigError, match="image must be one picture, or one a prompt, 3 in all, got 2"
    ):
        GuardedPipeline(redraws, []).draw(
            PROMPTS, image=[Image.new("RGB", (32, 32))] * 2, num_inference_steps=2
        )


@pytest.mark.parametrize(
    "guard",
    [NEGATIVE, {"name": "crops", "judge": "mini", "threshold": 1.0, "probes": 1, "steps": 1}],
)
def test_one_negative_prompt_is_that_of_every_prompt_and_any_sequence_goes_with_them(
    pipe, draw, guard
):
    one, each, pair = (
        draw(pipe, [guard], negative_prompt=away)
        for away in ("a tree", ["a tree"] * 2, ("a tree", "a tree"))
    )
    assert np.array_equal(arrays(one), arrays(each))
    assert np.array_equal(arrays(pair), arrays(each))


def test_copies_stand_side_by_side_where_they_are_called_videos_and_are_refused_where_there_are_none(
    tiny_wan, pipe
):
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
    found = GuardedPipeline(tiny_wan, [read_guard(ZERO)]).draw(
        PROMPTS[:2], copies=2, generator=rng.manual_seed(0), **small
    )
    assert np.array_equal(arrays(found), base)

    class Single(type(pipe)):
        def __call__(self, prompt):
            raise AssertionError

    own = Single(**pipe.components, requires_safety_checker=False)
    with pytest.raises(
        ConfigError,
        match="a Single draws each prompt once, so copies must be 1, got 2; repeat the prompt",
    ):
        GuardedPipeline(own, [read_guard(JUDGE)]).draw(PROMPTS[:2], copies=2)


def test_a_rescaling_of_none_is_no_rescaling(pipe, draw):
    engine = GuardedPipeline(pipe, [read_guard(SLD)])
    engine.border.refuse({"guidance_rescale": None}, guided=["sld"], inside=["sld"])


def test_the_pipeline_is_as_it_was_after_an_interrupt_from_the_keyboard(pipe, draw):
    def stop(pipeline, i, t, kwargs):
        raise KeyboardInterrupt

    base = draw(pipe)
    guards = [SLD, NEGATIVE, {"name": "safree", "phrases": [TEXT, "red"], "reattend": True}]
    with pytest.raises(KeyboardInterrupt):
        draw(pipe, guards, callback_on_step_end=stop)
    assert np.array_equal(draw(pipe), base)
    assert not any(
        module._forward_hooks or module._forward_pre_hooks for module in pipe.unet.modules()
    )
    assert "step" not in vars(pipe.scheduler)
