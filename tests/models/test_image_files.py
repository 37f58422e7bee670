"""PNG files: our metadata, and the `parameters` text that web UIs read."""

from __future__ import annotations

import json
import re
from io import BytesIO

import torch
from PIL import Image

from safegen.core.generation import GenerationConfig, Sample
from safegen.models.generation import generate
from safegen.models.image_files import encode_image, parameters_text

PARAMETER = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
"""How A1111 reads the last line (modules/infotext_utils.py)."""


def read(text):
    """Return prompt, negative prompt and values as A1111 reads them."""
    *lines, last = text.split("\n")
    at = next((i for i, x in enumerate(lines) if x.startswith("Negative prompt:")), len(lines))
    negative = "\n".join(lines[at:]).removeprefix("Negative prompt:").strip()
    values = {k: json.loads(v) if v[:1] == '"' else v for k, v in PARAMETER.findall(last)}
    return "\n".join(lines[:at]), negative, values


def test_the_parameters_text_is_read_by_a_web_ui(tiny_model):
    sample = Sample(prompt="a red cube,\nat dusk: 3", seed=7, index=2, negative_prompt="a ball")
    config = GenerationConfig(
        num_inference_steps=3, guidance_scale=4.5, width=48, scheduler="DPM++ 2M Karras"
    )
    text = parameters_text(
        sample, config, tiny_model, negative="a tree", model_name="my, model: v2"
    )
    prompt, negative, values = read(text)
    assert (prompt, negative) == (sample.prompt, "a tree, a ball")
    assert {k: values[k] for k in ("Steps", "Sampler", "CFG scale", "Seed", "Size", "Model")} == {
        "Steps": "3",
        "Sampler": "DPM++ 2M Karras",
        "CFG scale": "4.5",
        "Seed": "7",
        "Size": "48x32",
        "Model": "my, model: v2",
    }
    assert "another image for this seed" in values["Seed mode"]
    assert list(read(parameters_text(sample, config, tiny_model))[2])[:4] == [
        "Steps",
        "Sampler",
        "CFG scale",
        "Seed",
    ]


def test_the_torch_seed_in_the_text_gives_the_image_in_diffusers(tiny_model):
    sample, config = Sample(prompt="a red cube", seed=7, index=2), GenerationConfig()
    config = config.model_copy(update={"num_inference_steps": 2})
    values = read(parameters_text(sample, config, tiny_model))[2]
    (found,) = generate(tiny_model, sample, config)
    (want,) = tiny_model.pipeline(
        sample.prompt,
        num_inference_steps=2,
        guidance_scale=5.0,
        generator=torch.Generator("cpu").manual_seed(int(values["Torch seed"])),
    ).images
    assert found.tobytes() == want.tobytes()
    torch_mode = config.model_copy(update={"seed_mode": "torch"})
    assert not {"Seed mode", "Torch seed"} & set(
        read(parameters_text(sample, torch_mode, tiny_model))[2]
    )


def test_equal_inputs_give_equal_bytes_and_text_adds_to_them():
    image, metadata = Image.new("RGB", (8, 8), "red"), {"b": 1, "a": "é"}
    plain, with_text = encode_image(image, metadata), encode_image(image, metadata, "a\nSteps: 1")
    assert plain == encode_image(image, dict(reversed(metadata.items())))
    assert with_text == encode_image(image, metadata, "a\nSteps: 1") != plain
    with Image.open(BytesIO(plain)) as read_back:
        assert set(read_back.text) == {"safegen"}
    with Image.open(BytesIO(with_text)) as read_back:
        assert read_back.text["parameters"] == "a\nSteps: 1"
