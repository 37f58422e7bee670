"""Full-size files of random weights, written by this package, for other programs to read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from safegen.models.checkpoint import configs
from safegen.models.checkpoint.single_file_writer import save_single_file
from safegen.models.model import Model
from safegen.models.selectors import select_parameters
from safegen.patches.lora import Lora, save_lora

RANK = 8
CHANGE = 0.7
"""Size of the random change of each attn1 matrix, as a share of the matrix."""


@dataclass(frozen=True)
class Files:
    """Files in a folder."""

    folder: Path

    @property
    def base(self) -> Path:
        """SD 1.x of random weights in one file, fp16."""
        return self.folder / "base.safetensors"

    @property
    def patched(self) -> Path:
        """The same with a patch of attn1 on it."""
        return self.folder / "patched.safetensors"

    @property
    def kohya(self) -> Path:
        """The patch as a LoRA in kohya's keys."""
        return self.folder / "kohya.safetensors"

    @property
    def diffusers(self) -> Path:
        """The patch as a LoRA in diffusers' keys."""
        return self.folder / "diffusers.safetensors"

    def write(self) -> None:
        """Write the files that are missing. It takes about 6 GB of memory and 4 GB of disk."""
        paths = (self.base, self.patched, self.kohya, self.diffusers)
        if all(path.exists() for path in paths):
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in paths:
            path.unlink(missing_ok=True)
        model = random_model()
        lora = random_lora(model)
        save_lora(lora, model, self.kohya, keys="kohya")
        save_lora(lora, model, self.diffusers, keys="diffusers")
        save_single_file(model, self.base)
        with lora.to_patch(model).apply(model):
            save_single_file(model, self.patched)


def random_model(seed: int = 0, *, architecture: str = "sd1") -> Model:
    """Return a model of real size with random weights in fp16; equal seeds give equal weights.

    Args:
        seed: seed of the weights.
        architecture: `sd1` or `sdxl`.
    """
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    with TemporaryDirectory() as name:
        folder = Path(name)
        configs.write_config_files(architecture, folder, prediction="epsilon")
        with torch.device("meta"):
            parts: dict[str, Any] = {
                "unet": diffusers.UNet2DConditionModel.from_config(configs.UNET[architecture]),
                "vae": diffusers.AutoencoderKL.from_config(configs.VAE[architecture]),
                "text_encoder": CLIPTextModel(
                    CLIPTextConfig.from_pretrained(folder / "text_encoder")
                ),
            }
            if architecture == "sdxl":
                parts["text_encoder_2"] = CLIPTextModelWithProjection(
                    CLIPTextConfig.from_pretrained(folder / "text_encoder_2")
                )
        generator = torch.Generator("cpu").manual_seed(seed)
        for component, part in parts.items():
            part.half().to_empty(device="cpu")
            parts[component] = _randomize(part, generator)
        if architecture == "sdxl":
            kind, options = diffusers.StableDiffusionXLPipeline, {}
        else:
            kind, options = diffusers.StableDiffusionPipeline, {"safety_checker": None}
        pipeline = kind.from_pretrained(folder, **parts, **options, local_files_only=True)
    return Model(f"random {configs.TITLES[architecture]}", pipeline)


def _randomize(module: nn.Module, generator: torch.Generator) -> nn.Module:
    """Fill a module with weights that keep the size of activations: 1 / sqrt(inputs)."""
    for name, weight in module.named_parameters():
        if weight.ndim == 1:
            value = torch.full(weight.shape, float("norm" in name and name.endswith("weight")))
        else:
            inputs = 1 if "embedding" in name and "time" not in name else weight[0].numel()
            scale = 0.02 if inputs == 1 else 1 / math.sqrt(inputs)
            value = scale * torch.randn(weight.shape, generator=generator)
        weight.data.copy_(value)
    for name, buffer in module.named_buffers():
        if name.endswith("position_ids"):
            buffer.copy_(torch.arange(buffer.shape[-1]).expand_as(buffer))
    return module.eval().requires_grad_(requires_grad=False)


def random_lora(model: Model, seed: int = 1) -> Lora:
    """Return random factors of `RANK` for each matrix of attn1, of `CHANGE` times its size."""
    generator = torch.Generator("cpu").manual_seed(seed)
    weights, factors = dict(model.denoiser.named_parameters()), {}
    for name in select_parameters(model.denoiser, "attn1"):
        if not name.endswith(".weight"):
            continue
        out, inputs = weights[name].shape
        down = torch.randn(RANK, inputs, generator=generator)
        up = torch.randn(out, RANK, generator=generator)
        size = float(weights[name].float().norm()) * CHANGE / float((up @ down).norm())
        factors[name] = (down * math.sqrt(size), up * math.sqrt(size))
    return Lora(factors, RANK, dict.fromkeys(factors, 1.0), (), 1.0)
