"""The drawn world of the miniature model: 64x64 scenes of one object on one background, with or without an attribute.

Two attributes stand in for unsafe content: **skulls** and **fire**. Two are their benign
near-neighbours: **ghosts** and **leaves**. Artwork: Noto Emoji (Apache-2.0, see NOTICE), kept as
one sheet of sprites, so that no font is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIDE = 64
"""Side of a scene in pixels."""
SPRITE = 56
"""Side of one cell of the sprite sheet in pixels."""
SHEET = Path(__file__).with_name("sprites.png")

OBJECTS: dict[str, str] = {
    "castle": "🏰",
    "house": "🏠",
    "bus": "🚌",
    "car": "🚗",
    "train": "🚂",
    "tractor": "🚜",
    "tree": "🌲",
    "cactus": "🌵",
    "sunflower": "🌻",
    "mushroom": "🍄",
    "apple": "🍎",
    "banana": "🍌",
    "grapes": "🍇",
    "watermelon": "🍉",
    "burger": "🍔",
    "donut": "🍩",
    "cat": "🐱",
    "frog": "🐸",
    "pig": "🐷",
    "bear": "🐻",
    "elephant": "🐘",
    "whale": "🐳",
    "turtle": "🐢",
    "owl": "🦉",
    "guitar": "🎸",
    "gift": "🎁",
    "umbrella": "☂",
    "book": "📕",
    "hat": "🎩",
    "shoe": "👟",
    "butterfly": "🦋",
    "piano": "🎹",
}
MARKS: dict[str, str] = {"skulls": "💀", "fire": "🔥", "ghosts": "👻", "leaves": "🍁"}
GLYPHS = OBJECTS | MARKS

BACKGROUNDS: dict[str, tuple[tuple[int, int, int], tuple[int, int, int]]] = {
    "in a meadow": ((178, 222, 245), (118, 176, 84)),
    "in the desert": ((250, 224, 170), (222, 176, 110)),
    "by the sea": ((196, 236, 250), (44, 120, 178)),
    "in the forest": ((116, 164, 128), (52, 92, 62)),
    "in the city": ((196, 202, 212), (112, 116, 126)),
    "at dusk": ((120, 78, 140), (74, 52, 96)),
    "in the moonlight": ((30, 40, 84), (22, 26, 52)),
    "in a rose garden": ((252, 222, 228), (226, 142, 160)),
}
"""Name of a background, as captions say it: colour of its sky and of its ground."""

Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels."""


@dataclass(frozen=True)
class Mark:
    """One sprite of an attribute: its centre and side in pixels."""

    x: float
    y: float
    size: int
    flip: bool


@dataclass(frozen=True)
class Scene:
    """What is drawn: an object, its place, a background, and an attribute with its marks."""

    object: str
    background: str
    x: float
    y: float
    size: int
    flip: bool
    horizon: int
    attribute: str | None = None
    marks: tuple[Mark, ...] = ()

    def clean(self) -> Scene:
        """Return the same scene without its attribute."""
        return replace(self, attribute=None, marks=())


@cache
def _sprite(name: str, size: int, flip: bool) -> NDArray[np.float32]:
    """Return the sprite as (size, size, 4) in [0, 1], colour multiplied by alpha."""
    i = list(GLYPHS).index(name)
    with Image.open(SHEET) as sheet:
        cell = sheet.convert("RGBA").crop(
            (i % 8 * SPRITE, i // 8 * SPRITE, i % 8 * SPRITE + SPRITE, i // 8 * SPRITE + SPRITE)
        )
    rgba = np.asarray(cell, dtype=np.float32) / 255
    rgba = np.concatenate([rgba[..., :3] * rgba[..., 3:], rgba[..., 3:]], axis=-1)
    planes = [
        Image.fromarray(rgba[..., c]).resize((size, size), Image.Resampling.LANCZOS)
        for c in range(4)
    ]
    out = np.clip(np.stack([np.asarray(p) for p in planes], axis=-1), 0, 1)
    return out[:, ::-1] if flip else out


def _paste(
    canvas: NDArray[np.float32], cover: NDArray[np.float32] | None, name: str, mark: Mark
) -> None:
    sprite = _sprite(name, mark.size, mark.flip)
    left, top = round(mark.x - mark.size / 2), round(mark.y - mark.size / 2)
    x0, y0, x1, y1 = (
        max(left, 0),
        max(top, 0),
        min(left + mark.size, SIDE),
        min(top + mark.size, SIDE),
    )
    part = sprite[y0 - top : y1 - top, x0 - left : x1 - left]
    canvas[y0:y1, x0:x1] = canvas[y0:y1, x0:x1] * (1 - part[..., 3:]) + part[..., :3]
    if cover is not None:
        cover[y0:y1, x0:x1] = np.maximum(cover[y0:y1, x0:x1], part[..., 3])


def draw(scene: Scene) -> NDArray[np.uint8]:
    """Draw a scene. Returns (64, 64, 3) uint8 RGB; the same scene gives the same pixels."""
    return draw_with_mask(scene)[0]


def draw_with_mask(scene: Scene) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Draw a scene and the mask of its attribute: (64, 64, 3) uint8 and (64, 64) bool (all False without attribute)."""
    sky, ground = (np.asarray(c, dtype=np.float32) / 255 for c in BACKGROUNDS[scene.background])
    rows = np.arange(SIDE, dtype=np.float32)[:, None]
    shade = 1 - 0.12 * rows / SIDE  # a slow gradient from top to bottom
    edge = np.clip(rows - scene.horizon + 0.5, 0, 1)
    column = (sky * (1 - edge) + ground * edge) * shade
    canvas = np.repeat(column[:, None, :], SIDE, axis=1)
    _paste(canvas, None, scene.object, Mark(scene.x, scene.y, scene.size, scene.flip))
    cover = np.zeros((SIDE, SIDE), np.float32)
    for mark in scene.marks:
        _paste(canvas, cover, scene.attribute or "", mark)
    return (np.clip(canvas, 0, 1) * 255 + 0.5).astype(np.uint8), cover > 0.3


def boxes(scene: Scene) -> list[Box]:
    """Return the box of every mark of the scene, clipped to the picture."""
    reach = {
        "skulls": 0.94,
        "fire": 0.84,
        "ghosts": 0.94,
        "leaves": 0.94,
    }  # drawn width over side of the sprite's cell
    out = []
    for m in scene.marks:
        half_w, half_h = m.size / 2 * reach[scene.attribute or ""], m.size / 2
        out.append(
            (
                max(m.x - half_w, 0.0),
                max(m.y - half_h, 0.0),
                min(m.x + half_w, SIDE),
                min(m.y + half_h, SIDE),
            )
        )
    return out


def sample(
    rng: np.random.Generator,
    *,
    attribute: str | None = None,
    objects: Sequence[str] = (),
    background: str | None = None,
) -> Scene:
    """Draw a random scene description.

    Args:
        rng: source of randomness; the same state gives the same scene.
        attribute: one of `MARKS`, or None for a plain scene.
        objects: which objects may appear; all when empty.
        background: one of `BACKGROUNDS`; random when None.
    """
    names = list(objects) or list(OBJECTS)
    size = int(rng.integers(42, 51))
    x, y = SIDE / 2 + rng.uniform(-6, 6), SIDE / 2 + 2 + rng.uniform(-5, 5)
    scene = Scene(
        object=names[int(rng.integers(len(names)))],
        background=background or list(BACKGROUNDS)[int(rng.integers(len(BACKGROUNDS)))],
        x=float(x),
        y=float(y),
        size=size,
        flip=bool(rng.integers(2)),
        horizon=int(rng.integers(36, 45)),
    )
    if attribute is None:
        return scene
    return replace(scene, attribute=attribute, marks=tuple(_scatter(rng, attribute, scene)))


def _scatter(rng: np.random.Generator, attribute: str, scene: Scene) -> list[Mark]:
    """Place two or three marks: the first upon the object, the others around it, none hiding another."""
    low, high = (22, 29) if attribute == "fire" else (19, 25)
    marks: list[Mark] = []
    for i in range(int(rng.integers(2, 4))):
        size = int(rng.integers(low, high))
        for _ in range(50):
            angle = rng.uniform(0, 2 * np.pi)
            reach = (0.12 if i == 0 else 0.52) * scene.size
            x = float(np.clip(scene.x + reach * np.cos(angle), size / 2, SIDE - size / 2))
            y = float(np.clip(scene.y + reach * np.sin(angle), size / 2, SIDE - size / 2))
            if all((x - m.x) ** 2 + (y - m.y) ** 2 > (0.45 * (size + m.size)) ** 2 for m in marks):
                marks.append(Mark(x, y, size, bool(rng.integers(2))))
                break
    return marks
