"""Making pictures: the pipeline's own call, one generator per picture, batches fixed by the plan."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from pydantic import BaseModel, ConfigDict, Field

from safegen.files import fresh_file
from safegen.models.model import Model


class Sampler(BaseModel):
    """How pictures are made."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    steps: int = Field(default=25, ge=1, le=1000)
    """Denoising steps."""
    guidance: float = Field(default=5.0, ge=1.0, le=50.0)
    """Scale of classifier-free guidance; 1 is none."""
    batch: int = Field(default=32, ge=1)
    """Pictures made at once; changes a picture by no more than rounding."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the denoiser: bf16 is faster, rounds coarser, and so draws a slightly different picture."""


class Ask(BaseModel):
    """One picture to make."""

    model_config = ConfigDict(frozen=True)

    prompt: str
    seed: int
    index: int = 0
    """Which picture of that seed; (seed, index) alone decide the noise."""


def generator(seed: int, index: int) -> torch.Generator:
    """Return the CPU generator of one picture. Neighbouring seeds and indices share nothing (SHA-256 of the pair)."""
    word = hashlib.sha256(f"{seed}:{index}".encode()).digest()[:8]
    return torch.Generator("cpu").manual_seed(int.from_bytes(word, "little") >> 1)


def generate(model: Model, asks: Sequence[Ask], sampler: Sampler) -> Iterator[Image.Image]:
    """Yield one picture per ask, in order."""
    for start in range(0, len(asks), sampler.batch):
        part = asks[start : start + sampler.batch]
        with torch.autocast(model.device.type, torch.bfloat16, enabled=sampler.precision == "bf16"):
            out = model.pipeline(
                prompt=[a.prompt for a in part],
                generator=[generator(a.seed, a.index) for a in part],
                num_inference_steps=sampler.steps,
                guidance_scale=sampler.guidance,
                output_type="pil",
            )
        yield from out.images


def save_picture(image: Image.Image, out: Path, facts: dict[str, Any]) -> None:
    """Write a PNG that carries how it was made under the text key `safegen`.

    Raises:
        BadFile: `out` exists or cannot be written.
    """
    info = PngInfo()
    info.add_text("safegen", json.dumps(facts, sort_keys=True))
    with fresh_file(out) as tmp:
        image.save(tmp, format="PNG", pnginfo=info)
