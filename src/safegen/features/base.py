"""Interface of the feature extractors, which map images and texts to vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from safegen.core.registry import EXTRACTORS, resolve

if TYPE_CHECKING:
    from torch import Tensor


@runtime_checkable
class Extractor(Protocol):
    """Network that maps each image to a feature vector."""

    id: str
    """Name, SHA-256 of the weights, and settings: extractors with one id give the same features."""
    width: int
    """Number of features per image."""

    def features(self, images: Sequence[Image.Image]) -> NDArray[np.float64]:
        """Return the features (n, width); a row depends on its image only, up to rounding."""
        ...


@runtime_checkable
class TextExtractor(Extractor, Protocol):
    """Extractor that maps texts to the same space, such as CLIP."""

    def texts(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """Return the features (n, width); long texts are truncated."""
        ...


@runtime_checkable
class DifferentiableExtractor(Extractor, Protocol):
    """Extractor that has a gradient with respect to the pixels."""

    def embed(self, pixels: Tensor) -> Tensor:
        """Return the features (n, width).

        Args:
            pixels: (n, 3, h, w) in [-1, 1], on any device.
        """
        ...


def list_differentiable_extractors() -> list[str]:
    """Return the names of the extractors that have a gradient."""
    return [name for name in EXTRACTORS if hasattr(resolve(EXTRACTORS, name, "extractor"), "embed")]


def load_extractor(name: str, *, weights: str | None = None, device: str = "cpu") -> Extractor:
    """Return an extractor by name.

    Args:
        name: a name in `EXTRACTORS`; `mini-clip` needs no weights.
        weights: a folder or `hub:owner/name` for `clip`; a .safetensors or .pth file for
            `inception` and its variants.
        device: a torch device.

    Raises:
        UnknownNameError: no such extractor.
        ConfigError: weights are missing, or not accepted.
        FileError: the weights cannot be read, or are of another network.
    """
    extractor: Extractor = resolve(EXTRACTORS, name, "extractor")(weights=weights, device=device)
    return extractor
