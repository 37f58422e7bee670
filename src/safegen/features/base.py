"""Feature extractors: pictures (and texts) to rows of numbers.

Which one made a number is part of the number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from safegen.core.registry import EXTRACTORS, resolve


@runtime_checkable
class Extractor(Protocol):
    """Looks at pictures and answers a row each."""

    id: str
    """Name, SHA-256 of the weights, and what else changes the numbers: extractors with one id give one answer."""
    width: int
    """Numbers per picture."""

    def features(self, images: Sequence[Image.Image]) -> NDArray[np.float64]:
        """Return (n, width), in order; a row does not depend on the others, beyond rounding."""
        ...


@runtime_checkable
class TextExtractor(Extractor, Protocol):
    """An extractor that puts texts into the same space, as CLIP does."""

    def texts(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """Return (n, width), in order; a text too long for the encoder is cut at its end."""
        ...


def load_extractor(name: str, *, weights: str | None = None, device: str = "cpu") -> Extractor:
    """Return the extractor called `name`.

    Args:
        name: `mini-clip` needs nothing; the others need weights that you have.
        weights: for `clip` a folder or `hub:owner/name`, which is fetched; for `inception...` a
            .safetensors or .pth file.
        device: a torch device.

    Raises:
        UnknownNameError: no such extractor.
        ConfigError: weights are missing, or given to one that has its own.
        FileError: the weights cannot be read or are another network's.
    """
    extractor: Extractor = resolve(EXTRACTORS, name, "extractor")(weights=weights, device=device)
    return extractor
