"""Image generation: the pipeline's own call, with one random generator per image."""

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
from safegen.models.text_encoder import text_encoders


def generator(seed: int, index: int) -> torch.Generator:
    """Return the CPU random generator of one image, seeded by the SHA-256 of seed and index."""
    digest = hashlib.sha256(f"{seed}:{index}".encode()).digest()[:8]
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little") >> 1)


def generate(
    model: Model,
    samples: Sequence[Sample],
    generation_config: GenerationConfig,
    *,
    negative: str | None = None,
) -> Iterator[Image.Image]:
    """Yield one image per sample, in order.

    Args:
        model: the model.
        samples: prompts and seeds.
        generation_config: steps, guidance, batch size and precision.
        negative: negative prompt for every image. Default: the empty prompt.

    Raises:
        ConfigError: there are more steps than the schedule has, or a negative prompt and no
            guidance.
    """
    check_num_steps(model, generation_config.num_inference_steps)
    for prompts, options in batches(samples, generation_config, negative=negative):
        with autocast_for(model, generation_config):
            output = model.pipeline(prompt=prompts, **options)
        yield from output.images


def batches(
    samples: Sequence[Sample], generation_config: GenerationConfig, *, negative: str | None = None
) -> Iterator[tuple[list[str], dict[str, Any]]]:
    """Yield the prompts of each batch, with the other arguments of the pipeline's call.

    Raises:
        ConfigError: there is a negative prompt and no guidance, which it acts through.
    """
    if negative is not None and generation_config.guidance_scale <= 1:
        raise ConfigError(
            "guidance_scale must be > 1 with a negative prompt, got "
            f"{generation_config.guidance_scale}"
        )
    for start in range(0, len(samples), generation_config.batch_size):
        batch = samples[start : start + generation_config.batch_size]
        options: dict[str, Any] = {
            "generator": [generator(sample.seed, sample.index) for sample in batch],
            "num_inference_steps": generation_config.num_inference_steps,
            "guidance_scale": generation_config.guidance_scale,
            "output_type": "pil",
        }
        if negative is not None:
            options["negative_prompt"] = [negative] * len(batch)
        yield [sample.prompt for sample in batch], options


def check_num_steps(model: Model, steps: int) -> None:
    """Check that a model's schedule has as many steps.

    With leading spacing and an offset, as in Stable Diffusion, it has fewer than timesteps.

    Raises:
        ConfigError: it has fewer.
    """
    config = model.pipeline.scheduler.config
    limit = int(config.get("num_train_timesteps", 1000))
    if config.get("timestep_spacing") == "leading":
        limit -= int(config.get("steps_offset", 0))
    if steps > limit:
        raise ConfigError(f"steps must be <= {limit} on this model's schedule, got {steps}")


def truncated_prompts(model: Model, prompts: Sequence[str]) -> list[int]:
    """Return the indices of prompts with more tokens than the text encoder reads.

    Diffusers silently ignores the tokens beyond.
    """
    views = text_encoders(model.pipeline)
    return [
        index
        for index, prompt in enumerate(prompts)
        if any(len(view.token_ids(prompt)) > view.limit for view in views)
    ]


def autocast_for(
    model: Model, generation_config: GenerationConfig
) -> AbstractContextManager[object]:
    """Return the autocast context for the configured precision."""
    return torch.autocast(
        model.device.type, torch.bfloat16, enabled=generation_config.precision == "bf16"
    )


def encode_image(image: Image.Image, metadata: dict[str, Any]) -> bytes:
    """Return a PNG with metadata under the text key `safegen`. Equal inputs give equal bytes."""
    info, buffer = PngInfo(), io.BytesIO()
    info.add_text("safegen", json.dumps(metadata, sort_keys=True))
    image.save(buffer, format="PNG", pnginfo=info)
    return buffer.getvalue()


def save_image(image: Image.Image, path: Path, metadata: dict[str, Any]) -> None:
    """Write a PNG with metadata (`encode_image`).

    Raises:
        FileError: `path` exists or cannot be written.
    """
    with atomic_write(path) as tmp:
        tmp.write_bytes(encode_image(image, metadata))
