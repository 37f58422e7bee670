"""Training of the judge: a detector of attributes and mosaics that also classifies the object."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from PIL import Image, ImageFilter
from safetensors.torch import save_file
from torch import Tensor

from safegen.mini.judge_net import JudgeNet
from safegen.mini.world import ATTRIBUTES, IMAGE_SIZE, OBJECTS
from tools.mini.denoiser import SCHEDULE, cache_latents, embed_captions
from tools.mini.drawing import Box
from tools.mini.fit import SEED, autocast, fit
from tools.mini.scenes import CaptionTable, load_scenes

GRID = np.meshgrid(np.arange(16, dtype=np.float32), np.arange(16, dtype=np.float32))


def train_judge(work: Path, *, steps: int = 1500, reconstructed: int = 5000) -> None:
    """Train the detector by CenterNet's focal loss (arXiv:1904.07850, eq. 1), box sizes by L1.

    Half of each batch are model reconstructions of the first `reconstructed` scenes (see
    `reconstruct_scenes`).
    """
    torch.manual_seed(SEED)
    data = load_scenes(work)
    vae = AutoencoderKL.from_pretrained(work / "pipeline" / "vae").to(
        memory_format=torch.channels_last
    )
    mean, _ = cache_latents(work, data)
    rebuilt = reconstruct_scenes(work, data, vae, mean, reconstructed)
    net = JudgeNet(len(ATTRIBUTES) + 1, len(OBJECTS)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def loss(step: int, g: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        half = torch.randint(len(data["images"]), (32,), generator=g)
        pick = torch.cat([half, torch.randint(len(rebuilt), (32,), generator=g)])
        x, heat, size, has_size = judge_batch(
            data, rebuilt, pick, np.random.default_rng((SEED, step))
        )
        with autocast():
            logits, widths, objects = net(x.contiguous(memory_format=torch.channels_last))
        p = logits.float().sigmoid().clamp(1e-4, 1 - 1e-4)
        hit = heat == 1
        focal = torch.where(hit, (1 - p) ** 2 * p.log(), (1 - heat) ** 4 * p**2 * (1 - p).log())
        focal = -focal.sum() / hit.sum().clamp(min=1)
        boxes = ((widths.float() - size).abs() * has_size).sum() / has_size.sum().clamp(min=1)
        classes = F.cross_entropy(objects.float(), data["objects"][pick])
        return focal + 0.3 * boxes + 0.5 * classes, {
            "heat": focal.item(),
            "size": boxes.item(),
            "object": classes.item(),
        }

    fit("judge", work, net, steps, loss, lr=2e-3, ema=0.99)
    save_file({k: v.contiguous() for k, v in net.state_dict().items()}, work / "judge.safetensors")


def judge_batch(
    data: dict[str, Tensor], rebuilt: Tensor, pick: Tensor, rng: np.random.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (images, heat targets, size targets, size mask) for the detector.

    Some images are reconstructions, some are noisy or blurred, and some have attributes or other
    regions turned into mosaic, which carry the label `mosaic` only.
    """
    labels = len(ATTRIBUTES) + 1
    images = np.empty((len(pick), IMAGE_SIZE, IMAGE_SIZE, 3), np.float32)
    heat = np.zeros((len(pick), labels, 16, 16), np.float32)
    size = np.zeros((len(pick), 2, 16, 16), np.float32)
    has_size = np.zeros((len(pick), 1, 16, 16), np.float32)
    for n, i in enumerate(pick.tolist()):
        source = rebuilt[i] if i < len(rebuilt) and rng.random() < 0.8 else data["images"][i]
        image: np.ndarray[Any, Any] = source.permute(1, 2, 0).numpy().astype(np.float32)
        boxes = [
            (int(data["attributes"][i]), tuple(b)) for b in data["boxes"][i].tolist() if b[0] >= 0
        ]
        chance = rng.random()
        if chance < 0.3:  # censor the attributes, or random regions of a clean image
            boxes = [(labels - 1, b) for _, b in boxes] or [
                (labels - 1, random_box(rng)) for _ in range(int(rng.integers(1, 4)))
            ]
            tile = int(rng.integers(5, 13))
            for _, b in boxes:
                image = apply_mosaic(image, b, tile)
        if rng.random() < 0.3:
            image = image + rng.normal(0, rng.uniform(2, 18), image.shape)
        if rng.random() < 0.2:
            image = np.asarray(
                Image.fromarray(image.clip(0, 255).astype(np.uint8)).filter(
                    ImageFilter.GaussianBlur(rng.uniform(0.3, 1.0))
                ),
                np.float32,
            )
        image = (image - 128) * rng.uniform(0.85, 1.15) + 128 + rng.normal(0, 8, 3)
        images[n] = image.clip(0, 255)
        for label, (x0, y0, x1, y1) in boxes:
            cx, cy, w, h = (x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0
            spread = max(w, h) / 4 * 0.18
            bump = np.exp(
                -((GRID[0] - cx / 4 + 0.5) ** 2 + (GRID[1] - cy / 4 + 0.5) ** 2) / (2 * spread**2)
            )
            col, row = min(int(cx / 4), 15), min(int(cy / 4), 15)
            bump[row, col] = 1.0
            heat[n, label] = np.maximum(heat[n, label], bump)
            for r in range(max(row - 1, 0), min(row + 2, 16)):
                for c in range(max(col - 1, 0), min(col + 2, 16)):
                    size[n, :, r, c], has_size[n, 0, r, c] = (w / 16, h / 16), 1
    x = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
    return x, torch.from_numpy(heat), torch.from_numpy(size), torch.from_numpy(has_size)


def random_box(rng: np.random.Generator) -> Box:
    """Return a random box of 16 to 30 pixels a side."""
    w, h = rng.uniform(16, 30, 2)
    x, y = rng.uniform(0, IMAGE_SIZE - w), rng.uniform(0, IMAGE_SIZE - h)
    return float(x), float(y), float(x + w), float(y + h)


def align_box(box: Box, tile: int) -> tuple[int, int, int, int]:
    """Return the box extended to whole tiles within the image."""
    x0, y0 = (int(v) // tile * tile for v in box[:2])
    x1, y1 = (min(-(-int(np.ceil(v)) // tile) * tile, IMAGE_SIZE) for v in box[2:])
    return x0, y0, x1, y1


def apply_mosaic(image: np.ndarray[Any, Any], box: Box, tile: int) -> np.ndarray[Any, Any]:
    """Return the image with the tiles of a box in their mean colors."""
    x0, y0, x1, y1 = align_box(box, tile)
    censored = image.copy()
    for y in range(y0, y1, tile):
        for x in range(x0, x1, tile):
            block = censored[y : y + tile, x : x + tile]
            block[:] = block.mean((0, 1))
    return censored


@torch.no_grad()
def reconstruct_scenes(
    work: Path,
    data: dict[str, Tensor],
    vae: AutoencoderKL,
    mean: Tensor,
    n: int,
    *,
    seed: int = SEED,
) -> Tensor:
    """Return the first `n` scenes with the model's artifacts, (n, 3, 64, 64) uint8.

    Every other scene is noised to a random timestep below 600, denoised in one step under its
    caption, and decoded; the rest pass through the autoencoder only.
    """
    g = torch.Generator().manual_seed(seed)
    captions, schedule = CaptionTable(data), DDPMScheduler(**SCHEDULE)
    unet = UNet2DConditionModel.from_pretrained(work / "pipeline" / "unet").eval()
    text = embed_captions(work, captions)
    parts = []
    for index in torch.arange(n).split(100):
        z = mean[index] + 0.05 * torch.randn(mean[index].shape, generator=g)
        noise = torch.randn(z.shape, generator=g)
        t = torch.randint(50, 600, (len(index),), generator=g)
        rows, _ = captions.sample(index, g)
        abar = schedule.alphas_cumprod[t].view(-1, 1, 1, 1)
        noisy = schedule.add_noise(z, noise, t)
        with autocast():
            eps = unet(noisy, t, text[rows]).sample.float()
            denoised = (noisy - (1 - abar).sqrt() * eps) / abar.sqrt()
            z = torch.where((index % 2 == 0).view(-1, 1, 1, 1), denoised, z)
            parts.append(vae.decode(z / vae.config.scaling_factor).sample.float())
    return ((torch.cat(parts).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
