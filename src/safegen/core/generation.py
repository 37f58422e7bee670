"""How pictures are asked for: plain settings, so that a run can be planned, scored and verified without loading a model library."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

NativePrecision = Literal["fp32", "bf16"]


def preferred_precision(device: str = "cpu") -> NativePrecision:
    """Return bf16 where a device is known to compute in it (graphics cards of Nvidia's and x86 processors tell), else fp32.

    A processor without such instructions is put to bf16 by software: one with AVX2 alone drew 17
    times more slowly than in fp32.

    Args:
        device: `cpu`, `cuda`, `cuda:1`, ...
    """
    import torch

    if device.startswith("cuda"):
        with torch.cuda.device(device):
            return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    told = getattr(torch.cpu, "get_capabilities", None)  # torch 2.6 does not tell
    able: dict[str, object] = told() if told and device == "cpu" else {}
    return "bf16" if able.get("avx512_bf16") or able.get("amx_bf16") else "fp32"


class GenerationConfig(BaseModel):
    """How pictures are made."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    num_inference_steps: int = Field(default=25, ge=1, le=1000)
    """Denoising steps."""
    guidance_scale: float = Field(default=5.0, ge=1.0, le=50.0)
    """Scale of classifier-free guidance; 1 is none."""
    batch_size: int = Field(default=32, ge=1)
    """Pictures made at once; changes a picture by no more than rounding."""
    precision: NativePrecision = "fp32"
    """Arithmetic of the denoiser: bf16 is faster where the device computes in it, and rounds coarser: a slightly different picture."""


class Sample(BaseModel):
    """One picture to make."""

    model_config = ConfigDict(frozen=True)

    prompt: str
    seed: int
    index: int = 0
    """Which picture of that seed; (seed, index) alone decide the noise."""
