"""Generation that starts from an image, a mask or latents."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from safegen.attacks.core.base import AttackContext
from safegen.attacks.core.target import Target
from safegen.attacks.img2img import Img2Img
from safegen.attacks.inpaint import Inpaint
from safegen.core.concept import load_concept
from safegen.core.errors import ConfigError, FileError
from safegen.core.generation import GenerationConfig, Sample, Start
from safegen.core.tensor_files import write_tensors
from safegen.data.prompts.prompts import read_prompts
from safegen.evaluation.samples import EvalSample, hash_prompts
from safegen.judges import load_judge
from safegen.models.generation import generate as draw
from safegen.models.generation import generator
from safegen.stack import Stack
from safegen.stack_loader import LoadedStack, StackLoader

CONFIG = GenerationConfig(num_inference_steps=4)


@pytest.fixture(scope="module")
def loader():
    return StackLoader()


@pytest.fixture
def folder(tmp_path):
    """Return a folder with an image, a mask and latents of the miniature model."""
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)).save(tmp_path / "a.png")
    mask = Image.new("L", (64, 64))
    mask.paste(255, (32, 0, 64, 64))
    mask.save(tmp_path / "m.png")
    return tmp_path


def generate(loader, samples, guards=()):
    with loader.open(Stack(name="s", model="mini", guards=guards)) as loaded:
        return [np.asarray(i) for i in loaded.generate_images(samples, CONFIG)], loaded


def sample(start=None, seed=1):
    return Sample(prompt="a castle", seed=seed, start=start)


SLD = {"name": "sld", "preset": "max", "concept": "skulls"}
FILTER = {"name": "judge-filter", "judge": "mini", "labels": ["skulls"]}


@pytest.mark.parametrize(
    "guards", [(), *(pytest.param((guard,), marks=pytest.mark.slow) for guard in (SLD, FILTER))]
)
def test_every_kind_of_start_in_one_call_equals_each_alone(loader, folder, guards):
    with loader.open(Stack(name="s", model="mini")) as loaded:
        size, config = loaded.model.size, loaded.model.denoiser.config
        shape = (config.in_channels, config.sample_size, config.sample_size)
    noise = torch.randn(shape, generator=generator(1, 0))
    write_tensors(folder / "z.safetensors", {"latents": noise}, {})
    starts = [
        None,
        Start.of(folder, image="a.png", strength=0.5),
        Start.of(folder, image="a.png", mask="m.png", strength=0.5),
        Start.of(folder, latents="z.safetensors"),
        Start.of(folder, image="a.png", strength=0.25),
    ]
    together, _ = generate(loader, [sample(start) for start in starts], guards)
    for start, image in zip(starts, together, strict=True):
        alone = generate(loader, [sample(start)], guards)[0][0]
        assert np.abs(alone.astype(int) - image).max() <= 1
    assert np.abs(together[0].astype(int) - together[3]).max() <= 1, "the same initial noise"
    given = np.asarray(Image.open(folder / "a.png").resize((size, size)).convert("RGB"), int)
    weak, strong = (np.abs(together[i] - given).mean() for i in (4, 1))
    assert weak < strong, "more strength changes more of the image"


@pytest.mark.parametrize("kind", ["sd2-v", "sdxl"])
def test_other_families_start_from_images_masks_and_latents_too(kind, make_tiny, folder):
    model = make_tiny(kind)
    shape = (4, model.denoiser.config.sample_size, model.denoiser.config.sample_size)
    noise = torch.randn(shape, generator=generator(1, 0))
    write_tensors(folder / "z.safetensors", {"latents": noise}, {})
    starts = [
        Start.of(folder, image="a.png", strength=0.5),
        Start.of(folder, image="a.png", mask="m.png", strength=0.5),
        Start.of(folder, image="a.png", mask="m.png", strength=1),
        Start.of(folder, latents="z.safetensors"),
        None,
    ]
    images = [np.asarray(i, int) for i in draw(model, [sample(s) for s in starts], CONFIG)]
    assert all(image.shape == (model.size, model.size, 3) for image in images)
    assert np.abs(images[3] - images[4]).max() <= 1, "the same initial noise"
    for start, image in zip(starts, images, strict=True):
        (alone,) = draw(model, [sample(start)], CONFIG)
        assert np.abs(np.asarray(alone, int) - image).max() <= 1
    assert len({image.tobytes() for image in images[:4]}) == 4


def test_starts_are_part_of_an_images_name_and_of_a_lists_hash(folder):
    def named(start):
        row = EvalSample(prompt="p", seed=1, list_name="l", role="attack", start=start)
        return row.key("0" * 64, CONFIG)

    half = Start.of(folder, image="a.png", strength=0.5)
    masked = Start.of(folder, image="a.png", mask="m.png", strength=0.5)
    other = half.model_copy(update={"strength": 0.6})
    assert len({named(s) for s in (None, half, masked, other)}) == 4
    assert (
        "folder"
        not in EvalSample(
            prompt="p", seed=1, list_name="l", role="attack", start=half
        ).model_dump_json()
    )


def test_prompt_files_carry_starts_and_refuse_changed_and_outside_files(folder):
    start = Start.of(folder, image="a.png", strength=0.5)
    row = {
        "id": "0",
        "prompt": "a castle",
        "seed": 3,
        "attack": "img2img",
        "attacked_prompt": "a castle",
        "start": start.model_dump(mode="json"),
    }
    path = folder / "prompts.jsonl"
    path.write_text(json.dumps(row) + "\n")
    read = read_prompts(path)
    assert read.rows[0].start == start
    plain = read.rows[0].model_copy(update={"start": None})
    assert hash_prompts([plain]) != hash_prompts(read.rows)
    with pytest.raises(FileError, match="must lie in"):
        Start.of(folder / "x", image="../a.png", strength=0.5)
    bare = {name: row[name] for name in ("id", "prompt", "seed", "start")}
    (folder / "bare.jsonl").write_text(json.dumps(bare) + "\n")
    with pytest.raises(FileError, match="generation would start from noise"):
        read_prompts(folder / "bare.jsonl")
    Image.new("RGB", (64, 64)).save(folder / "a.png")
    with pytest.raises(FileError, match="has changed"):
        read_prompts(path)


def test_starts_that_cannot_be_used_are_refused(loader, folder):
    with pytest.raises(ConfigError, match="strength must be at least"):
        generate(loader, [sample(Start.of(folder, image="a.png", strength=0.1))])
    write_tensors(folder / "z.safetensors", {"latents": torch.zeros(1, 2, 2)}, {})
    with pytest.raises(FileError, match="finite latents"):
        generate(loader, [sample(Start.of(folder, latents="z.safetensors"))])
    for wrong in ({}, {"image": "a.png"}, {"latents": "z.safetensors", "strength": 0.5}):
        with pytest.raises(ValueError, match="a start must have"):
            Start.of(folder, **wrong)


@pytest.mark.parametrize("kind", [Img2Img, Inpaint])
def test_attacks_that_redraw_run_on_sdxl(kind, make_tiny, tmp_path):
    model, skulls = make_tiny("sdxl"), load_concept("skulls")
    model.denoiser.register_to_config(sample_size=64 // model.pipeline.vae_scale_factor)
    loaded = LoadedStack(Stack(name="s", model="mini"), model, "0" * 64)
    target = Target(loaded, skulls, load_judge("mini", labels=skulls.labels), CONFIG)
    row = EvalSample(prompt="a castle", seed=1, list_name="l", role="benign", subject="castle")
    attacker = kind(strengths=(0.5,)).build(AttackContext(target, tmp_path / "attack"))
    starts = [record.start for record in attacker.attack([row])]
    results = target.query([row.model_copy(update={"start": start}) for start in starts])
    assert [result.output.image.size for result in results] == [(64, 64)] * 2
