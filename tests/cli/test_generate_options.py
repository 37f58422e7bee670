"""`safegen generate` with a size, a scheduler, seeds, a negative prompt and several images."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from safegen.models.loading import load


def test_a_request_is_generated_as_asked_and_recorded(safegen, tmp_path):
    out = tmp_path / "out"
    words = ["--prompt", "a castle", "--prompt", "a boat", "--negative-prompt", "fog"]
    words += ["--width", "48", "--height", "32", "--scheduler", "euler a", "--seed-mode", "torch"]
    words += ["--seed", "7", "--images-per-prompt", "2", "--steps", "2", "--out", out]
    code, _, err = safegen("generate", "mini", *words)
    assert code == 0, err
    names = sorted(path.name for path in out.iterdir())
    assert names == ["0000.png", "0001.png", "0002.png", "0003.png", "sheet.png"]
    pipe = load("mini").pipeline
    from diffusers import EulerAncestralDiscreteScheduler

    pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    want = pipe(
        "a boat",
        negative_prompt="fog",
        width=48,
        height=32,
        num_inference_steps=2,
        guidance_scale=5.0,
        num_images_per_prompt=2,
        generator=torch.Generator("cpu").manual_seed(7),
    ).images
    for name, image in zip(names[2:4], want, strict=True):
        with Image.open(out / name) as found:
            facts = json.loads(found.text["safegen"])
            text = found.text["parameters"]
            assert found.convert("RGB").tobytes() == image.tobytes()
    wanted = {"scheduler": "euler a", "seed_mode": "torch", "width": 48, "height": 32, "seed": 7}
    assert facts.items() >= (wanted | {"negative_prompt": "fog", "prompt": "a boat"}).items()
    assert text.startswith("a boat\nNegative prompt: fog\nSteps: 2, Sampler: Euler a, CFG scale: 5")
    assert "Size: 48x32" in text


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--width", "100"], "width must be a multiple of 8 on the model 'mini', got 100"),
        (["--scheduler", "Eular"], "Did you mean 'Euler'"),
        (["--seed-mode", "cuda"], "'cuda' is not one of 'safegen', 'torch'"),
        (["--height", "5000"], "--height must be less than or equal to 4096"),
        (["--negative-prompt", "x", "--guidance", "1"], "guidance_scale must be > 1 with a negat"),
        (["--scheduler", "PNDMScheduler", "--steps", "2"], "that a PNDMScheduler can make, got 2"),
    ],
)
def test_a_request_that_does_not_fit_is_refused_in_one_line(safegen, tmp_path, words, says):
    code, _, err = safegen(
        "generate", "mini", "--prompt", "a", "--steps", "1", *words, "--out", tmp_path / "out"
    )
    assert code == 2
    assert says in " ".join(err.split())
    assert not (tmp_path / "out").exists()


def test_a_negative_prompt_that_is_too_long_is_said(safegen, tmp_path):
    words = ["--negative-prompt", "fog " * 90, "--steps", "1", "--out", tmp_path / "out"]
    code, _, err = safegen("generate", "mini", "--prompt", "a castle", *words)
    assert code == 0
    assert "warning: the negative prompt is longer than" in err
