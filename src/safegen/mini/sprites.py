"""Cut the world's sprites out of the Noto Emoji font. Needed only to remake `sprites.png`; drawing never needs a font.

python -m safegen.mini.sprites NotoColorEmoji.ttf
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from safegen.mini.world import GLYPHS, SHEET, SPRITE


def cut(font: Path, sheet: Path = SHEET) -> None:
    """Draw every glyph of `GLYPHS` into a square cell of `SPRITE` pixels, in order, eight a row, and save the sheet."""
    type_face = ImageFont.truetype(str(font), 109)  # the only size that the bitmap font holds
    columns, rows = 8, -(-len(GLYPHS) // 8)
    out = Image.new("RGBA", (columns * SPRITE, rows * SPRITE))
    for i, glyph in enumerate(GLYPHS.values()):
        cell = Image.new("RGBA", (180, 180))
        ImageDraw.Draw(cell).text((20, 30), glyph, font=type_face, embedded_color=True)
        cell = cell.crop(cell.getbbox())
        scale = SPRITE / max(cell.size)
        cell = cell.resize(
            (round(cell.width * scale), round(cell.height * scale)), Image.Resampling.LANCZOS
        )
        corner = (
            i % columns * SPRITE + (SPRITE - cell.width) // 2,
            i // columns * SPRITE + (SPRITE - cell.height) // 2,
        )
        out.paste(cell, corner)
    out.save(sheet, optimize=True)


if __name__ == "__main__":
    cut(Path(sys.argv[1]))
