"""Making pictures: the pipeline's own call, one generator per picture, batches fixed by the plan."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from safegen.core.errors import ConfigError
from safegen.core.files import atomic_write
from safegen.core.generation import GenerationConfig, Sample
from safegen.models.model import Model

__all__ = [
    "Sample",
    "GenerationConfig",
    "autocast_for",
    "batches",
    "truncated_prompts",
    "encode_image",
    "generate",
    "generator",
    "check_num_steps",
    "save_image",
]


def generator(seed: int, index: int) -> torch.Generator:
    """Return the CPU generator of one picture.

    Neighbouring seeds and indices share nothing (SHA-256 of the pair).
    """
    word = hashlib.sha256(f"{seed}:{index}".encode()).digest()[:8]
    return torch.Generator("cpu").manual_seed(int.from_bytes(word, "little") >> 1)


def generate(
    model: Model,
    asks: Sequence[Sample],
    generation_config: GenerationConfig,
    *,
    negative: str | None = None,
) -> Iterator[Image.Image]:
    """Yield one picture per ask, in order.

    Args:
        model: what draws.
        asks: the pictures.
        generation_config: how they are made.
        negative: a text that guidance pushes every picture away from, in place of the blank one.

    Raises:
        ConfigError: more steps than the model's schedule has room for, or a negative text without
            guidance, which would have no effect.
    """
    check_num_steps(model, generation_config.num_inference_steps)
    for prompts, options in batches(asks, generation_config, negative=negative):
        with autocast_for(model, generation_config):
            out = model.pipeline(prompt=prompts, **options)
        yield from out.images


def batches(
    asks: Sequence[Sample], generation_config: GenerationConfig, *, negative: str | None = None
) -> Iterator[tuple[list[str], dict[str, Any]]]:
    """Yield the prompts of each batch, and the other arguments for a pipeline.

    Raises:
        ConfigError: a negative text without guidance, which would have no effect.
    """
    if negative is not None and generation_config.guidance_scale <= 1:
        raise ConfigError(
            f"a negative prompt has no effect without guidance; guidance must be > 1, got {generation_config.guidance_scale}"
        )
    for start in range(0, len(asks), generation_config.batch_size):
        part = asks[start : start + generation_config.batch_size]
        options: dict[str, Any] = {
            "generator": [generator(a.seed, a.index) for a in part],
            "num_inference_steps": generation_config.num_inference_steps,
            "guidance_scale": generation_config.guidance_scale,
            "output_type": "pil",
        }
        yield (
            [a.prompt for a in part],
            options | ({} if negative is None else {"negative_prompt": [negative] * len(part)}),
        )


def check_num_steps(model: Model, steps: int) -> None:
    """Refuse more steps than a model's schedule has room for: 999 of 1000 where its steps are counted from 1, as in Stable Diffusion.

    Raises:
        ConfigError: there are more.
    """
    config = model.pipeline.scheduler.config
    timesteps = int(config.get("num_train_timesteps", 1000))
    room = timesteps - (
        int(config.get("steps_offset", 0)) if config.get("timestep_spacing") == "leading" else 0
    )
    if steps > room:
        raise ConfigError(
            f"steps must be at most {room} on this model, whose schedule has {timesteps} timesteps, got {steps}"
        )


def truncated_prompts(model: Model, prompts: Sequence[str]) -> list[int]:
    """Return which prompts have more tokens than the text encoder reads.

    Diffusers draws what comes before, and tells nobody here.
    """
    tokenizer = model.pipeline.tokenizer
    return [
        i
        for i, prompt in enumerate(prompts)
        if len(tokenizer(prompt).input_ids) > tokenizer.model_max_length
    ]


def autocast_for(
    model: Model, generation_config: GenerationConfig
) -> AbstractContextManager[object]:
    """Return the context in which a pipeline computes as the sampler says."""
    return torch.autocast(
        model.device.type, torch.bfloat16, enabled=generation_config.precision == "bf16"
    )


def encode_image(image: Image.Image, facts: dict[str, Any]) -> bytes:
    """Return a PNG that carries how it was made under the text key `safegen`.

    Equal inputs give equal bytes.
    """
    info, out = PngInfo(), io.BytesIO()
    info.add_text("safegen", json.dumps(facts, sort_keys=True))
    image.save(out, format="PNG", pnginfo=info)
    return out.getvalue()


def save_image(image: Image.Image, out: Path, facts: dict[str, Any]) -> None:
    """Write a PNG that carries how it was made.

    Raises:
        FileError: `out` exists or cannot be written.
    """
    with atomic_write(out) as tmp:
        tmp.write_bytes(encode_image(image, facts))
