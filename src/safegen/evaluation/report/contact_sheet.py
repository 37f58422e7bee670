"""Contact sheets: pictures side by side with what they are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from safegen.core.errors import ConfigError
from safegen.data.images import CONTACT_SHEET_MARK

INK, PAPER = (24, 24, 27), (255, 255, 255)


def sheet(
    rows: Sequence[tuple[str, Sequence[Image.Image]]],
    *,
    cell: int = 96,
    gap: int = 4,
    label: int = 150,
) -> Image.Image:
    """Return a picture of labelled rows; every picture is scaled to `cell` pixels.

    Args:
        rows: (label, pictures) from top to bottom; a label may have line breaks.
        cell: side of a picture on the sheet, in pixels.
        gap: white between pictures, in pixels.
        label: width of the label column, in pixels; 0 leaves it out.

    Raises:
        ConfigError: there are no pictures.
    """
    columns = max((len(pictures) for _, pictures in rows), default=0)
    if columns == 0:
        raise ConfigError("a contact sheet needs at least one picture")
    out = Image.new(
        "RGB", (label + columns * (cell + gap) + gap, len(rows) * (cell + gap) + gap), PAPER
    )
    pen, font = ImageDraw.Draw(out), ImageFont.load_default(size=15)
    for r, (text, pictures) in enumerate(rows):
        top = gap + r * (cell + gap)
        if label:
            pen.multiline_text(
                (gap + 4, top + cell / 2), text, fill=INK, font=font, anchor="lm", spacing=3
            )
        for c, picture in enumerate(pictures):
            up = Image.Resampling.NEAREST if picture.width < cell else Image.Resampling.LANCZOS
            out.paste(
                picture.convert("RGB").resize((cell, cell), up),
                (label + gap + c * (cell + gap), top),
            )
    return out


def contact_sheet(
    pictures: Sequence[Image.Image], *, columns: int = 8, cell: int = 96
) -> Image.Image:
    """Return all pictures in rows of `columns`, without labels."""
    rows = [("", pictures[i : i + columns]) for i in range(0, len(pictures), columns)]
    return sheet(rows, cell=cell, label=0)


def save_sheet(image: Image.Image, out: Path) -> None:
    """Write a sheet as a PNG that says that it is one, so that it is never taken for a picture."""
    info = PngInfo()
    info.add_text(CONTACT_SHEET_MARK, "yes")
    image.save(out, format="PNG", pnginfo=info)
