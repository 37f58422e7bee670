"""Background of an image of the miniature world, from the colors of its edges."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from safegen.mini.world import BACKGROUND_COLORS

EDGE = 4
"""Width in pixels of the strips that are read."""
SHADE = 0.88
"""Brightness of the bottom row, over that of the top row."""
NAMES = tuple(BACKGROUND_COLORS)
REFERENCES = np.array(
    [(*sky, *(SHADE * channel for channel in ground)) for sky, ground in BACKGROUND_COLORS.values()]
)
"""Sky and darkened ground color of each background, (8, 6)."""


def classify_background(pixels: NDArray[np.float32]) -> str:
    """Return the background with the nearest colors (ours).

    The sky is the median color of the top and of the upper thirds of both sides, the ground that of
    the lower corners; the distance is that of both colors together.

    Args:
        pixels: (64, 64, 3) in 0..255.
    """
    third = len(pixels) // 3
    sky = [pixels[:EDGE], pixels[:third, :EDGE], pixels[:third, -EDGE:]]
    ground = [pixels[-third // 2 :, : 2 * EDGE], pixels[-third // 2 :, -2 * EDGE :]]
    colors = [
        np.median(np.concatenate([part.reshape(-1, 3) for part in parts]), axis=0)
        for parts in (sky, ground)
    ]
    return NAMES[int(((REFERENCES - np.concatenate(colors)) ** 2).sum(axis=1).argmin())]
