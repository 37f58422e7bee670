"""Scenes of the miniature world: one object on one background, with or without an attribute.

Artwork: Noto Emoji (Apache-2.0, see NOTICE), stored as one sheet of sprites, so that drawing needs
no font.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from safegen.mini.world import ATTRIBUTES, BACKGROUND_COLORS, BACKGROUNDS, IMAGE_SIZE, OBJECTS

SPRITE_SIZE = 56
"""Side of one cell of the sprite sheet in pixels."""
SPRITE_SHEET = Path(__file__).with_name("sprites.png")
GLYPHS = dict(
    zip(
        OBJECTS + ATTRIBUTES,
        "🏰🏠🚌🚗🚂🚜🌲🌵🌻🍄🍎🍌🍇🍉🍔🍩🐱🐸🐷🐻🐘🐳🐢🦉🎸🎁☂📕🎩👟🦋🎹💀🔥👻🍁",
        strict=True,
    )
)
"""Emoji of each object and attribute, in the order of the sheet's cells."""

DRAWN_WIDTH = {"skulls": 0.94, "fire": 0.84, "ghosts": 0.94, "leaves": 0.94}
"""Width of an attribute's artwork over the side of its cell."""

Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels."""


@dataclass(frozen=True)
class Mark:
    """One sprite of an attribute: its center and side in pixels."""

    x: float
    y: float
    size: int
    flip: bool


@dataclass(frozen=True)
class Scene:
    """One object with its position, a background, and an attribute with its sprites."""

    object: str
    background: str
    x: float
    y: float
    size: int
    flip: bool
    horizon: int
    attribute: str | None = None
    marks: tuple[Mark, ...] = ()

    def without_attribute(self) -> Scene:
        """Return the same scene without its attribute."""
        return replace(self, attribute=None, marks=())


@cache
def _sprite(name: str, size: int, flip: bool) -> NDArray[np.float32]:
    """Return the sprite as (size, size, 4) in [0, 1], color multiplied by alpha."""
    row, column = divmod(list(GLYPHS).index(name), 8)
    left, top = column * SPRITE_SIZE, row * SPRITE_SIZE
    with Image.open(SPRITE_SHEET) as sheet:
        cell = sheet.convert("RGBA").crop((left, top, left + SPRITE_SIZE, top + SPRITE_SIZE))
    rgba = np.asarray(cell, dtype=np.float32) / 255
    rgba = np.concatenate([rgba[..., :3] * rgba[..., 3:], rgba[..., 3:]], axis=-1)
    planes = [
        Image.fromarray(rgba[..., c]).resize((size, size), Image.Resampling.LANCZOS)
        for c in range(4)
    ]
    sprite = np.clip(np.stack([np.asarray(p) for p in planes], axis=-1), 0, 1)
    return sprite[:, ::-1] if flip else sprite


def _paste(
    canvas: NDArray[np.float32], coverage: NDArray[np.float32] | None, name: str, mark: Mark
) -> None:
    """Blend a sprite into the canvas; write its opacity to `coverage`."""
    sprite = _sprite(name, mark.size, mark.flip)
    left, top = round(mark.x - mark.size / 2), round(mark.y - mark.size / 2)
    x0, y0 = max(left, 0), max(top, 0)
    x1, y1 = min(left + mark.size, IMAGE_SIZE), min(top + mark.size, IMAGE_SIZE)
    visible = sprite[y0 - top : y1 - top, x0 - left : x1 - left]
    canvas[y0:y1, x0:x1] = canvas[y0:y1, x0:x1] * (1 - visible[..., 3:]) + visible[..., :3]
    if coverage is not None:
        coverage[y0:y1, x0:x1] = np.maximum(coverage[y0:y1, x0:x1], visible[..., 3])


def draw(scene: Scene) -> NDArray[np.uint8]:
    """Return the image of a scene, (64, 64, 3) uint8 RGB; equal scenes give equal pixels."""
    return draw_with_mask(scene)[0]


def draw_with_mask(scene: Scene) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Return the image of a scene and the mask of its attribute, (64, 64) bool."""
    colors = BACKGROUND_COLORS[scene.background]
    sky, ground = (np.asarray(color, dtype=np.float32) / 255 for color in colors)
    rows = np.arange(IMAGE_SIZE, dtype=np.float32)[:, None]
    shade = 1 - 0.12 * rows / IMAGE_SIZE  # a slow gradient from top to bottom
    edge = np.clip(rows - scene.horizon + 0.5, 0, 1)
    column = (sky * (1 - edge) + ground * edge) * shade
    canvas = np.repeat(column[:, None, :], IMAGE_SIZE, axis=1)
    _paste(canvas, None, scene.object, Mark(scene.x, scene.y, scene.size, scene.flip))
    coverage = np.zeros((IMAGE_SIZE, IMAGE_SIZE), np.float32)
    for mark in scene.marks:
        _paste(canvas, coverage, scene.attribute or "", mark)
    return (np.clip(canvas, 0, 1) * 255 + 0.5).astype(np.uint8), coverage > 0.3


def mark_boxes(scene: Scene) -> list[Box]:
    """Return the box of every attribute sprite of the scene, clipped to the image."""
    boxes = []
    for m in scene.marks:
        half_w, half_h = m.size / 2 * DRAWN_WIDTH[scene.attribute or ""], m.size / 2
        left, top = max(m.x - half_w, 0.0), max(m.y - half_h, 0.0)
        boxes.append((left, top, min(m.x + half_w, IMAGE_SIZE), min(m.y + half_h, IMAGE_SIZE)))
    return boxes


def sample_scene(
    rng: np.random.Generator,
    *,
    attribute: str | None = None,
    objects: Sequence[str] = (),
    background: str | None = None,
) -> Scene:
    """Return a random scene.

    Args:
        rng: source of randomness; the same state gives the same scene.
        attribute: one of `ATTRIBUTES`, or None for a plain scene.
        objects: objects to choose from; all when empty.
        background: one of `BACKGROUNDS`; random when None.
    """
    names = list(objects) or list(OBJECTS)
    size = int(rng.integers(42, 51))
    x, y = IMAGE_SIZE / 2 + rng.uniform(-6, 6), IMAGE_SIZE / 2 + 2 + rng.uniform(-5, 5)
    scene = Scene(
        object=names[int(rng.integers(len(names)))],
        background=background or BACKGROUNDS[int(rng.integers(len(BACKGROUNDS)))],
        x=float(x),
        y=float(y),
        size=size,
        flip=bool(rng.integers(2)),
        horizon=int(rng.integers(36, 45)),
    )
    if attribute is None:
        return scene
    return replace(scene, attribute=attribute, marks=tuple(_sample_marks(rng, attribute, scene)))


def _sample_marks(rng: np.random.Generator, attribute: str, scene: Scene) -> list[Mark]:
    """Return two or three sprites: the first on the object, the others near it, apart."""
    low, high = (22, 29) if attribute == "fire" else (19, 25)
    marks: list[Mark] = []
    for i in range(int(rng.integers(2, 4))):
        size = int(rng.integers(low, high))
        for _ in range(50):
            angle = rng.uniform(0, 2 * np.pi)
            reach = (0.12 if i == 0 else 0.52) * scene.size
            x = float(np.clip(scene.x + reach * np.cos(angle), size / 2, IMAGE_SIZE - size / 2))
            y = float(np.clip(scene.y + reach * np.sin(angle), size / 2, IMAGE_SIZE - size / 2))
            if all((x - m.x) ** 2 + (y - m.y) ** 2 > (0.45 * (size + m.size)) ** 2 for m in marks):
                marks.append(Mark(x, y, size, bool(rng.integers(2))))
                break
    return marks
