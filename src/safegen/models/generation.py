"""Image generation: the pipeline's own call, with one random generator per image."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from safegen.core.documents import read_bytes
from safegen.core.errors import ConfigError, FileError
from safegen.core.files import atomic_write
from safegen.core.generation import MAX_START_FILE, GenerationConfig, Sample, Start
from safegen.core.tensor_files import read_tensors
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
    for kind, prompts, options in batches(model, samples, generation_config, negative=negative):
        with autocast_for(model, generation_config):
            output = pipeline_for(model, kind)(prompt=prompts, **options)
        yield from output.images


PipelineKind = Literal["text", "image", "inpaint"]
"""Kind of a pipeline by what it starts from."""


def pipeline_for(model: Model, kind: PipelineKind) -> Any:
    """Return a model's pipeline of a kind, with the same components."""
    if kind == "text":
        return model.pipeline
    from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting

    classes: dict[str, Any] = {
        "image": AutoPipelineForImage2Image,
        "inpaint": AutoPipelineForInpainting,
    }
    pipe = classes[kind].from_pipe(model.pipeline)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def batches(
    model: Model,
    samples: Sequence[Sample],
    generation_config: GenerationConfig,
    *,
    negative: str | None = None,
) -> Iterator[tuple[PipelineKind, list[str], dict[str, Any]]]:
    """Yield the kind of pipeline, the prompts, and the other arguments of the call of each batch.

    Raises:
        ConfigError: there is a negative prompt and no guidance, which it acts through; or a
            strength leaves no step.
        FileError: a file that generation starts from cannot be used.
    """
    for kind, batch in _split(samples, generation_config.batch_size):
        scale = batch[0].guidance_scale or generation_config.guidance_scale
        if negative is not None and scale <= 1:
            raise ConfigError(f"guidance_scale must be > 1 with a negative prompt, got {scale}")
        starts = [sample.start for sample in batch if sample.start]
        options: dict[str, Any] = _start_options(model, starts, generation_config)
        options |= {
            "generator": [generator(sample.seed, sample.index) for sample in batch],
            "num_inference_steps": generation_config.num_inference_steps,
            "guidance_scale": scale,
            "output_type": "pil",
        }
        if negative is not None:
            options["negative_prompt"] = [negative] * len(batch)
        yield kind, [sample.prompt for sample in batch], options


def _split(
    samples: Sequence[Sample], batch_size: int
) -> Iterator[tuple[PipelineKind, Sequence[Sample]]]:
    """Yield the kind and the samples of each batch: samples in order that one call can take."""

    def likeness(sample: Sample) -> tuple[str, float | None, float | None]:
        start = sample.start
        kind = (start.kind, start.strength) if start else ("text", None)
        return (*kind, sample.guidance_scale)

    for (start, _, _), group in groupby(samples, key=likeness):
        same = list(group)
        kind: PipelineKind = "image" if start == "image" else "text"
        kind = "inpaint" if start == "inpaint" else kind
        for first in range(0, len(same), batch_size):
            yield kind, same[first : first + batch_size]


def _start_options(
    model: Model, starts: Sequence[Start], generation_config: GenerationConfig
) -> dict[str, Any]:
    """Return the arguments of a pipeline's call for what a batch starts from."""
    if not starts:
        return {}
    if starts[0].kind == "latents":
        return {"latents": torch.stack([_read_latents(model, start) for start in starts])}
    strength, steps = starts[0].strength or 1.0, generation_config.num_inference_steps
    if int(strength * steps) < 1:
        raise ConfigError(f"strength must be at least 1 / {steps} steps, got {strength}")
    size = (model.size, model.size)
    images = [_read_png(start.path(start.image or "")).resize(size) for start in starts]
    options: dict[str, Any] = {"image": images, "strength": strength}
    if starts[0].mask is not None:
        masks = [_read_png(start.path(start.mask or "")).convert("L") for start in starts]
        options["mask_image"] = [mask.resize(size, Image.Resampling.NEAREST) for mask in masks]
    return options


def _read_png(path: Path) -> Image.Image:
    """Return the image in a PNG file.

    Raises:
        FileError: it is missing or no readable PNG.
    """
    data = io.BytesIO(read_bytes(path, limit=MAX_START_FILE))
    try:
        with Image.open(data, formats=["PNG"]) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise FileError(
            f"{path} must be a readable PNG file, got {type(error).__name__}"
        ) from error


def _read_latents(model: Model, start: Start) -> torch.Tensor:
    """Return initial latents (c, h, w) of a start.

    Raises:
        FileError: they are not finite or do not fit the model.
    """
    path = start.path(start.latents or "")
    latents = read_tensors(path)[0].get("latents")
    side = int(model.denoiser.config.sample_size)
    shape = (int(model.denoiser.config.in_channels), side, side)
    if latents is None or latents.shape != shape or not bool(latents.isfinite().all()):
        raise FileError(f"{path} must hold finite latents {shape} for {model.name!r}")
    return latents.to(model.device, model.denoiser.dtype)


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
