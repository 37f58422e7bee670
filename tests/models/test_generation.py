"""Generation: an image depends on prompt, seed and index only."""

from __future__ import annotations

import json
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from PIL import Image

from safegen.core.errors import ConfigError, FileError
from safegen.core.generation import GenerationConfig, Sample, preferred_precision
from safegen.models.generation import generate, generator
from safegen.models.image_files import save_image

SAMPLES = [
    Sample(prompt=p, seed=s, index=i)
    for p, s, i in [
        ("a red cube", 1, 0),
        ("a blue ball", 1, 1),
        ("a red cube", 2, 0),
        ("a green cone", 2, 3),
        ("", 1, 0),
    ]
]


def draw(model, samples, **generation_config):
    return [
        np.asarray(p).astype(int)
        for p in generate(
            model, samples, GenerationConfig(**({"num_inference_steps": 4} | generation_config))
        )
    ]


@pytest.fixture(scope="module")
def images(tiny_model):
    return draw(tiny_model, SAMPLES)


def test_images_have_the_order_of_the_samples_and_the_models_size(images):
    assert [p.shape for p in images] == [(32, 32, 3)] * 5
    assert min(p.std() for p in images) > 1  # not constant, so that a comparison is meaningful


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_the_batch_size_changes_an_image_by_rounding_only(tiny_model, images, batch):
    for one, other in zip(draw(tiny_model, SAMPLES, batch_size=batch), images, strict=True):
        assert abs(one - other).max() <= 2


def test_other_samples_in_a_batch_do_not_change_an_image(tiny_model, images):
    mixed = draw(
        tiny_model, [SAMPLES[3], Sample(prompt="a tree", seed=9), SAMPLES[0]], batch_size=3
    )
    assert abs(mixed[0] - images[3]).max() <= 2
    assert abs(mixed[2] - images[0]).max() <= 2


def test_generation_ignores_the_global_random_state(tiny_model, images):
    with torch.random.fork_rng():
        torch.manual_seed(123)
        assert all(
            np.array_equal(a, b) for a, b in zip(draw(tiny_model, SAMPLES), images, strict=True)
        )


def test_seed_index_and_prompt_each_change_the_image(tiny_model):
    samples = [
        Sample(prompt="a red cube", seed=1),
        Sample(prompt="a red cube", seed=2),
        Sample(prompt="a red cube", seed=1, index=1),
        Sample(prompt="a blue ball", seed=1),
    ]
    found = [p.tobytes() for p in draw(tiny_model, samples, guidance_scale=20.0)]
    assert len(set(found)) == 4


def test_the_noise_depends_on_seed_and_index_only():
    pairs = [(s, i) for s in range(12) for i in range(12)] + [(-1, 0), (10**20, 0)]
    noises = [tuple(torch.randn(4, generator=generator(s, i)).tolist()) for s, i in pairs]
    assert len(set(noises)) == len(pairs)
    assert torch.equal(
        torch.randn(4, generator=generator(5, 6)), torch.randn(4, generator=generator(5, 6))
    )


def test_guidance_of_one_is_no_guidance(tiny_model):
    model_calls = []
    hook = tiny_model.denoiser.conv_in.register_forward_hook(
        lambda m, inputs, out: model_calls.append(len(inputs[0]))
    )
    draw(tiny_model, SAMPLES[:2], num_inference_steps=2, guidance_scale=1.0)
    draw(tiny_model, SAMPLES[:2], num_inference_steps=2, guidance_scale=2.0)
    hook.remove()
    assert model_calls == [2, 2, 4, 4]


def test_no_samples_give_no_images(tiny_model):
    assert generate(tiny_model, [], GenerationConfig()) == []


@pytest.mark.parametrize(
    "change",
    [
        {"num_inference_steps": 0},
        {"guidance_scale": 0.5},
        {"guidance_scale": float("nan")},
        {"batch_size": 0},
        {"stepz": 3},
    ],
)
def test_invalid_settings_are_refused(change):
    with pytest.raises(ConfigError, match=next(iter(change))):
        GenerationConfig(**change)


def test_a_png_stores_its_metadata(tmp_path):
    image = Image.effect_noise((32, 32), 90).convert("RGB")
    metadata = {"prompt": 'a "red" cube,\nécrit en français 红', "seed": 3, "patches": ["ab12"]}
    save_image(image, tmp_path / "new" / "0.png", metadata)
    with Image.open(tmp_path / "new" / "0.png") as found:
        assert found.format == "PNG"
        assert json.loads(found.text["safegen"]) == metadata
        assert np.array_equal(np.asarray(found), np.asarray(image))
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["0.png"]


def test_an_existing_png_is_not_overwritten(tmp_path):
    (tmp_path / "0.png").write_text("mine")
    with pytest.raises(FileError, match="already exists"):
        save_image(Image.new("RGB", (8, 8)), tmp_path / "0.png", {})
    assert (tmp_path / "0.png").read_text() == "mine"


@pytest.mark.parametrize(
    ("able", "want"),
    [("avx512_bf16", "bf16"), ("amx_bf16", "bf16"), ("avx512_f", "fp32"), ("", "fp32")],
)
def test_cpus_without_bf16_instructions_prefer_fp32(monkeypatch, able, want):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {able: True}, raising=False)
    assert preferred_precision() == want


def test_unknown_capabilities_prefer_fp32(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert preferred_precision() == preferred_precision("mps") == "fp32"


@pytest.mark.parametrize("able", [True, False])
def test_gpus_prefer_bf16_if_supported_natively(monkeypatch, able):
    requested = []
    monkeypatch.setattr(torch.cuda, "device", lambda which: nullcontext(requested.append(which)))
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda *, including_emulation: able or including_emulation
    )
    assert preferred_precision("cuda:1") == ("bf16" if able else "fp32")
    assert requested == ["cuda:1"]
