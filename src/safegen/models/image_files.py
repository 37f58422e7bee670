"""PNG files of generated images, with their settings inside."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from safegen._version import __version__
from safegen.core.files import atomic_write
from safegen.core.generation import GenerationConfig, Sample
from safegen.core.png import encode_image
from safegen.models.families.pipeline_specs import guidance_option
from safegen.models.generation import image_size, join_negative, torch_seed
from safegen.models.model import Model
from safegen.models.schedulers import build_scheduler, sampler_name


def save_image(
    image: Image.Image, path: Path, metadata: Mapping[str, Any], parameters: str | None = None
) -> None:
    """Write a PNG with metadata (`encode_image`).

    Raises:
        FileError: `path` exists or cannot be written.
    """
    with atomic_write(path) as tmp:
        tmp.write_bytes(encode_image(image, metadata, parameters))


def parameters_text(
    sample: Sample,
    generation_config: GenerationConfig,
    model: Model,
    *,
    negative: str | None = None,
    model_name: str = "",
) -> str:
    """Return the settings of an image as A1111 writes them under `parameters` in a PNG.

    A1111 has no generator for (seed, index). With the seed mode `safegen`, the text says so, and
    adds the seed that `torch.Generator("cpu")` gets for the image.

    Args:
        sample: what was generated, one image.
        generation_config: how.
        model: the model, with its own scheduler.
        negative: negative prompt of the stack.
        model_name: name of the model for the text. Default: the end of its name.
    """
    config, own = generation_config, model.pipeline.scheduler
    scheduler = build_scheduler(own, config.scheduler) if config.scheduler else own
    width, height = image_size(model, config)
    values: dict[str, object] = {
        "Steps": config.num_inference_steps,
        "Sampler": sampler_name(scheduler),
        "CFG scale": sample.guidance_scale or config.guidance_scale,
        **_flux_scales(sample, config, model),
        "Seed": sample.seed,
        "Size": f"{width}x{height}",
        "Model hash": model.hash[:10],
        "Model": model_name or Path(model.name).stem,
        "RNG": "CPU",
        "Version": f"safegen {__version__}",
    }
    if config.seed_mode == "safegen":
        values |= {
            "Seed mode": f"safegen (A1111 gives another image for this seed), index {sample.index}",
            "Torch seed": torch_seed(sample.seed, sample.index),
        }
    text = join_negative(negative, sample.negative_prompt)
    lines = [sample.prompt, *([f"Negative prompt: {text}"] if text else [])]
    return "\n".join([*lines, ", ".join(f"{key}: {_quoted(v)}" for key, v in values.items())])


def _flux_scales(
    sample: Sample, generation_config: GenerationConfig, model: Model
) -> dict[str, float]:
    """Return both scales of guidance on FLUX, by their names in Forge; nothing elsewhere."""
    config = generation_config
    if guidance_option(model.pipeline) == "guidance_scale":
        return {}
    embedded = sample.guidance_scale or config.guidance_scale
    return {"CFG scale": config.true_cfg_scale, "Distilled CFG Scale": embedded}


def _quoted(value: object) -> str:
    """Return a value of the last line: quoted as JSON if it has a comma, colon or line break."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if set(text) & set(",:\n") else text
