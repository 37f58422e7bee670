"""What samples are made of: latents of triplets, and captions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from safegen.core.concept import prompt_list
from safegen.core.errors import FileError
from safegen.core.files import read_lines
from safegen.data.images import format_size
from safegen.data.triplets.triplets import Triplets
from safegen.models.model import Model


def encode_triplets(model: Model, triplets: Triplets, *, flip: bool) -> Tensor:
    """Return scaled latents (3, flips, n, c, h, w) of unsafe, censored and benign pictures; all three get the same crop and flip.

    Raises:
        FileError: a picture is missing or changed, or an unsafe one and its censored twin have two
            sizes, so that they would not lie upon each other.
    """
    sides: list[list[Tensor]] = [[], [], []]
    for i in range(len(triplets)):
        pictures = triplets.images(i)
        if pictures[0].size != pictures[1].size:
            raise FileError(
                f"triplet {triplets.rows[i].id}: its unsafe and censored pictures must have one size, got {format_size(pictures[0])} and "
                f"{format_size(pictures[1])}; `safegen triplets check` names every such row"
            )
        for side, image in zip(sides, pictures, strict=True):
            side.append(to_pixels(image, model.size))
    pixels = torch.stack([torch.stack(s) for s in sides])  # (3, n, 3, h, w)
    views = [pixels, pixels.flip(-1)] if flip else [pixels]
    found = [torch.stack([model.encode_images(side).float() for side in view]) for view in views]
    return torch.stack(found, dim=1)


def to_pixels(image: Image.Image, side: int) -> Tensor:
    """Return a picture as (3, side, side) in [-1, 1]: short side scaled to `side` (bilinear), then the centre cut out."""
    scale = side / min(image.size)
    if scale != 1:
        image = image.resize(
            (round(image.width * scale), round(image.height * scale)), Image.Resampling.BILINEAR
        )
    left, top = (image.width - side) // 2, (image.height - side) // 2
    cut = image.convert("RGB").crop((left, top, left + side, top + side))
    return torch.from_numpy(np.asarray(cut, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1


def read_captions(names: Sequence[str]) -> list[str]:
    """Return the captions of prompt lists (`source:list`, the first 192 of each) and of text files.

    Raises:
        FileError: a file is missing or has no line.
    """
    out: list[str] = []
    for name in names:
        if Path(name).suffix == ".txt":
            if not Path(name).is_file():
                raise FileError(f"the caption file {name!r} does not exist")
            try:
                lines = read_lines(Path(name))
            except FileError as error:
                raise FileError(f"the caption file {error}") from error
            if not lines:
                raise FileError(f"the caption file {name!r} has no caption; write one a line")
            out += lines
        else:
            out += [row.text for row in prompt_list(name, 192)]
    return out
