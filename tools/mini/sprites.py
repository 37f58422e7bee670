"""Cut the sprites out of the Noto Emoji font, to remake `sprites.png`.

python -m tools.mini.sprites NotoColorEmoji.ttf
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from tools.mini.drawing import GLYPHS, SPRITE_SHEET, SPRITE_SIZE


def make_sheet(font: Path, sheet: Path = SPRITE_SHEET) -> None:
    """Write a sheet of square cells, eight a row, with one glyph of `GLYPHS` in each."""
    type_face = ImageFont.truetype(str(font), 109)  # the only size that the bitmap font holds
    columns, rows = 8, -(-len(GLYPHS) // 8)
    image = Image.new("RGBA", (columns * SPRITE_SIZE, rows * SPRITE_SIZE))
    for i, glyph in enumerate(GLYPHS.values()):
        cell = Image.new("RGBA", (180, 180))
        ImageDraw.Draw(cell).text((20, 30), glyph, font=type_face, embedded_color=True)
        cell = cell.crop(cell.getbbox())
        scale = SPRITE_SIZE / max(cell.size)
        size = round(cell.width * scale), round(cell.height * scale)
        cell = cell.resize(size, Image.Resampling.LANCZOS)
        corner = (
            i % columns * SPRITE_SIZE + (SPRITE_SIZE - cell.width) // 2,
            i // columns * SPRITE_SIZE + (SPRITE_SIZE - cell.height) // 2,
        )
        image.paste(cell, corner)
    image.save(sheet, optimize=True)


if __name__ == "__main__":
    make_sheet(Path(sys.argv[1]))
