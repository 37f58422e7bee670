"""Images that judges take: Pillow images, files and arrays."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from safegen.core.documents import read_bytes
from safegen.core.errors import ConfigError, FileError

ImageInput: TypeAlias = Image.Image | str | Path | NDArray[Any]
"""Pillow image, image file, or array (h, w, 3): uint8, or floats in [0, 1]."""
ImageInputs: TypeAlias = ImageInput | Sequence[ImageInput]
"""One image, several, or an array (n, h, w, 3)."""

EIGHT_BIT_MODES = frozenset(
    ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")
)
"""Pillow modes with eight bits per channel; other modes would be clipped at 255."""


def list_images(images: ImageInputs) -> list[ImageInput]:
    """Return images as a list, in order; one image is a list of one.

    Raises:
        ConfigError: `images` is none of `ImageInputs`. Its entries are not looked at.
    """
    if isinstance(images, Image.Image | str | Path):
        return [images]
    if isinstance(images, np.ndarray):
        return list(images) if images.ndim == 4 else [images]
    if isinstance(images, Iterable) and not hasattr(images, "__array__"):
        return list(images)
    raise ConfigError(
        "images must be Pillow images, files, numpy arrays (h, w, 3) or a list of them, "
        f"got {type(images).__name__}. Convert it first."
    )


def as_rgb(image: ImageInput) -> Image.Image:
    """Return an image in RGB.

    Transparency of a Pillow image is dropped, not blended; that of a file is on white.

    Raises:
        ValueError: the image cannot be read, has no pixels or no 8-bit channels, or is an array of
            another shape, type or range.
    """
    if isinstance(image, str | Path):
        return _read_file(Path(image))
    if isinstance(image, np.ndarray):
        return Image.fromarray(_to_bytes(image))
    if not isinstance(image, Image.Image):
        raise ValueError(  # noqa: TRY004 an image that cannot be judged, as any other
            f"image must be a Pillow image, a file or a numpy array, got {type(image).__name__}"
        )
    _check_pixels(image)
    return image.convert("RGB")


def flatten_image(image: Image.Image) -> Image.Image:
    """Return an opened file as RGB: rotated as its EXIF says, transparency on white."""
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def _check_pixels(image: Image.Image) -> None:
    """Raise ValueError if an image has no pixels, or more than 8 bits per channel."""
    if image.mode not in EIGHT_BIT_MODES:
        raise ValueError(
            f"image mode must have 8-bit channels, got {image.mode}. Convert it to RGB first."
        )
    if 0 in image.size:
        raise ValueError(f"image must have pixels, got size {image.width}x{image.height}")


def _read_file(path: Path) -> Image.Image:
    try:
        with Image.open(BytesIO(read_bytes(path))) as file:
            _check_pixels(file)
            return flatten_image(file)
    except UnidentifiedImageError as error:
        raise ValueError(f"{str(path)!r} must be an image of a known format") from error
    except FileError as error:
        raise ValueError(str(error)) from error


def _to_bytes(array: NDArray[Any]) -> NDArray[np.uint8]:
    """Return an array of pixels as bytes."""
    if array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        raise ValueError(f"array must be (height, width, 3), got shape {array.shape}")
    if array.dtype == np.uint8:
        return array
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"array must be uint8 or floats in [0, 1], got {array.dtype}")
    low, high = float(array.min()), float(array.max())
    if not 0 <= low <= high <= 1:
        raise ValueError(f"array of floats must be in [0, 1], got {low:g} to {high:g}. Scale it.")
    return (array * 255).round().astype(np.uint8)
