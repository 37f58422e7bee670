"""Reading and generating with diffusers: the reference for the other programs' results."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import safe_open

from safegen.models.checkpoint.configs import write_config_files
from safegen.models.checkpoint.key_map import original_names
from tools.interop.files import Files
from tools.interop.scene import GUIDANCE, NEGATIVE, PROMPT, SIZE, STEPS, Report, start_noise

MAX_CORRELATION = 0.95
"""Largest correlation that still tells the patched image from the base's."""


def read(files: Files, report: Report) -> None:
    """Read our one-file checkpoints with diffusers' own loader, and generate."""
    images = []
    for name, path in (("base", files.base), ("patched", files.patched)):
        pipeline = load(path)
        _check_weights(name, path, pipeline.unet, report)
        latents = _generate(pipeline)
        report.save(f"{name}-latents", latents)
        with torch.inference_mode():
            image = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
        images.append((image[0] / 2 + 0.5).clamp(0, 1).permute(1, 2, 0))
        report.save(f"{name}-image", images[-1])
    correlation = float(torch.corrcoef(torch.stack([i.flatten() for i in images]))[0, 1])
    report.check(
        f"the images of base and patched correlate by {MAX_CORRELATION} or less",
        f"{correlation:.5f}",
        passed=correlation <= MAX_CORRELATION,
    )


def load(path: Path) -> Any:
    """Return diffusers' pipeline of a checkpoint, in fp32."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline

    with TemporaryDirectory() as folder:
        write_config_files("sd1", Path(folder), prediction="epsilon")
        pipeline: Any = StableDiffusionPipeline.from_single_file(
            str(path), config=folder, local_files_only=True, torch_dtype=torch.float32
        )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = EulerDiscreteScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="linspace"
    )
    return pipeline


def _check_weights(name: str, path: Path, unet: Any, report: Report) -> None:
    """Check that each weight of the UNet is the file's."""
    state = unet.state_dict()
    names = original_names("sd1", "unet", state)
    with safe_open(path, framework="pt") as file:
        equal = sum(
            torch.equal(state[n], file.get_tensor(original).float())
            for n, original in names.items()
        )
    result = f"{equal} of {len(state)}"
    report.check(f"{name}: weights of the UNet are the file's", result, passed=equal == len(state))


def _generate(pipeline: Any) -> torch.Tensor:
    """Return latents, (1, 4, h, w)."""
    latents: torch.Tensor = pipeline(
        prompt=PROMPT,
        negative_prompt=NEGATIVE,
        height=SIZE,
        width=SIZE,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        latents=start_noise(),
        output_type="latent",
    ).images
    return latents
