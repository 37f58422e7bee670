"""Contact sheets: one image with many images in labelled rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo

from safegen.core.errors import ConfigError
from safegen.data.images import CONTACT_SHEET_MARK

INK, PAPER = (24, 24, 27), (255, 255, 255)


def image_grid(
    rows: Sequence[tuple[str, Sequence[Image.Image]]],
    *,
    cell: int = 96,
    gap: int = 4,
    label: int = 150,
) -> Image.Image:
    """Return one image of labelled rows of images, each fitted into `cell` pixels.

    Args:
        rows: (label, images) from top to bottom; a label may have line breaks.
        cell: side of an image in the grid, in pixels.
        gap: white between images, in pixels.
        label: width of the label column, in pixels; 0 leaves it out.

    Raises:
        ConfigError: there are no images.
    """
    columns = max((len(images) for _, images in rows), default=0)
    if columns == 0:
        raise ConfigError("a contact sheet needs at least one image, got none")
    size = (label + columns * (cell + gap) + gap, len(rows) * (cell + gap) + gap)
    grid = Image.new("RGB", size, PAPER)
    draw, font = ImageDraw.Draw(grid), ImageFont.load_default(size=15)
    for r, (text, images) in enumerate(rows):
        top = gap + r * (cell + gap)
        if label:
            middle = (gap + 4, top + cell / 2)
            draw.multiline_text(middle, text, fill=INK, font=font, anchor="lm", spacing=3)
        for c, image in enumerate(images):
            method = Image.Resampling.NEAREST if image.width < cell else Image.Resampling.LANCZOS
            scaled = ImageOps.pad(image.convert("RGB"), (cell, cell), method, PAPER)
            grid.paste(scaled, (label + gap + c * (cell + gap), top))
    return grid


def contact_sheet(
    images: Sequence[Image.Image], *, columns: int = 8, cell: int = 96
) -> Image.Image:
    """Return all images in rows of `columns`, without labels."""
    rows = [("", images[i : i + columns]) for i in range(0, len(images), columns)]
    return image_grid(rows, cell=cell, label=0)


def save_sheet(sheet: Image.Image, path: Path) -> None:
    """Write a contact sheet as a PNG that is marked as one, not as a generated image."""
    info = PngInfo()
    info.add_text(CONTACT_SHEET_MARK, "yes")
    sheet.save(path, format="PNG", pnginfo=info)
