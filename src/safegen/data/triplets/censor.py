"""Cover boxes of a picture, so that what they hold can no longer be seen."""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil, floor, isfinite
from typing import Annotated, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    model_validator,
)

from safegen.core.errors import ConfigError, explain

Style = Literal["mosaic", "blur", "solid"]
Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels."""
Byte = Annotated[int, Field(ge=0, le=255)]

LEAST_TILE = 2
"""A tile of fewer pixels hides nothing."""


class Censor(BaseModel):
    """How boxes are covered.

    Values that break a rule, or have no effect with the style, raise `ConfigError`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    style: Style = "mosaic"
    """What covers a box: a mosaic (every tile becomes its mean colour), a Gaussian blur, or one solid colour."""
    tile: float = Field(default=1 / 8, gt=0, le=1, allow_inf_nan=False)
    """Side of a mosaic tile as a fraction of the picture's shorter side.

    A blur's standard deviation is half of it.
    """
    padding: float = Field(default=0.1, ge=0, le=100, allow_inf_nan=False)
    """How far a box grows on each side before it is covered, as a fraction of its width and height."""
    colour: tuple[Byte, Byte, Byte] = (0, 0, 0)
    """Red, green and blue (0..255) of a solid cover."""

    @model_validator(mode="wrap")
    @classmethod
    def _refuse_in_one_line(cls, data: Any, build: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            settings = build(data)
        except ValidationError as error:
            raise ConfigError(explain(error, cls)) from error
        default = {name: field.default for name, field in cls.model_fields.items()}
        if settings.style == "solid" and settings.tile != default["tile"]:
            raise ConfigError(
                f"tile has no effect with the style 'solid', got {settings.tile}; leave it out, or choose mosaic or blur"
            )
        if settings.style != "solid" and settings.colour != default["colour"]:
            raise ConfigError(
                f"colour has no effect with the style {settings.style!r}, got {settings.colour}; leave it out, or choose solid"
            )
        return settings


def censor(image: Image.Image, boxes: Iterable[Box], settings: Censor) -> tuple[Image.Image, float]:
    """Cover `boxes` of a picture; the picture given is not touched.

    Mosaic tiles lie on the picture's own grid, so they do not depend on where a box starts:
    covering two boxes at once, one after the other, or one of them twice gives the same tiles.
    Every tile that a padded box touches is covered whole. A blur or a solid cover ends where the
    padded box ends, in whole pixels.

    Args:
        image: picture in mode RGB.
        boxes: left, top, right, bottom in pixels; they may reach over the picture's edge and
            overlap.
        settings: style, size of a tile, padding and colour.

    Returns:
        The covered picture, of the same size, and the fraction of its pixels that is covered, in
        [0, 1]. Pixels outside the cover are as before; without a box all are.

    Raises:
        ConfigError: the picture is not RGB, a box is upside down, not finite or outside the picture,
            or a tile would be smaller than two pixels.
    """
    if image.mode != "RGB":
        raise ConfigError(
            f"a picture to censor must be in mode RGB, got {image.mode!r}; convert it first"
        )
    pixels = np.asarray(image)
    mask = np.zeros(pixels.shape[:2], dtype=np.bool_)
    for box in boxes:
        mask[_padded(box, image.size, settings.padding)] = True
    if not mask.any():
        return image.copy(), 0.0
    cover: NDArray[np.uint8]
    if settings.style == "mosaic":
        mask, cover = _mosaic(pixels, mask, _tile_side(settings, image.size))
    elif settings.style == "blur":
        cover = np.asarray(
            image.filter(ImageFilter.GaussianBlur(_tile_side(settings, image.size) / 2))
        )
    else:
        cover = np.array(settings.colour, dtype=np.uint8)
    return Image.fromarray(np.where(mask[..., None], cover, pixels)), float(mask.mean())


def _padded(box: Box, size: tuple[int, int], padding: float) -> tuple[slice, slice]:
    """Return the rows and columns of the whole pixels that the padded box touches."""
    left, top, right, bottom = box
    if not all(isfinite(v) for v in box) or left > right or top > bottom:
        raise ConfigError(
            f"a box must be finite with left <= right and top <= bottom, got {tuple(box)}"
        )
    if left >= size[0] or top >= size[1] or right < 0 or bottom < 0:
        raise ConfigError(
            f"a box must touch the picture of {size[0]}x{size[1]} pixels, got {tuple(box)}"
        )
    grow_x, grow_y = padding * (right - left), padding * (bottom - top)
    x0, y0 = max(floor(left - grow_x), 0), max(floor(top - grow_y), 0)
    x1, y1 = (
        max(ceil(right + grow_x), x0 + 1),
        max(ceil(bottom + grow_y), y0 + 1),
    )  # a box without area still touches a pixel
    return slice(y0, y1), slice(x0, x1)


def _tile_side(settings: Censor, size: tuple[int, int]) -> float:
    """Return the side of a tile in pixels."""
    side = settings.tile * min(size)
    if side < LEAST_TILE:
        raise ConfigError(
            f"a tile must be at least {LEAST_TILE} pixels, got {side:.3g} ({settings.tile:.3g} of {min(size)} pixels); choose a larger tile"
        )
    return side


def _edges(length: int, side: float) -> NDArray[np.intp]:
    """Return where the tiles along `length` start, and where the last ends: as equal as whole pixels allow, none a mere rest."""
    count = max(
        int(length / side + 1e-9), 1
    )  # rounding must not lose a tile where `side` divides `length`
    return np.round(np.linspace(0, length, count + 1)).astype(np.intp)


def _mosaic(
    pixels: NDArray[np.uint8], mask: NDArray[np.bool_], side: float
) -> tuple[NDArray[np.bool_], NDArray[np.uint8]]:
    """Return `mask` grown to whole tiles, and the picture of all tiles' mean colours."""
    ys, xs = (_edges(length, side) for length in mask.shape)
    heights, widths = np.diff(ys), np.diff(xs)
    count = np.outer(heights, widths)[..., None]
    total = np.add.reduceat(
        np.add.reduceat(pixels.astype(np.int64), ys[:-1], axis=0), xs[:-1], axis=1
    )  # (rows, columns, 3)
    mean = ((2 * total + count) // (2 * count)).astype(
        np.uint8
    )  # rounded half up, in whole numbers: a tile of one colour keeps it
    touched = np.logical_or.reduceat(
        np.logical_or.reduceat(mask, ys[:-1], axis=0), xs[:-1], axis=1
    )  # (rows, columns)
    return touched.repeat(heights, axis=0).repeat(widths, axis=1), mean.repeat(
        heights, axis=0
    ).repeat(widths, axis=1)
