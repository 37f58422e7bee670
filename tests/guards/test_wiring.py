"""Guards of one's own: their methods must match their hook points, their answers the images."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from safegen.core.errors import ConfigError
from safegen.guards import GuardConfig, GuardResult, read_guard
from safegen.guards.core.adapter import ALL_POINTS
from safegen.guards.core.base import Guard, GuardHook
from safegen.guards.core.checks import GUARD_METHODS, HOOK_METHODS
from safegen.guards.core.pipeline import GuardedPipeline
from safegen.models.families.conditioning import Conditioning

PROMPTS = ("a red cube on a white table", "a blue ball in the grass", "a green cone under a tree")
SLD = {"name": "sld", "preset": "max", "text": "a red cube"}
REATTEND = {"name": "safree", "phrases": ["a red cube", "red"], "reattend": True}


def config_with(points, guard=None, **methods):
    """Return settings of a guard whose hook has some methods; `guard` replaces its class."""
    hook = type("OwnHook", (GuardHook,), methods)

    class OwnGuard(Guard):
        def start(self, call):
            return hook()

    class OwnConfig(GuardConfig):
        name: str = "own"
        hook_points = frozenset(points)

        def build(self, adapter):
            return (guard or OwnGuard)(self)

    return OwnConfig()


def same(self, embeds):
    return embeds


def test_every_hook_point_has_its_method():
    assert {*GUARD_METHODS.values(), *HOOK_METHODS.values()} == ALL_POINTS
    assert all(hasattr(Guard, name) for name in GUARD_METHODS)
    assert all(hasattr(GuardHook, name) for name in HOOK_METHODS)


@pytest.mark.parametrize(
    ("points", "methods", "says"),
    [
        (
            {"prompt_embeds"},
            {"edit_prompt_embed": same},
            r"methods of GuardHook, got 'edit_prompt_embed'\. Did you mean 'edit_prompt_embeds'\?",
        ),
        (
            {"guidance"},
            {"edit_prompt_embeds": same},
            "must implement guidance_correction of GuardHook for its hook point 'guidance', got",
        ),
        (
            {"guidance"},
            {"extra_conditions": lambda self: {}, "correction": same},
            "must implement guidance_correction of GuardHook",
        ),
        ({"latents"}, {}, "must implement on_step_end of GuardHook for its hook point 'latents'"),
        (
            {"prompt_embeds"},
            {"edit_prompt_embeds": same, "on_step_end": same},
            "hook_points of the guard 'own' must have 'latents' for on_step_end, got "
            r"'prompt_embeds'\. Add it",
        ),
        (
            {"prompt_embeds"},
            {"edit_prompt_embeds": same, "on_steps_end": same},
            "Did you mean 'on_step_end'",
        ),
        (
            {"prompt_embeds"},
            {"edit_prompt_embeds": same, "submodule_hooks": lambda self, network: ()},
            "must have 'submodules' for submodule_hooks",
        ),
    ],
)
def test_a_hook_that_disagrees_with_its_hook_points_is_refused(
    tiny_model, generate, points, methods, says
):
    with pytest.raises(ConfigError, match=says) as caught:
        generate(tiny_model.pipeline, [config_with(points, **methods)])
    assert "\n" not in str(caught.value)


class MisspeltGuard(Guard):
    def check_prompt(self, prompts):
        return [GuardResult("block")] * len(prompts)


class UndeclaredGuard(Guard):
    def check_prompts(self, prompts):
        return [GuardResult()] * len(prompts)

    def check_images(self, images, prompts):
        return [GuardResult("refuse")] * len(images)


class StreamGuard(UndeclaredGuard):
    check_images = Guard.check_images

    def wants_reference_stream(self, prompts):
        return [True] * len(prompts)


class NoHookGuard(Guard):
    def start(self, call):
        return object()


@pytest.mark.parametrize(
    ("points", "guard", "says"),
    [
        ({"prompt"}, MisspeltGuard, "Did you mean 'check_prompts'"),
        ({"image"}, Guard, "must implement check_images of Guard for its hook point 'image'"),
        ({"prompt"}, UndeclaredGuard, "must have 'image' for check_images, got 'prompt'"),
        ({"prompt"}, StreamGuard, "must have 'latents' for wants_reference_stream, got 'prompt'"),
        ({"prompt_embeds"}, Guard, "must implement start for 'prompt_embeds', got none"),
        ((), UndeclaredGuard, "must have a hook point, got none"),
        ({"prompt_embeds"}, NoHookGuard, "must return a GuardHook, got object"),
    ],
)
def test_a_guard_that_disagrees_with_its_hook_points_is_refused(
    tiny_model, generate, points, guard, says
):
    with pytest.raises(ConfigError, match=says) as caught:
        generate(tiny_model.pipeline, [config_with(points, guard)], output_type="pil")
    assert "\n" not in str(caught.value)


def test_a_guard_with_a_hook_and_no_hook_point_inside_is_refused(tiny_model):
    class Both(UndeclaredGuard):
        check_images = Guard.check_images

        def start(self, call):
            return GuardHook()

    with pytest.raises(ConfigError, match="must name those of its hook, got 'prompt'"):
        GuardedPipeline(tiny_model.pipeline, [config_with({"prompt"}, Both)])


def test_helpers_with_other_names_are_allowed(tiny_model, generate):
    own = config_with({"prompt_embeds"}, edit_prompt_embeds=same, enter=same, _edit_prompt=same)
    assert all(o.image is not None for o in generate(tiny_model.pipeline, [own]))


def pick(embeds, rows):
    return embeds[rows]


WRONG_ROWS = {
    "one row for several images": [0],
    "fewer rows": [0, 1],
    "more rows": [0, 1, 2, 0],
    "no row": [],
}
"""Rows that are not one for each of three images."""


@pytest.mark.parametrize("rows", WRONG_ROWS.values(), ids=WRONG_ROWS)
@pytest.mark.parametrize(
    "method",
    [
        "edit_prompt_embeds",
        "edit_negative_embeds",
        "extra_conditions",
        "guidance_correction",
        "on_step_end",
    ],
)
@pytest.mark.parametrize("family", ["sd", "wan"])
def test_a_wrong_number_of_rows_withholds_the_batch(
    tiny_model, tiny_wan, generate, rows, method, family
):
    pipe = tiny_model.pipeline if family == "sd" else tiny_wan
    small = {"height": 16, "width": 16, "num_frames": 1, "max_sequence_length": 16}
    options = {"num_inference_steps": 2} | (small if family == "wan" else {})
    extra = Conditioning(torch.zeros((3, 16 if family == "wan" else 32, 32)))
    methods = {
        "edit_prompt_embeds": lambda self, embeds: embeds[rows],
        "edit_negative_embeds": lambda self, embeds: embeds[rows],
        "extra_conditions": lambda self: {"safety": extra[[i % 3 for i in rows]]},
        "guidance_correction": lambda self, p: p["cond"][rows],
        "on_step_end": lambda self, latents: latents[rows],
    }
    own = methods | {"guidance_correction": lambda self, p: None} | {method: methods[method]}
    names = {method} | ({"guidance_correction"} if "guidance" in HOOK_METHODS[method] else set())
    own = config_with({HOOK_METHODS[method]}, **{name: own[name] for name in names})
    outputs = generate(pipe, [own], PROMPTS, **options)
    assert [o.image for o in outputs] == [None] * 3
    assert {o.trace.action for o in outputs} == {"withhold"}
    assert all(o.trace.reason.startswith("error: own: ") for o in outputs)


@pytest.mark.parametrize(
    "answer",
    [
        None,
        torch.zeros(2),
        Conditioning(torch.zeros(2, 32, 32)),
        Conditioning(torch.zeros(2, 7, 64), torch.zeros(2, 32)),
        Conditioning(torch.zeros(2, 32, 64), torch.zeros(1, 32)),
    ],
)
def test_embeddings_of_another_kind_withhold_the_batch(tiny_xl, generate, answer):
    own = config_with({"prompt_embeds"}, edit_prompt_embeds=lambda self, embeds: answer)
    outputs = generate(tiny_xl, [own], PROMPTS[:2])
    assert [o.image for o in outputs] == [None, None]
    assert {o.trace.action for o in outputs} == {"withhold"}


def test_one_row_can_be_expanded_to_all_images(tiny_model, generate):
    def first(self, embeds):
        return embeds[[0]].expand(len(embeds.hidden))

    own = config_with({"prompt_embeds"}, edit_prompt_embeds=first)
    outputs = generate(tiny_model.pipeline, [own], PROMPTS[:2])
    wanted = generate(tiny_model.pipeline, None, [PROMPTS[0]] * 2)
    assert np.abs(np.stack([o.image for o in outputs]) - wanted).max() < 1e-4


def test_initial_latents_of_another_shape_withhold_the_batch(tiny_model, generate):
    class Probing(Guard):
        def probe(self, generate, prompts, options):
            return [GuardResult("edit", "moved", latents=torch.zeros(4, 8, 4)) for _ in prompts]

    outputs = generate(tiny_model.pipeline, [config_with({"probe"}, Probing)], PROMPTS[:2])
    assert [o.image for o in outputs] == [None, None]


@pytest.mark.parametrize("guard", [SLD, REATTEND], ids=["sld", "reattend"])
@pytest.mark.parametrize("when", [0, 2])
def test_removed_post_hooks_withhold_where_rows_were_added(tiny_model, generate, guard, when):
    """Without the post-hook, the pipeline gets more rows than it can use, and raises."""

    def remove(pipeline, i, t, kwargs):
        if i == when:
            pipeline.unet._forward_hooks.clear()
        return kwargs

    outputs = generate(tiny_model.pipeline, [guard], callback_on_step_end=remove)
    assert [o.image for o in outputs] == [None, None]
    assert {o.trace.reason for o in outputs} == {"calls: 1 hooks were removed during the call"}
    assert all(o.image is not None for o in generate(tiny_model.pipeline, [guard]))


def test_an_error_of_the_pipeline_is_raised(tiny_model, generate):
    def broken(pipeline, i, t, kwargs):
        raise ZeroDivisionError("in a callback")

    with pytest.raises(ZeroDivisionError, match="in a callback"):
        generate(tiny_model.pipeline, [SLD], callback_on_step_end=broken)


def test_embeddings_by_position_are_refused_in_one_line(tiny_model, generate, monkeypatch):
    pipe = tiny_model.pipeline
    call = type(pipe.unet).__call__

    def by_position(net, sample, t, encoder_hidden_states, **kwargs):
        return call(net, sample, t, encoder_hidden_states, **kwargs)

    monkeypatch.setattr(type(pipe.unet), "__call__", by_position)
    with pytest.raises(ConfigError, match="encoder_hidden_states must be given to the denoiser by"):
        generate(pipe, [SLD])


@pytest.mark.parametrize("guard", [SLD, {"name": "prompt-filter", "words": ["x"]}])
def test_clip_skip_is_refused_where_it_cannot_work(tiny_model, tiny_xl, generate, guard):
    with pytest.raises(ConfigError, match=r"clip_skip must be None with transformers 5, got 1\."):
        generate(tiny_model.pipeline, [guard], clip_skip=1)
    plain = generate(tiny_xl, [read_guard(guard)])
    skipped = generate(tiny_xl, [read_guard(guard)], clip_skip=1)
    assert not np.array_equal(plain[0].image, skipped[0].image)


def with_points(config_points, points):
    """Return settings of a guard whose instance has hook points of its own."""

    class PointsGuard(Guard):
        def __init__(self, config):
            super().__init__(config)
            self.hook_points = frozenset(points)
            hook = type("PointsHook", (GuardHook,), {"edit_prompt_embeds": same})
            members = {
                "check_prompts": lambda prompts: [GuardResult()] * len(prompts),
                "check_images": lambda images, prompts: [GuardResult("refuse")] * len(images),
                "start": lambda call: hook(),
            }
            needed = {"check_prompts": "prompt", "check_images": "image", "start": "prompt_embeds"}
            for name, point in needed.items():
                if point in points:
                    setattr(self, name, members[name])

    return config_with(config_points, PointsGuard)


def own_call(self, *args, **kwargs):
    return super(type(self), self).__call__(*args, **kwargs)


def test_hook_points_of_a_guard_alone_are_checked_against_the_pipeline(tiny_model, tiny_wan):
    pipe = tiny_model.pipeline
    own = type("MyPipe", (type(pipe),), {"__call__": own_call})(
        **pipe.components, requires_safety_checker=False
    )
    guard = with_points({"prompt"}, {"prompt", "prompt_embeds"})
    assert GuardedPipeline(pipe, [guard]).guards
    with pytest.raises(ConfigError, match=r"on a MyPipe: it acts inside .* MyPipe replaces __call"):
        GuardedPipeline(own, [guard])
    with pytest.raises(ConfigError, match=r"on a WanPipeline: it checks images, and this pipel"):
        GuardedPipeline(tiny_wan, [with_points({"prompt"}, {"prompt", "image"})])


@pytest.mark.parametrize("points", [(), {"prompt"}])
def test_a_guard_with_fewer_hook_points_than_its_settings_is_refused(tiny_model, points):
    says = r"hook_points of the guard 'own' must have 'image' of its settings, got (none|'prompt')"
    with pytest.raises(ConfigError, match=says) as caught:
        GuardedPipeline(tiny_model.pipeline, [with_points({"image"}, points)])
    assert "\n" not in str(caught.value)


def test_hook_points_changed_after_the_build_are_checked_too(tiny_model, generate):
    engine = GuardedPipeline(tiny_model.pipeline, [with_points({"image"}, {"image"})])
    assert [o.image for o in generate(tiny_model.pipeline, engine=engine, output_type="pil")] == [
        None,
        None,
    ]
    engine.guards[0].hook_points = frozenset()
    with pytest.raises(ConfigError, match="must have 'image' of its settings, got none"):
        generate(tiny_model.pipeline, engine=engine, output_type="pil")
