"""How pictures are asked for: plain settings, so that a run can be planned, scored and verified without loading a model library."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


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
