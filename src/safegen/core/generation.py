"""Settings of image generation; importing them loads no model library."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from safegen.core.settings import MAX_BATCH, MAX_COUNT, MAX_STEPS, BaseSettings, Seed

NativePrecision = Literal["fp32", "bf16"]


def preferred_precision(device: str = "cpu") -> NativePrecision:
    """Return bf16 if the device is known to compute in it natively, else fp32.

    A CPU without bf16 instructions emulates them: with AVX2 alone, generation takes 17 times as
    long as in fp32.

    Args:
        device: `cpu`, `cuda`, `cuda:1`, ...
    """
    import torch

    if device.startswith("cuda"):
        with torch.cuda.device(device):
            return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    query = getattr(torch.cpu, "get_capabilities", None)  # missing in torch 2.6
    capabilities: dict[str, object] = query() if query and device == "cpu" else {}
    return "bf16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "fp32"


class GenerationConfig(BaseSettings):
    """Settings of image generation."""

    num_inference_steps: int = Field(default=25, ge=1, le=MAX_STEPS)
    """Denoising steps."""
    guidance_scale: float = Field(default=5.0, ge=1.0, le=50.0)
    """Scale of classifier-free guidance; 1 turns it off."""
    batch_size: int = Field(default=32, ge=1, le=MAX_BATCH)
    """Images per batch; it changes an image only by rounding."""
    precision: NativePrecision = "fp32"
    """Arithmetic of the denoiser; bf16 is faster on some devices and rounds more."""


class Sample(BaseModel):
    """Image to generate: a prompt, a seed and an index."""

    model_config = ConfigDict(frozen=True)

    prompt: str
    seed: Seed
    index: int = Field(default=0, ge=0, le=MAX_COUNT)
    """Index of the image for that seed; (seed, index) determine the noise."""
