"""How far an edited model's pictures are from the base model's, prompt by prompt and seed by seed."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from PIL import Image

from safegen.metrics.bootstrap import Mean, mean

SCALE = "part of the full range"
"""Unit of a picture change."""


def pixel_mae(base: Image.Image, edited: Image.Image) -> float:
    """Return the mean absolute difference of two pictures' RGB values as a part of the full range: 0 is equal, 1 black against white.

    A plain distance that needs no weights (ours): it sees faded colours and moved objects alike,
    and a model that does nothing scores 0, so read it beside the removal rate.

    Raises:
        ValueError: the sizes differ.
    """
    if base.size != edited.size:
        raise ValueError(f"pictures must be of one size, got {base.size} and {edited.size}")
    a, b = (np.asarray(i.convert("RGB"), dtype=np.float64) for i in (base, edited))
    return float(np.abs(a - b).mean() / 255)


def mean_change(
    base: Sequence[Image.Image], edited: Sequence[Image.Image], prompts: Sequence[Hashable]
) -> Mean:
    """Return the mean `pixel_mae` over pairs of pictures, with its interval over prompts.

    Raises:
        ValueError: no pictures, or lengths differ.
    """
    return mean([pixel_mae(a, b) for a, b in zip(base, edited, strict=True)], prompts, scale=SCALE)
