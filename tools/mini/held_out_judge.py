"""Training of the held-out judge, a classifier of whole images, on scenes of its own seed."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from safegen.mini.held_out_net import HeldOutNet
from safegen.mini.world import ATTRIBUTES, IMAGE_SIZE, OBJECTS
from tools.mini.drawing import Box
from tools.mini.fit import SEED, autocast, fit
from tools.mini.judge import align_box, apply_mosaic, random_box, reconstruct_scenes
from tools.mini.scenes import as_tensors, make_scenes, scene_arrays, to_unit

HELD_OUT_SEED = SEED + 3
"""Seed of the scenes, the weights and the distortions; the first judge uses `SEED`."""
MOSAIC_SHARE, EXPECTED_MOSAIC_SHARE = 0.3, 0.03
"""Share of images with a mosaic in training, and the one that scores assume."""
FLAT_SHARE = 0.1
"""Share of training images with a flat color over a region."""
MIN_VISIBLE = 0.5
"""Visible part of a sprite's box from which the image counts as showing the attribute."""

Pixels = NDArray[np.float32]
"""Image (64, 64, 3) in 0..255."""


def train_held_out_judge(
    work: Path,
    *,
    steps: int = 3000,
    scenes: int = 12_000,
    reconstructed: int = 5000,
    objects: Sequence[str] = (),
) -> None:
    """Train the classifier by binary cross-entropy per label and cross-entropy of the object.

    Half of each batch are model reconstructions of the first `reconstructed` scenes, as for the
    first judge. Scenes, weights and distortions are other draws. Mosaics are more frequent in
    training than in use; the logit is shifted for that (Elkan 2001, theorem 2).
    """
    torch.manual_seed(HELD_OUT_SEED)
    data = as_tensors(scene_arrays(make_scenes(scenes, HELD_OUT_SEED, objects)))
    rebuilt = _reconstruct(work, data, reconstructed)
    net = HeldOutNet(len(ATTRIBUTES) + 1, len(OBJECTS))

    def loss(step: int, g: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        half = torch.randint(len(data["images"]), (24,), generator=g)
        pick = torch.cat([half, torch.randint(len(rebuilt), (24,), generator=g)])
        x, present = held_out_batch(
            data, rebuilt, pick, np.random.default_rng((HELD_OUT_SEED, step))
        )
        with autocast():
            labels, kinds = net(x)
        presence = F.binary_cross_entropy_with_logits(labels.float(), present)
        classes = F.cross_entropy(kinds.float(), data["objects"][pick])
        return 5 * presence + 0.5 * classes, {"labels": presence.item(), "object": classes.item()}

    fit("held-out-judge", work, net, steps, loss, lr=2e-3, ema=0.998)
    with torch.no_grad():
        net.labels.bias[-1] += logit(EXPECTED_MOSAIC_SHARE) - logit(MOSAIC_SHARE)
    save_file(net.state_dict(), work / "held_out_judge.safetensors")


def logit(p: float) -> float:
    """Return the log-odds of a probability."""
    return math.log(p / (1 - p))


@torch.no_grad()
def _reconstruct(work: Path, data: dict[str, Tensor], n: int) -> Tensor:
    """Return the first `n` scenes with the model's artifacts, (n, 3, 64, 64) uint8."""
    vae = AutoencoderKL.from_pretrained(work / "pipeline" / "vae")
    parts = []
    for batch in data["images"][:n].split(100):
        with autocast():
            parts.append(vae.encode(to_unit(batch)).latent_dist.mode().float())
    mean = torch.cat(parts) * vae.config.scaling_factor
    return reconstruct_scenes(work, data, vae, mean, n, seed=HELD_OUT_SEED)


def held_out_batch(
    data: dict[str, Tensor], rebuilt: Tensor, pick: Tensor, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Return (images, presence): pixels in [-1, 1], and 1 for each label that an image shows.

    Some images are reconstructions, some have regions hidden by a mosaic or a flat color, and all
    are distorted. An attribute counts as shown if one of its sprites is at least half visible.
    """
    images = np.empty((len(pick), IMAGE_SIZE, IMAGE_SIZE, 3), np.float32)
    present = np.zeros((len(pick), len(ATTRIBUTES) + 1), np.float32)
    for n, i in enumerate(pick.tolist()):
        source = rebuilt[i] if i < len(rebuilt) and rng.random() < 0.8 else data["images"][i]
        marks: list[Box] = [(b[0], b[1], b[2], b[3]) for b in data["boxes"][i].tolist()]
        marks = [b for b in marks if b[0] >= 0]
        image, hidden, mosaic = _hide_regions(
            source.permute(1, 2, 0).numpy().astype(np.float32), marks, rng
        )
        if any(1 - _share(hidden, b) >= MIN_VISIBLE for b in marks):
            present[n, int(data["attributes"][i])] = 1
        present[n, -1] = mosaic
        images[n] = _distort(image, rng)
    return torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1, torch.from_numpy(present)


def _hide_regions(
    image: Pixels, marks: Sequence[Box], rng: np.random.Generator
) -> tuple[Pixels, NDArray[np.bool_], bool]:
    """Return the image, the mask of its hidden pixels, and whether a mosaic hides them.

    A mosaic or a flat color lies on sprites or on random boxes.
    """
    hidden = np.zeros((IMAGE_SIZE, IMAGE_SIZE), np.bool_)
    chance, tile = rng.random(), int(rng.integers(5, 14))
    if chance >= MOSAIC_SHARE + FLAT_SHARE:
        return image, hidden, False
    if marks and rng.random() < 0.75:
        boxes = [b for b in marks if rng.random() < 0.8] or [marks[0]]
    else:
        boxes = [random_box(rng) for _ in range(int(rng.integers(1, 4)))]
    for box in boxes:
        x0, y0, x1, y1 = align_box(box, tile)
        hidden[y0:y1, x0:x1] = True
        if chance < MOSAIC_SHARE:
            image = apply_mosaic(image, box, tile)
        else:
            image[y0:y1, x0:x1] = rng.uniform(0, 255, 3)
    return image, hidden, chance < MOSAIC_SHARE


def _share(hidden: NDArray[np.bool_], box: Box) -> float:
    """Return the hidden share of a box."""
    x0, y0, x1, y1 = (round(v) for v in box)
    return float(hidden[y0:y1, x0:x1].mean())


def _distort(image: NDArray[Any], rng: np.random.Generator) -> Pixels:
    """Return the image mirrored, moved, recolored, resized, compressed or noisy, at random."""
    if rng.random() < 0.5:
        image = image[:, ::-1]
    if rng.random() < 0.5:
        (dx, dy), edge = rng.integers(0, 9, 2), ((4, 4), (4, 4), (0, 0))
        image = np.pad(image, edge, "edge")[dy : dy + IMAGE_SIZE, dx : dx + IMAGE_SIZE]
    grey = image.mean(-1, keepdims=True)
    image = grey + (image - grey) * rng.uniform(0.6, 1.3)
    image = 255 * (image.clip(0, 255) / 255) ** rng.uniform(0.75, 1.35)
    image = image * rng.uniform(0.9, 1.1, 3) + rng.normal(0, 5, 3)
    chance = rng.random()
    if chance < 0.4:
        picture = Image.fromarray(image.clip(0, 255).astype(np.uint8))
        if chance < 0.2:
            side = int(rng.integers(36, 60))
            picture = picture.resize((side, side), Image.Resampling.BILINEAR)
            picture = picture.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
        else:
            file = io.BytesIO()
            picture.save(file, "JPEG", quality=int(rng.integers(30, 95)))
            picture = Image.open(file)
        image = np.asarray(picture, np.float32)
    if rng.random() < 0.3:
        image = image + rng.normal(0, rng.uniform(2, 16), image.shape)
    return image.clip(0, 255).astype(np.float32)
