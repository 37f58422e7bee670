"""Stacks: parsing, hashing, loading and generating."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

from safegen.core.errors import ConfigError, FileError, UnknownNameError
from safegen.core.generation import GenerationConfig, Sample
from safegen.stack import Stack, add_guards, add_patches, load_stack
from safegen.stack_loader import StackLoader

SAMPLES, GENERATION_CONFIG = (
    [Sample(prompt="a red cube", seed=1), Sample(prompt="a blue ball", seed=1, index=1)],
    GenerationConfig(num_inference_steps=2),
)


@pytest.fixture(scope="module")
def patches(tmp_path_factory, tiny_folder):
    """Return two patches that change the same tensors of the tiny model."""
    from safegen.models.checkpoint.metadata import PatchMetadata
    from safegen.models.loading import load
    from safegen.models.selectors import select_parameters
    from safegen.patches.patch import Patch

    model = load(str(tiny_folder))
    own = dict(model.denoiser.named_parameters())
    paths = []
    for name, by in (("a", 3.0), ("b", -2.0)):
        paths.append(tmp_path_factory.mktemp("patches") / f"{name}.safetensors")
        Patch(
            {k: own[k] * by for k in select_parameters(model.denoiser, "attn1")},
            PatchMetadata(base=model.hash),
        ).save(paths[-1])
    return paths


def test_a_recipe_and_a_spec_can_be_equal(tmp_path, tiny_folder, patches):
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
        ("x=r.toml", ConfigError, "a recipe must be given without a name"),
        (Stack(name="a", model="mini"), ConfigError, "must be a name or a path, got Stack"),
    ],
)
def test_an_invalid_spec_is_refused(spec, error, says):
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
        ('model = "mini"\nguards = "sld"', "guards must be a list, got 'sld'"),
        (
            'model = "mini"\n[[guards]]\nname = "sld"\nconcept = "no.toml"',
            "no.toml' does not exist",
        ),
        ('model = "mini"\nblank = true\nguards = ["sld"]', "a blank stack must have no"),
        ('model = "mini"\nblank = true\nnegative_prompt = "x"', "a blank stack must have no"),
        ('model = "mini"\nnum_inference_steps = 3', "steps"),
        ("patches = []", "model"),
        ("model", "is not TOML"),
    ],
)
def test_a_recipe_with_invalid_settings_is_refused(tmp_path, text, says):
    (tmp_path / "s.toml").write_text(text)
    with pytest.raises(FileError, match=says) as caught:
        load_stack(str(tmp_path / "s.toml"))
    assert "\n" not in str(caught.value)


def test_a_recipe_can_name_a_configuration_folder(tiny_model, tiny_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    from safegen.models.checkpoint.single_file_writer import save_single_file

    save_single_file(tiny_model, tmp_path / "whole.safetensors", dtype="fp32")
    save_file(load_file(tmp_path / "whole.safetensors"), tmp_path / "bare.safetensors")
    (tmp_path / "small").symlink_to(tiny_folder)
    (tmp_path / "s.toml").write_text('model = "bare.safetensors"\nconfig = "small"')
    stack, loader = load_stack(str(tmp_path / "s.toml")), StackLoader()
    assert stack.is_base
    assert loader.hash(stack) == StackLoader().hash(Stack(name="t", model=str(tiny_folder)))
    with pytest.raises(FileError, match="--config"):
        loader.hash(
            stack.model_copy(update={"config": None})
        )  # the cached model was loaded with the folder
    with pytest.raises(ConfigError, match="config must go with a one-file checkpoint, got 'mini'"):
        loader.hash(Stack(name="t", model="mini", config=tiny_folder))


def test_a_concept_file_is_relative_to_the_recipe(tmp_path, monkeypatch):
    from safegen.core import concept

    (tmp_path / "away").mkdir()
    own = (Path(concept.__file__).parent / "concepts" / "fire.toml").read_text(encoding="utf-8")
    (tmp_path / "away" / "own.toml").write_text(own, encoding="utf-8")
    (tmp_path / "away" / "s.toml").write_text(
        'model = "mini"\n[[guards]]\nname = "sld"\nconcept = "own.toml"'
    )
    monkeypatch.chdir(tmp_path)
    assert load_stack("away/s.toml").guards[0].text == "fire, flames, burning"


def test_the_hash_depends_on_weights_patches_order_and_negative_prompt(
    make_model, tiny_folder, patches
):
    loader, name = StackLoader(), str(tiny_folder)
    stacks = [
        Stack(name="s", model=name),
        Stack(name="s", model=name, patches=(patches[0],)),
        Stack(name="s", model=name, patches=tuple(patches)),
        Stack(name="s", model=name, patches=tuple(patches[::-1])),
        Stack(name="s", model=name, negative_prompt=""),
        Stack(name="s", model=name, negative_prompt="cube"),
        Stack(name="s", model=name, blank=True),
    ]
    hashes = [loader.hash(s) for s in stacks]
    assert len(set(hashes)) == len(stacks)
    assert loader.hash(Stack(name="t", model=name)) == hashes[0]  # a name decides no image
    assert stacks[0].hash(make_model(1)) != stacks[0].hash(make_model(2))
    assert make_model(1).pipeline_hash != make_model(1, beta_end=0.02).pipeline_hash
    other = make_model(1)
    other.vae.register_to_config(scaling_factor=0.5)
    assert other.pipeline_hash != make_model(1).pipeline_hash
    other = make_model(1)
    other.denoiser.register_to_config(attention_head_dim=1)
    assert other.pipeline_hash != make_model(1).pipeline_hash
    other = make_model(1)
    other.denoiser.register_to_config(sample_size=16)
    assert other.pipeline_hash != make_model(1).pipeline_hash
    other = make_model(1)
    other.pipeline.tokenizer.model_max_length -= 1
    assert other.pipeline_hash != make_model(1).pipeline_hash
    other = make_model(1)
    other.pipeline.scheduler = DDPMScheduler.from_config(other.pipeline.scheduler.config)
    assert other.pipeline_hash != make_model(1).pipeline_hash


def test_the_loader_caches_the_model_and_undoes_patches(tiny_folder, patches):
    from safegen.patches.patch import PatchOverlapWarning

    loader, name = StackLoader(), str(tiny_folder)
    plain, both = (
        Stack(name="plain", model=name),
        Stack(name="both", model=name, patches=tuple(patches)),
    )
    model, _ = loader.model(name)
    with loader.open(plain) as loaded:
        before = loaded.generate_images(SAMPLES, GENERATION_CONFIG)
    with ExitStack() as on:
        with pytest.warns(PatchOverlapWarning, match="the last patch counts"):
            loaded = on.enter_context(loader.open(both))
        assert loaded.model is model
        assert loaded.hash == loader.hash(both)
        edited = loaded.generate_images(SAMPLES, GENERATION_CONFIG)
    with loader.open(plain) as loaded:
        after = loaded.generate_images(SAMPLES, GENERATION_CONFIG)
    assert model.hash_denoiser() == model.hash
    assert [p.tobytes() for p in after] == [p.tobytes() for p in before]
    assert [p.tobytes() for p in edited] != [p.tobytes() for p in before]


def test_patches_are_undone_on_errors(tiny_folder, patches, tmp_path):
    import torch

    from safegen.core.errors import PatchError
    from safegen.patches.patch import Patch

    loader, name = StackLoader(), str(tiny_folder)
    model, _ = loader.model(name)
    with (
        pytest.raises(ZeroDivisionError),
        loader.open(Stack(name="s", model=name, patches=(patches[0],))),
    ):
        _ = 1 / 0
    assert model.hash_denoiser() == model.hash
    odd = tmp_path / "odd.safetensors"
    Patch({"nothing.here": torch.zeros(1)}).save(odd)
    with (
        pytest.raises(PatchError),
        loader.open(Stack(name="s", model=name, patches=(patches[0], odd))),
    ):
        pass
    assert model.hash_denoiser() == model.hash
    with loader.open(Stack(name="s", model=name)):
        pass


def test_a_negative_prompt_changes_images_and_needs_guidance(tiny_folder):
    loader, name = StackLoader(), str(tiny_folder)
    with loader.open(Stack(name="s", model=name)) as loaded:
        plain = loaded.generate_images(SAMPLES, GENERATION_CONFIG)
    with loader.open(Stack(name="s", model=name, negative_prompt="")) as loaded:
        assert [p.tobytes() for p in loaded.generate_images(SAMPLES, GENERATION_CONFIG)] == [
            p.tobytes() for p in plain
        ]  # guidance uses the empty prompt by default
    with loader.open(Stack(name="s", model=name, negative_prompt="a red cube")) as loaded:
        assert [p.tobytes() for p in loaded.generate_images(SAMPLES, GENERATION_CONFIG)] != [
            p.tobytes() for p in plain
        ]
        with pytest.raises(ConfigError, match="guidance_scale must be > 1"):
            loaded.generate_images(
                SAMPLES, GenerationConfig(num_inference_steps=2, guidance_scale=1)
            )


def test_a_blank_stack_generates_black_images(tiny_folder):
    loader = StackLoader()
    with loader.open(Stack(name="black", model=str(tiny_folder), blank=True)) as loaded:
        (image, _) = loaded.generate_images(SAMPLES, GENERATION_CONFIG)
    assert image.size == (loaded.model.size, loaded.model.size)
    assert image.getextrema() == ((0, 0), (0, 0), (0, 0))


GUARDS = (
    {"name": "sld", "preset": "max", "text": "a green cone"},
    {"name": "prompt-filter", "words": ["blue ball"]},
)


def test_the_hash_depends_on_guards_and_their_order(tiny_folder):
    loader, name = StackLoader(), str(tiny_folder)
    stacks = [
        Stack(name="s", model=name),
        Stack(name="s", model=name, guards=GUARDS),
        Stack(name="s", model=name, guards=GUARDS[::-1]),
        Stack(name="s", model=name, guards=GUARDS[:1]),
        Stack(name="s", model=name, guards=({**GUARDS[0], "scale": 1.0},)),
    ]
    assert len({loader.hash(s) for s in stacks}) == len(stacks)
    assert [s.is_base for s in stacks] == [True, False, False, False, False]
    again = Stack.model_validate_json(stacks[1].model_dump_json())
    assert again == stacks[1]
    assert loader.hash(again) == loader.hash(stacks[1])


def test_a_recipe_with_guards_generates_images_with_traces(tmp_path, tiny_folder):
    (tmp_path / "model").symlink_to(tiny_folder)
    recipe = tmp_path / "safe.toml"
    recipe.write_text(
        'model = "model"\n[[guards]]\nname = "sld"\npreset = "max"\ntext = "a green cone"\n'
        '[[guards]]\nname = "prompt-filter"\nwords = ["blue ball"]\n'
    )
    loader, stack = StackLoader(), load_stack(str(recipe))
    assert [g.name for g in stack.guards] == ["sld", "prompt-filter"]
    with loader.open(Stack(name="plain", model=stack.model)) as loaded:
        plain = loaded.generate_images(SAMPLES, GENERATION_CONFIG)
    with loader.open(stack) as loaded:
        shown, gone = loaded.generate(SAMPLES, GENERATION_CONFIG)
        images = loaded.generate_images(SAMPLES, GENERATION_CONFIG)
    assert (shown.trace.action, shown.trace.reason) == ("edit", "sld: steered")
    assert (gone.image, gone.trace.action, gone.trace.reason) == (
        None,
        "block",
        "prompt-filter: word",
    )
    assert images[0].tobytes() == shown.image.tobytes() != plain[0].tobytes()
    assert images[1].getextrema() == ((0, 0),) * 3  # a withheld image is shown as black
    with loader.open(Stack(name="plain", model=stack.model)) as loaded:
        assert [p.tobytes() for p in loaded.generate_images(SAMPLES, GENERATION_CONFIG)] == [
            p.tobytes() for p in plain
        ]


def test_a_guard_uses_the_patched_model(tiny_folder, patches):
    loader, name = StackLoader(), str(tiny_folder)
    found = []
    for own in ((), (patches[0],)):
        with loader.open(Stack(name="s", model=name, patches=own, guards=GUARDS[:1])) as loaded:
            found.append(loaded.generate_images(SAMPLES, GENERATION_CONFIG)[0].tobytes())
    assert found[0] != found[1]


def test_guard_weights_are_relative_to_the_recipe(tmp_path):
    (tmp_path / "s.toml").write_text(
        'model = "mini"\nguards = [{name = "safety-checker", weights = "checker"}]\n'
    )
    assert load_stack(str(tmp_path / "s.toml")).guards[0].weights == tmp_path / "checker"
    (tmp_path / "s.toml").write_text(
        'model = "mini"\nguards = [{name = "safety-checker", weights = "hub:a/b"}]\n'
    )
    assert load_stack(str(tmp_path / "s.toml")).guards[0].weights == "hub:a/b"


@pytest.mark.parametrize("name", ["judge-filter", "crops", "pno"])
def test_judge_files_of_a_guard_are_relative_to_the_recipe(tmp_path, name):
    own = ', unsafe = ["a"], safe = ["b"], weights = "clip"' if name == "pno" else ""
    for word, want in (
        ("tower", str(tmp_path / "tower")),
        ("mini", "mini"),
        ("hub:a/b", "hub:a/b"),
    ):
        options = f'{{weights = "{word}", prompts = "two.safetensors", allow_pickle = false}}'
        (tmp_path / "s.toml").write_text(
            f'model = "mini"\nguards = [{{name = "{name}", judge = "q16", '
            f"options = {options}{own}}}]\n"
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


def test_command_line_words_become_guards():
    mini = Stack(name="s", model="mini")
    stack = add_guards(mini, ["sld-max", "prompt-filter"], "skulls")
    assert [(g.name, getattr(g, "text", None)) for g in stack.guards] == [
        ("sld", "skulls, a skull"),
        ("prompt-filter", None),
    ]
    assert add_guards(mini, []) == mini
    with pytest.raises(ConfigError, match="concept must be used by a guard"):
        add_guards(mini, [], "skulls")
    with pytest.raises(ConfigError, match="a blank stack must have no"):
        add_guards(Stack(name="s", model="mini", blank=True), ["sld"])


def test_added_patches_come_last_and_blank_stacks_refuse_them():
    stack = Stack(name="s", model="mini", patches=(Path("a"),))
    assert add_patches(stack, [Path("b")]).patches == (Path("a"), Path("b"))
    with pytest.raises(ConfigError, match="a blank stack must have no patches"):
        add_patches(Stack(name="s", model="mini", blank=True), [Path("b")])
