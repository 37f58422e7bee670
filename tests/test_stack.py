"""Stacks: what a word means, what a hash rests on, and that a model comes back as it was."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

from safegen.core.errors import ConfigError, FileError, UnknownNameError
from safegen.core.generation import GenerationConfig, Sample
from safegen.stack import Stack, StackLoader, add_guards, add_patches, load_stack, pipeline_hash

ASKS, SAMPLER = (
    [Sample(prompt="a red cube", seed=1), Sample(prompt="a blue ball", seed=1, index=1)],
    GenerationConfig(num_inference_steps=2),
)


@pytest.fixture(scope="module")
def patches(tmp_path_factory, tiny_folder):
    """Return two patches that change the same tensors of the tiny model."""
    from safegen.models.model import load
    from safegen.models.selectors import select_parameters
    from safegen.patches.patch import Patch

    model = load(str(tiny_folder))
    own = dict(model.denoiser.named_parameters())
    paths = []
    for name, by in (("a", 3.0), ("b", -2.0)):
        paths.append(tmp_path_factory.mktemp("patches") / f"{name}.safetensors")
        Patch(
            {k: own[k] * by for k in select_parameters(model.denoiser, "attn1")},
            {"base": model.hash},
        ).save(paths[-1])
    return paths


def test_a_model_a_recipe_and_a_spec_can_mean_the_same(tmp_path, tiny_folder, patches):
    (tmp_path / "model").symlink_to(tiny_folder)
    (tmp_path / "p.safetensors").symlink_to(patches[0])
    recipe = tmp_path / "calm.toml"
    recipe.write_text('model = "model"\npatches = ["p.safetensors"]\n')
    stack, spec = (
        load_stack(str(recipe)),
        load_stack(f"calm={tmp_path / 'model'}+{tmp_path / 'p.safetensors'}"),
    )
    assert stack == spec
    assert stack.name == "calm"
    assert load_stack("mini") == Stack(name="mini", model="mini")


@pytest.mark.parametrize(
    ("spec", "error", "says"),
    [
        ("minni", UnknownNameError, "Did you mean 'mini'"),
        ("no.toml", FileError, "does not exist"),
        ("a b=mini", ConfigError, "NAME=model"),
        ("../x=mini", ConfigError, "NAME=model"),
        ("x=", ConfigError, "NAME=model"),
        ("x=mini+", ConfigError, "NAME=model"),
        ("x=r.toml", ConfigError, "a recipe says its own name"),
    ],
)
def test_a_spec_that_means_nothing_is_refused(spec, error, says):
    with pytest.raises(error, match=says):
        load_stack(spec)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('model = "mini"\nguards = ["sdl"]', "no guard named 'sdl'. Did you mean 'sld'"),
        ('model = "mini"\nguards = ["sld-maxx"]', "Did you mean 'max'"),
        ('model = "mini"\n[[guards]]\nname = "sld"\nscal = 3', "Did you mean 'scale'"),
        ('model = "mini"\nguards = ["judge-filter"]', "judge is required"),
        (
            'model = "mini"\n[[guards]]\nname = "sld"\npreset = 3',
            "guards: guard 'sld': preset must be a name, got 3",
        ),
        (
            'model = "mini"\n[[guards]]\nname = "sld"\nconcept = 3',
            "guards: guard 'sld': concept must be a name, got 3",
        ),
        ('model = "mini"\nguards = "sld"', "guards must be a valid tuple"),
        (
            'model = "mini"\n[[guards]]\nname = "sld"\nconcept = "no.toml"',
            "no.toml' does not exist",
        ),
        ('model = "mini"\nblank = true\nguards = ["sld"]', "no effect on a blank stack"),
        ('model = "mini"\nblank = true\nnegative_prompt = "x"', "no effect on a blank stack"),
        ('model = "mini"\nnum_inference_steps = 3', "steps"),
        ("patches = []", "model"),
        ("model", "not a stack file"),
    ],
)
def test_a_recipe_with_an_idle_or_unknown_setting_is_refused(tmp_path, text, says):
    (tmp_path / "s.toml").write_text(text)
    with pytest.raises(FileError, match=says) as caught:
        load_stack(str(tmp_path / "s.toml"))
    assert "\n" not in str(caught.value)


def test_a_recipe_names_the_small_files_that_a_one_file_checkpoint_lacks(
    tiny_model, tiny_folder, tmp_path
):
    from safetensors.torch import load_file, save_file

    from safegen.models.checkpoint.single_file import save_single_file

    save_single_file(tiny_model, tmp_path / "whole.safetensors", dtype="fp32")
    save_file(load_file(tmp_path / "whole.safetensors"), tmp_path / "bare.safetensors")
    (tmp_path / "small").symlink_to(tiny_folder)
    (tmp_path / "s.toml").write_text('model = "bare.safetensors"\nconfig = "small"')
    stack, shelf = load_stack(str(tmp_path / "s.toml")), StackLoader()
    assert stack.is_base
    assert shelf.hash(stack) == StackLoader().hash(Stack(name="t", model=str(tiny_folder)))
    with pytest.raises(FileError, match="--config"):
        shelf.hash(
            stack.model_copy(update={"config": None})
        )  # what is kept was loaded with the folder
    with pytest.raises(ConfigError, match="config has no effect on 'mini'"):
        shelf.hash(Stack(name="t", model="mini", config=tiny_folder))


def test_a_concepts_file_is_looked_for_beside_its_recipe(tmp_path, monkeypatch):
    from safegen.core import concept

    (tmp_path / "away").mkdir()
    own = (Path(concept.__file__).parent / "concepts" / "fire.toml").read_text(encoding="utf-8")
    (tmp_path / "away" / "own.toml").write_text(own, encoding="utf-8")
    (tmp_path / "away" / "s.toml").write_text(
        'model = "mini"\n[[guards]]\nname = "sld"\nconcept = "own.toml"'
    )
    monkeypatch.chdir(tmp_path)
    assert load_stack("away/s.toml").guards[0].text == "fire, flames, burning"


def test_a_hash_rests_on_weights_patches_their_order_and_the_negative_prompt(
    make_model, tiny_folder, patches
):
    shelf, name = StackLoader(), str(tiny_folder)
    stacks = [
        Stack(name="s", model=name),
        Stack(name="s", model=name, patches=(patches[0],)),
        Stack(name="s", model=name, patches=tuple(patches)),
        Stack(name="s", model=name, patches=tuple(patches[::-1])),
        Stack(name="s", model=name, negative_prompt=""),
        Stack(name="s", model=name, negative_prompt="cube"),
        Stack(name="s", model=name, blank=True),
    ]
    hashes = [shelf.hash(s) for s in stacks]
    assert len(set(hashes)) == len(stacks)
    assert shelf.hash(Stack(name="t", model=name)) == hashes[0]  # a name decides no picture
    assert stacks[0].hash(make_model(1)) != stacks[0].hash(make_model(2))
    assert pipeline_hash(make_model(1)) != pipeline_hash(make_model(1, beta_end=0.02))
    other = make_model(1)
    other.vae.register_to_config(scaling_factor=0.5)
    assert pipeline_hash(other) != pipeline_hash(make_model(1))
    other = make_model(1)
    other.denoiser.register_to_config(attention_head_dim=1)
    assert pipeline_hash(other) != pipeline_hash(make_model(1))
    other = make_model(1)
    other.denoiser.register_to_config(sample_size=16)
    assert pipeline_hash(other) != pipeline_hash(make_model(1))
    other = make_model(1)
    other.pipeline.tokenizer.model_max_length -= 1
    assert pipeline_hash(other) != pipeline_hash(make_model(1))
    other = make_model(1)
    other.pipeline.scheduler = DDPMScheduler.from_config(other.pipeline.scheduler.config)
    assert pipeline_hash(other) != pipeline_hash(make_model(1))


def test_a_shelf_loads_a_model_once_and_patches_come_off_exactly(tiny_folder, patches):
    from safegen.patches.patch import PatchOverlapWarning

    shelf, name = StackLoader(), str(tiny_folder)
    plain, both = (
        Stack(name="plain", model=name),
        Stack(name="both", model=name, patches=tuple(patches)),
    )
    model, weights = shelf.model(name)
    with shelf.open(plain) as ready:
        before = ready.generate_images(ASKS, SAMPLER)
    with ExitStack() as on:
        with pytest.warns(PatchOverlapWarning, match="the last patch counts"):
            ready = on.enter_context(shelf.open(both))
        assert ready.model is model
        assert ready.hash == shelf.hash(both)
        edited = ready.generate_images(ASKS, SAMPLER)
    with shelf.open(plain) as ready:
        after = ready.generate_images(ASKS, SAMPLER)
    assert pipeline_hash(model) == weights
    assert [p.tobytes() for p in after] == [p.tobytes() for p in before]
    assert [p.tobytes() for p in edited] != [p.tobytes() for p in before]


def test_a_patch_comes_off_when_drawing_fails_or_the_next_patch_does_not_fit(
    tiny_folder, patches, tmp_path
):
    import torch

    from safegen.core.errors import PatchError
    from safegen.patches.patch import Patch

    shelf, name = StackLoader(), str(tiny_folder)
    model, weights = shelf.model(name)
    with (
        pytest.raises(ZeroDivisionError),
        shelf.open(Stack(name="s", model=name, patches=(patches[0],))),
    ):
        _ = 1 / 0
    assert pipeline_hash(model) == weights
    odd = tmp_path / "odd.safetensors"
    Patch({"nothing.here": torch.zeros(1)}).save(odd)
    with (
        pytest.raises(PatchError),
        shelf.open(Stack(name="s", model=name, patches=(patches[0], odd))),
    ):
        pass
    assert pipeline_hash(model) == weights
    with shelf.open(Stack(name="s", model=name)):
        pass


def test_a_negative_prompt_changes_pictures_and_needs_guidance(tiny_folder):
    shelf, name = StackLoader(), str(tiny_folder)
    with shelf.open(Stack(name="s", model=name)) as ready:
        plain = ready.generate_images(ASKS, SAMPLER)
    with shelf.open(Stack(name="s", model=name, negative_prompt="")) as ready:
        assert [p.tobytes() for p in ready.generate_images(ASKS, SAMPLER)] == [
            p.tobytes() for p in plain
        ]  # blank is what guidance uses anyway
    with shelf.open(Stack(name="s", model=name, negative_prompt="a red cube")) as ready:
        assert [p.tobytes() for p in ready.generate_images(ASKS, SAMPLER)] != [
            p.tobytes() for p in plain
        ]
        with pytest.raises(ConfigError, match="no effect without guidance"):
            ready.generate_images(ASKS, GenerationConfig(num_inference_steps=2, guidance_scale=1))


def test_a_blank_stack_draws_black_pictures_of_the_models_size(tiny_folder):
    shelf = StackLoader()
    with shelf.open(Stack(name="black", model=str(tiny_folder), blank=True)) as ready:
        (picture, _) = ready.generate_images(ASKS, SAMPLER)
    assert picture.size == (ready.model.size, ready.model.size)
    assert picture.getextrema() == ((0, 0), (0, 0), (0, 0))


GUARDS = (
    {"name": "sld", "preset": "max", "text": "a green cone"},
    {"name": "prompt-filter", "words": ["blue ball"]},
)


def test_guards_decide_the_hash_by_their_settings_and_order(tiny_folder):
    shelf, name = StackLoader(), str(tiny_folder)
    stacks = [
        Stack(name="s", model=name),
        Stack(name="s", model=name, guards=GUARDS),
        Stack(name="s", model=name, guards=GUARDS[::-1]),
        Stack(name="s", model=name, guards=GUARDS[:1]),
        Stack(name="s", model=name, guards=({**GUARDS[0], "scale": 1.0},)),
    ]
    assert len({shelf.hash(s) for s in stacks}) == len(stacks)
    assert [s.is_base for s in stacks] == [True, False, False, False, False]
    again = Stack.model_validate_json(stacks[1].model_dump_json())
    assert again == stacks[1]
    assert shelf.hash(again) == shelf.hash(stacks[1])


def test_a_recipe_of_guards_draws_with_them_and_its_pictures_carry_a_trail(tmp_path, tiny_folder):
    (tmp_path / "model").symlink_to(tiny_folder)
    recipe = tmp_path / "safe.toml"
    recipe.write_text(
        'model = "model"\n[[guards]]\nname = "sld"\npreset = "max"\ntext = "a green cone"\n'
        '[[guards]]\nname = "prompt-filter"\nwords = ["blue ball"]\n'
    )
    shelf, stack = StackLoader(), load_stack(str(recipe))
    assert [g.name for g in stack.guards] == ["sld", "prompt-filter"]
    with shelf.open(Stack(name="plain", model=stack.model)) as ready:
        plain = ready.generate_images(ASKS, SAMPLER)
    with shelf.open(stack) as ready:
        shown, gone = ready.generate(ASKS, SAMPLER)
        pictures = ready.generate_images(ASKS, SAMPLER)
    assert (shown.trail.action, shown.trail.reason) == ("edit", "sld: steered")
    assert (gone.image, gone.trail.action, gone.trail.reason) == (
        None,
        "block",
        "prompt-filter: word",
    )
    assert pictures[0].tobytes() == shown.image.tobytes() != plain[0].tobytes()
    assert (
        pictures[1].getextrema() == ((0, 0),) * 3
    )  # what was withheld is black where a picture must be
    with shelf.open(Stack(name="plain", model=stack.model)) as ready:
        assert [p.tobytes() for p in ready.generate_images(ASKS, SAMPLER)] == [
            p.tobytes() for p in plain
        ]


def test_a_guard_on_a_patch_sees_the_patched_model(tiny_folder, patches):
    shelf, name = StackLoader(), str(tiny_folder)
    found = []
    for own in ((), (patches[0],)):
        with shelf.open(Stack(name="s", model=name, patches=own, guards=GUARDS[:1])) as ready:
            found.append(ready.generate_images(ASKS, SAMPLER)[0].tobytes())
    assert found[0] != found[1]


def test_weights_of_a_guard_are_beside_its_recipe(tmp_path):
    (tmp_path / "s.toml").write_text(
        'model = "mini"\nguards = [{name = "safety-checker", weights = "checker"}]\n'
    )
    assert load_stack(str(tmp_path / "s.toml")).guards[0].weights == tmp_path / "checker"
    (tmp_path / "s.toml").write_text(
        'model = "mini"\nguards = [{name = "safety-checker", weights = "hub:a/b"}]\n'
    )
    assert load_stack(str(tmp_path / "s.toml")).guards[0].weights == "hub:a/b"


@pytest.mark.parametrize("name", ["judge-filter", "crops", "pno"])
def test_files_of_a_guards_judge_are_beside_its_recipe(tmp_path, name):
    own = ', unsafe = ["a"], safe = ["b"], weights = "clip"' if name == "pno" else ""
    for word, want in (
        ("tower", str(tmp_path / "tower")),
        ("mini", "mini"),
        ("hub:a/b", "hub:a/b"),
    ):
        options = f'{{weights = "{word}", prompts = "two.safetensors", allow_pickle = false}}'
        (tmp_path / "s.toml").write_text(
            f'model = "mini"\nguards = [{{name = "{name}", judge = "q16", options = {options}{own}}}]\n'
        )
        (guard,) = load_stack(str(tmp_path / "s.toml")).guards
        assert guard.options == {
            "weights": want,
            "prompts": str(tmp_path / "two.safetensors"),
            "allow_pickle": False,
        }
        assert getattr(guard, "weights", None) == (
            str(tmp_path / "clip") if name == "pno" else None
        )


def test_words_of_the_command_line_become_guards():
    mini = Stack(name="s", model="mini")
    stack = add_guards(mini, ["sld-max", "prompt-filter"], "skulls")
    assert [(g.name, getattr(g, "text", None)) for g in stack.guards] == [
        ("sld", "skulls, a skull"),
        ("prompt-filter", None),
    ]
    assert add_guards(mini, []) == mini
    with pytest.raises(ConfigError, match="no guard takes anything from it"):
        add_guards(mini, [], "skulls")
    with pytest.raises(ConfigError, match="no effect on the blank stack"):
        add_guards(Stack(name="s", model="mini", blank=True), ["sld"])


def test_patches_come_after_a_stacks_own_and_a_blank_one_takes_none():
    stack = Stack(name="s", model="mini", patches=(Path("a"),))
    assert add_patches(stack, [Path("b")]).patches == (Path("a"), Path("b"))
    with pytest.raises(
        ConfigError, match="patches have no effect on the blank stack 's'; leave them out"
    ):
        add_patches(Stack(name="s", model="mini", blank=True), [Path("b")])
