"""Image generation: the pipeline's own call, with one random generator per image."""

from __future__ import annotations

import hashlib
import io
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image

from safegen.core.documents import read_bytes
from safegen.core.errors import ConfigError, FileError, UnusedSettingWarning, check_keywords
from safegen.core.generation import MAX_START_FILE, GenerationConfig, Sample, SeedMode, Start
from safegen.core.progress import StepCallback
from safegen.core.quiet import silence_libraries
from safegen.core.tensor_files import read_tensors
from safegen.models.families.denoisers import (
    largest_side,
    pack_latents,
    packs_latents,
    quiet_autocast,
    side_multiple,
)
from safegen.models.families.pipeline_specs import LENGTH_OPTION, call_defaults, guidance_option
from safegen.models.model import Model, check_is_loaded
from safegen.models.schedulers import check_num_steps, replaced_scheduler
from safegen.models.text_encoder import count_tokens, text_encoders

TRUE_CFG = "true_cfg_scale"
"""Option of FLUX's call with the scale of classifier-free guidance."""


def generator(seed: int, index: int, mode: SeedMode = "safegen") -> torch.Generator:
    """Return the CPU random generator of one image; see `torch_seed`."""
    return torch.Generator("cpu").manual_seed(torch_seed(seed, index, mode))


def torch_seed(seed: int, index: int, mode: SeedMode = "safegen") -> int:
    """Return the seed that torch gets for an image.

    It is half of the first 8 bytes of the SHA-256 of seed and index, or the seed itself with the
    mode `torch`.
    """
    if mode == "torch":
        return seed
    digest = hashlib.sha256(f"{seed}:{index}".encode()).digest()[:8]
    return int.from_bytes(digest, "little") >> 1


@check_keywords
def generate(
    model: Model,
    prompts: str | Sample | Sequence[str | Sample],
    generation_config: GenerationConfig | None = None,
    *,
    seed: int = 0,
    negative_prompt: str | None = None,
    callback: StepCallback | None = None,
) -> list[Image.Image]:
    """Return the images of prompts, in order; those of one prompt are adjacent.

    Args:
        model: the model.
        prompts: a prompt or a sample, or several. Prompt i becomes the sample (seed, i).
        generation_config: steps, guidance, size, scheduler ... Default: `GenerationConfig()`.
        seed: seed of prompts that are given as text.
        negative_prompt: negative prompt for every image, before that of a sample.
        callback: called after each step with the part that is done; it may raise to stop.

    Raises:
        ConfigError: it is no `Model`, it has no images of that size, scheduler or number of steps,
            or there is a negative prompt and no guidance.

    Example:
        >>> model = safegen.load("mini")
        >>> image = safegen.generate(model, "a castle", seed=1)[0]
        >>> image.size
        (64, 64)
    """
    check_is_loaded(model)
    config, samples = generation_config or GenerationConfig(), as_samples(prompts, seed)
    images: list[Image.Image] = []
    with replaced_scheduler(model.pipeline, config.scheduler):
        for kind, texts, options in batches(
            model, samples, config, negative=negative_prompt, callback=callback
        ):
            with autocast_for(model, config):
                images += pipeline_for(model, kind)(prompt=texts, **options).images
    return images


def as_samples(prompts: str | Sample | Sequence[str | Sample], seed: int = 0) -> list[Sample]:
    """Return prompts as samples: text i gets the seed and the index i.

    Raises:
        ConfigError: one is neither text nor a sample, or the seed is out of range.
    """
    entries = [prompts] if isinstance(prompts, str | Sample) else list(prompts)
    for entry in entries:
        if not isinstance(entry, str | Sample):
            raise ConfigError(f"prompts must be text or samples, got {type(entry).__name__}")
    return [
        entry if isinstance(entry, Sample) else Sample(prompt=entry, seed=seed, index=i)
        for i, entry in enumerate(entries)
    ]


PipelineKind = Literal["text", "image", "inpaint"]
"""Kind of a pipeline by what it starts from."""


def pipeline_for(model: Model, kind: PipelineKind) -> Any:
    """Return a model's pipeline of a kind, with the same components."""
    if kind == "text":
        return model.pipeline
    with silence_libraries():  # its import loads every pipeline, and logs about torchvision
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
    callback: StepCallback | None = None,
) -> Iterator[tuple[PipelineKind, list[str], dict[str, Any]]]:
    """Yield the kind of pipeline, the prompts, and the other arguments of the call of each batch.

    Args:
        model: the model, with the scheduler of the configuration.
        samples: what to generate.
        generation_config: steps, guidance, size ...
        negative: negative prompt of the stack, before that of a sample.
        callback: called after each step with the part of all batches that is done.

    Raises:
        ConfigError: there is a negative prompt and no guidance, which it acts through; a strength
            leaves no step; or the model has no images of that size or number of steps.
        FileError: a file that generation starts from cannot be used.

    Warns:
        UnusedSettingWarning: there is a `true_cfg_scale`, and the model is no FLUX.
    """
    config, pipe = generation_config, model.pipeline
    check_num_steps(pipe, config.num_inference_steps)
    size = image_size(model, config)
    defaults, option = call_defaults(pipe), guidance_option(pipe)
    true_cfg = option == TRUE_CFG and config.true_cfg_scale > 1
    if option != TRUE_CFG and config.true_cfg_scale > 1:
        warnings.warn(
            f"true_cfg_scale has no effect on a {type(pipe).__name__}",
            UnusedSettingWarning,
            stacklevel=3,
        )
    parts = list(_split(_single_images(samples, config.seed_mode), config.batch_size, negative))
    for number, (kind, batch) in enumerate(parts):
        scale = batch[0].guidance_scale or config.guidance_scale
        texts = [join_negative(negative, sample.negative_prompt) for sample in batch]
        cfg = config.true_cfg_scale if option == TRUE_CFG else scale
        if texts[0] is not None and cfg <= 1:
            raise ConfigError(f"{option} must be > 1 with a negative prompt, got {cfg}")
        starts = [sample.start for sample in batch if sample.start]
        options: dict[str, Any] = _start_options(model, starts, config)
        generators = [generator(s.seed, s.index, config.seed_mode) for s in batch]
        options |= {
            "generator": generators,
            "num_inference_steps": config.num_inference_steps,
            "guidance_scale": scale,
            "output_type": "pil",
        }
        if batch[0].num_images_per_prompt > 1:  # one generator for the call, as in diffusers
            options["generator"] = generators[0]
            options["num_images_per_prompt"] = batch[0].num_images_per_prompt
        is_resized = kind != "text" and model.denoiser_name == "transformer"
        if is_resized or (kind != "image" and (config.width or config.height)):
            options |= {"width": size[0], "height": size[1]}
        if LENGTH_OPTION in defaults:
            options[LENGTH_OPTION] = defaults[LENGTH_OPTION]
        if true_cfg:  # FLUX guides only beside a negative prompt
            texts = [text or "" for text in texts]
            options[TRUE_CFG] = config.true_cfg_scale
        if texts[0] is not None:
            options["negative_prompt"] = texts
        if callback is not None:
            options["callback_on_step_end"] = _report_steps(callback, number, len(parts))
        yield kind, [sample.prompt for sample in batch], options
        if callback is not None:
            callback((number + 1) / len(parts))


def _report_steps(callback: StepCallback, number: int, total: int) -> Callable[..., dict[str, Any]]:
    """Return a step callback of diffusers that reports the part of all batches that is done."""

    def on_step_end(pipe: Any, step: int, timestep: Any, tensors: Any) -> dict[str, Any]:
        callback((number + (step + 1) / max(pipe.num_timesteps, step + 1)) / total)
        return {}

    return on_step_end


def join_negative(stack: str | None, sample: str | None) -> str | None:
    """Return the negative prompt of a stack and a sample: the stack's first, then a comma.

    The text encoder ignores the end of a long text, which thus is the sample's.
    """
    texts = [text for text in (stack, sample) if text is not None]
    return ", ".join(filter(None, texts)) if texts else None


def image_size(model: Model, generation_config: GenerationConfig) -> tuple[int, int]:
    """Return the width and the height of generated images, in pixels.

    Raises:
        ConfigError: a side is not a multiple of what the model needs, or is more than it can make.
    """
    factor = math.lcm(8, side_multiple(model.pipeline))
    for name in ("width", "height"):
        side = getattr(generation_config, name)
        if side is not None and side % factor:
            near = [n for n in (side // factor * factor, -(-side // factor) * factor) if n]
            raise ConfigError(
                f"{name} must be a multiple of {factor} on the model {model.name!r}, got {side}. "
                f"Use {' or '.join(map(str, near))}."
            )
        limit = largest_side(model.pipeline)
        if side is not None and limit is not None and side > limit:
            raise ConfigError(
                f"{name} must be <= {limit} on the model {model.name!r}, got {side}. Its positions "
                "end there."
            )
    return generation_config.width or model.size, generation_config.height or model.size


def _single_images(samples: Sequence[Sample], mode: SeedMode) -> list[Sample]:
    """Return samples of one image each, but those that one generator of torch makes together."""
    return [
        sample.model_copy(update={"index": sample.index + k, "num_images_per_prompt": 1})
        if mode == "safegen" and sample.num_images_per_prompt > 1
        else sample
        for sample in samples
        for k in range(sample.num_images_per_prompt if mode == "safegen" else 1)
    ]


def _split(
    samples: Sequence[Sample], batch_size: int, negative: str | None
) -> Iterator[tuple[PipelineKind, Sequence[Sample]]]:
    """Yield the kind and the samples of each batch: samples in order that one call can take."""

    def likeness(sample: Sample) -> tuple[object, ...]:
        start = sample.start
        kind = (start.kind, start.strength) if start else ("text", None)
        steered = negative is not None or sample.negative_prompt is not None
        return (*kind, sample.guidance_scale, steered, sample.num_images_per_prompt)

    for (start, _, _, _, copies), group in groupby(samples, key=likeness):
        same, size = list(group), batch_size if copies == 1 else 1
        kind: PipelineKind = "image" if start == "image" else "text"
        kind = "inpaint" if start == "inpaint" else kind
        for first in range(0, len(same), size):
            yield kind, same[first : first + size]


def _start_options(
    model: Model, starts: Sequence[Start], generation_config: GenerationConfig
) -> dict[str, Any]:
    """Return the arguments of a pipeline's call for what a batch starts from."""
    if not starts:
        return {}
    size = image_size(model, generation_config)
    if starts[0].kind == "latents":
        return {"latents": torch.stack([_read_latents(model, start, size) for start in starts])}
    strength, steps = starts[0].strength or 1.0, generation_config.num_inference_steps
    if int(strength * steps) < 1:
        raise ConfigError(f"strength must be at least 1 / {steps} steps, got {strength}")
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


def _read_latents(model: Model, start: Start, size: tuple[int, int]) -> torch.Tensor:
    """Return initial latents (c, h, w) of a start, for images of (width, height) pixels.

    Raises:
        FileError: they are not finite or do not fit the model.
    """
    path = start.path(start.latents or "")
    latents = read_tensors(path)[0].get("latents")
    scale = int(model.pipeline.vae_scale_factor)
    shape = (model.latent_shape[0], size[1] // scale, size[0] // scale)
    if latents is None or latents.shape != shape or not bool(latents.isfinite().all()):
        raise FileError(f"{path} must hold finite latents {shape} for {model.name!r}")
    latents = latents.to(model.device, model.denoiser.dtype)
    return pack_latents(latents[None])[0] if packs_latents(model.pipeline) else latents


def truncated_prompts(model: Model, prompts: Sequence[str]) -> list[int]:
    """Return the indices of prompts with more tokens than the text encoders read.

    Diffusers silently ignores the tokens beyond. T5 reads more than CLIP, and counts alone.
    """
    views = text_encoders(model.pipeline, call_defaults(model.pipeline))
    counts = [count_tokens(views, prompt) for prompt in prompts]
    return [index for index, (tokens, limit) in enumerate(counts) if tokens > limit]


@contextmanager
def autocast_for(model: Model, generation_config: GenerationConfig) -> Iterator[None]:
    """Compute in the configured precision inside the block."""
    device, is_bf16 = model.device.type, generation_config.precision == "bf16"
    with torch.autocast(device, torch.bfloat16, enabled=is_bf16):
        quiet_autocast(device)
        yield
