"""Training samples: latents of triplets, and captions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from safegen.core.concept import prompt_list
from safegen.core.errors import ConfigError, FileError
from safegen.core.files import read_lines
from safegen.data.images import crop_square, format_size
from safegen.data.triplets.triplets import Triplets
from safegen.edits.training.latents import latent_store, latents_key
from safegen.models.model import Model

TRIPLETS_PER_BATCH = 8
"""Triplets that are read, encoded and kept together."""
CAPTIONS_PER_LIST = 192
"""Captions that are used of each prompt list."""


def encode_triplets(model: Model, triplets: Triplets, *, flip: bool) -> Tensor:
    """Return scaled latents (3, flips, n, c, h, w) of unsafe, censored and benign images.

    The three images of a triplet get the same crop and flip. `TRIPLETS_PER_BATCH` of them are in
    memory as pixels at a time. See `latent_storage` for progress and for what is kept.

    Raises:
        FileError: an image is missing or changed, or an unsafe image and its censored twin differ
            in size.
    """
    store, n = latent_store(), len(triplets)
    parts = []
    for start in range(0, n, TRIPLETS_PER_BATCH):
        store.progress("encoding triplets", start, n)
        rows = range(start, min(start + TRIPLETS_PER_BATCH, n))
        key = latents_key(model, [triplets.rows[i] for i in rows], flip=flip)
        encode = partial(_encode_batch, model, triplets, rows, flip=flip)
        parts.append(store.encode(f"{start:06}", key, encode).to(model.device))
    store.progress("encoding triplets", n, n)
    return torch.cat(parts, dim=2)


def _encode_batch(model: Model, triplets: Triplets, rows: range, *, flip: bool) -> Tensor:
    """Return the latents (3, flips, n, c, h, w) of some triplets."""
    roles: list[list[Tensor]] = [[], [], []]
    for i in rows:
        images = triplets.images(i)
        if images[0].size != images[1].size:
            raise FileError(
                f"triplet {triplets.rows[i].id}: unsafe and censored image must have one size, "
                f"got {format_size(images[0])} and {format_size(images[1])}. "
                "`safegen triplets check` lists every such row."
            )
        for pixels, image in zip(roles, images, strict=True):
            pixels.append(preprocess(image, model.size))
    stacked = torch.stack([torch.stack(pixels) for pixels in roles])  # (3, n, 3, h, w)
    views = [stacked, stacked.flip(-1)] if flip else [stacked]
    latents = [torch.stack([model.encode_images(role).float() for role in v]) for v in views]
    return torch.stack(latents, dim=1)


def preprocess(image: Image.Image, size: int) -> Tensor:
    """Return an image as (3, size, size) in [-1, 1], resized by its short side and cropped."""
    crop = crop_square(image, size).convert("RGB")
    return torch.from_numpy(np.asarray(crop, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1


def mirror_latents(model: Model, latents: Tensor) -> Tensor:
    """Return the latents of mirrored images: decoded to 8 bits, mirrored and encoded."""
    images = [ImageOps.mirror(image) for image in model.decode_images(latents)]
    pixels = torch.stack([preprocess(image, model.size) for image in images])
    return model.encode_images(pixels).float()


def read_captions(names: Sequence[str]) -> list[str]:
    """Return the captions of prompt lists (`source:list`, the first 192 each) and of text files.

    Raises:
        FileError: a file is missing, empty, or of another kind.
    """
    captions: list[str] = []
    for name in names:
        if Path(name).suffix != ".txt" and Path(name).exists():
            raise FileError(
                f"captions must be in .txt files or lists such as mini:benign, got {name!r}. "
                "Write one caption per line."
            )
        if Path(name).suffix != ".txt":
            captions += [row.text for row in prompt_list(name, CAPTIONS_PER_LIST)]
            continue
        if not Path(name).is_file():
            raise FileError(f"the caption file {name!r} does not exist")
        try:
            lines = read_lines(Path(name))
        except FileError as error:
            raise FileError(f"the caption file {error}") from error
        if not lines:
            raise FileError(f"the caption file {name!r} is empty. Write one caption per line.")
        captions += lines
    return captions


def shuffled_rows(n: int, seed: int, start: int, count: int) -> list[int]:
    """Return `count` rows from position `start` of endless epochs over 0..n-1, each shuffled."""
    rows: list[int] = []
    while len(rows) < count:
        epoch, position = divmod(start + len(rows), n)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(n, generator=generator).tolist()
        rows += order[position : position + count - len(rows)]
    return rows


def held_out_rows(n: int, split: float) -> list[int]:
    """Return the rows of n triplets that are held out for validation: the last ones.

    Args:
        n: number of triplets.
        split: share that is held out; 0 holds out none.

    Raises:
        ConfigError: there are too few triplets to hold some out.
    """
    count = round(n * split)
    if split and not 0 < count < n:
        raise ConfigError(
            f"validation_split must hold out at least one triplet, got {split} of {n}. "
            "Give more triplets, or set training.validate_every to 0."
        )
    return list(range(n - count, n))
