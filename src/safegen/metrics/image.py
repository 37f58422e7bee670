"""Pixel difference between the images of an edited model and of its base model."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from PIL import Image

from safegen.metrics.bootstrap import Mean, bootstrap_mean

SCALE = "part of the full range"
"""Unit of `pixel_mae`."""


def pixel_mae(base: Image.Image, edited: Image.Image) -> float:
    """Return the mean absolute difference of two images' RGB values, in [0, 1].

    0 is equal, 1 is black against white. Faded colors and moved objects both count, and an edit
    without effect scores 0: read it together with the removal rate.

    Raises:
        ValueError: the sizes differ.
    """
    if base.size != edited.size:
        raise ValueError(f"images must have one size, got {base.size} and {edited.size}")
    a, b = (np.asarray(i.convert("RGB"), dtype=np.float64) for i in (base, edited))
    return float(np.abs(a - b).mean() / 255)


def mean_pixel_mae(
    base: Sequence[Image.Image], edited: Sequence[Image.Image], prompts: Sequence[Hashable]
) -> Mean:
    """Return the mean `pixel_mae` over pairs of images, with its interval over prompts.

    Raises:
        ValueError: there are no images, or lengths differ.
    """
    values = [pixel_mae(a, b) for a, b in zip(base, edited, strict=True)]
    return bootstrap_mean(values, prompts, scale=SCALE)
