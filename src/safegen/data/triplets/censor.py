"""Censoring: cover boxes of an image by a mosaic, a blur or a solid color."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from math import ceil, floor, isfinite
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from PIL import Image, ImageFilter
from pydantic import Field, ModelWrapValidatorHandler, ValidationError, model_validator

from safegen.core.errors import ConfigError, UnusedSettingWarning, explain
from safegen.core.settings import BaseSettings

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Style = Literal["mosaic", "blur", "solid"]
Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels."""
Byte = Annotated[int, Field(ge=0, le=255)]

MIN_TILE = 2
"""Least side of a mosaic tile in pixels; a smaller tile hides nothing."""


class Censor(BaseSettings):
    """Settings of a cover; invalid values raise `ConfigError`."""

    style: Style = "mosaic"
    """Cover: mosaic of mean colors, Gaussian blur, or solid color."""
    tile: float = Field(default=1 / 8, gt=0, le=1, allow_inf_nan=False)
    """Side of a mosaic tile over the image's shorter side; twice a blur's sigma."""
    padding: float = Field(default=0.1, ge=0, le=100, allow_inf_nan=False)
    """Growth of a box on each side, as a fraction of its width and height."""
    color: tuple[Byte, Byte, Byte] = (0, 0, 0)
    """Red, green and blue (0..255) of a solid cover."""

    @model_validator(mode="wrap")
    @classmethod
    def _raise_config_error(cls, data: Any, build: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            settings = build(data)
        except ValidationError as error:
            raise ConfigError(explain(error, cls)) from error
        unused = "tile" if settings.style == "solid" else "color"
        if getattr(settings, unused) != cls.model_fields[unused].default:
            message = f"{unused} has no effect with style {settings.style!r}"
            warnings.warn(message, UnusedSettingWarning, stacklevel=3)
        return settings


def censor_image(
    image: Image.Image, boxes: Iterable[Box], settings: Censor
) -> tuple[Image.Image, float]:
    """Return a copy of an image with its boxes covered, and the covered fraction in [0, 1].

    Mosaic tiles lie on a fixed grid of the image, so they do not depend on the position of a box:
    covering two boxes at once or one after the other gives the same tiles. Every tile that a padded
    box touches is covered completely. A blur or solid cover ends at the padded box, in whole
    pixels. Pixels outside the cover do not change.

    Args:
        image: image in mode RGB.
        boxes: left, top, right, bottom in pixels; they may overlap and cross the image's edge.
        settings: style, tile size, padding and color.

    Raises:
        ConfigError: the image is not RGB, a box is invalid or outside the image, or a tile is
            smaller than two pixels.
    """
    if image.mode != "RGB":
        raise ConfigError(f"image must be in mode RGB, got {image.mode!r}. Convert it first.")
    import numpy as np  # not for the help of the command line

    pixels = np.asarray(image)
    mask = np.zeros(pixels.shape[:2], dtype=np.bool_)
    for box in boxes:
        mask[_padded_slices(box, image.size, settings.padding)] = True
    if not mask.any():
        return image.copy(), 0.0
    cover: NDArray[np.uint8]
    if settings.style == "mosaic":
        mask, cover = _mosaic(pixels, mask, _tile_side(settings, image.size))
    elif settings.style == "blur":
        sigma = _tile_side(settings, image.size) / 2
        cover = np.asarray(image.filter(ImageFilter.GaussianBlur(sigma)))
    else:
        cover = np.array(settings.color, dtype=np.uint8)
    return Image.fromarray(np.where(mask[..., None], cover, pixels)), float(mask.mean())


def _padded_slices(box: Box, size: tuple[int, int], padding: float) -> tuple[slice, slice]:
    """Return the rows and columns of the pixels that the padded box touches."""
    left, top, right, bottom = box
    if not all(isfinite(v) for v in box) or left > right or top > bottom:
        raise ConfigError(
            f"a box must be finite with left <= right and top <= bottom, got {tuple(box)}"
        )
    if left >= size[0] or top >= size[1] or right < 0 or bottom < 0:
        raise ConfigError(
            f"a box must touch the image of {size[0]}x{size[1]} pixels, got {tuple(box)}"
        )
    grow_x, grow_y = padding * (right - left), padding * (bottom - top)
    x0, y0 = max(floor(left - grow_x), 0), max(floor(top - grow_y), 0)
    # a box without area still covers one pixel
    x1, y1 = max(ceil(right + grow_x), x0 + 1), max(ceil(bottom + grow_y), y0 + 1)
    return slice(y0, y1), slice(x0, x1)


def _tile_side(settings: Censor, size: tuple[int, int]) -> float:
    """Return the side of a tile in pixels."""
    side = settings.tile * min(size)
    if side < MIN_TILE:
        raise ConfigError(
            f"a tile must be at least {MIN_TILE} pixels, got {side:.3g} "
            f"({settings.tile:.3g} of {min(size)} pixels). Increase tile."
        )
    return side


def _tile_edges(length: int, side: float) -> NDArray[np.intp]:
    """Return the edges of tiles of nearly equal whole-pixel sides along `length`."""
    # 1e-9: rounding must not lose a tile if `side` divides `length`
    count = max(int(length / side + 1e-9), 1)
    import numpy as np  # not for the help of the command line

    return np.round(np.linspace(0, length, count + 1)).astype(np.intp)


def _mosaic(
    pixels: NDArray[np.uint8], mask: NDArray[np.bool_], side: float
) -> tuple[NDArray[np.bool_], NDArray[np.uint8]]:
    """Return `mask` extended to whole tiles, and the image of all tiles' mean colors."""
    ys, xs = (_tile_edges(length, side) for length in mask.shape)
    import numpy as np  # not for the help of the command line

    heights, widths = np.diff(ys), np.diff(xs)
    count = np.outer(heights, widths)[..., None]
    column_sums = np.add.reduceat(pixels.astype(np.int64), ys[:-1], axis=0)
    total = np.add.reduceat(column_sums, xs[:-1], axis=1)  # (rows, columns, 3)
    # rounded half up in integers, so a tile of one color keeps it
    mean = ((2 * total + count) // (2 * count)).astype(np.uint8)
    touched_rows = np.logical_or.reduceat(mask, ys[:-1], axis=0)
    touched = np.logical_or.reduceat(touched_rows, xs[:-1], axis=1)  # (rows, columns)
    return (
        touched.repeat(heights, axis=0).repeat(widths, axis=1),
        mean.repeat(heights, axis=0).repeat(widths, axis=1),
    )
