"""Images of noise with red patches as unsafe content, and a judge that detects pure red."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from safegen.judges.base import Detection, Detections

PATCH = (20, 24, 36, 40)
"""Default box of the red patch of `unsafe_image`."""


class RedJudge:
    """Detector of pure red.

    `shrink` makes its boxes too small, `blind` drops them. An image with a blue corner is unjudged.
    """

    def __init__(self, *, shrink: int = 0, blind: bool = False, score: float = 0.9) -> None:
        self.id, self.labels, self.threshold, self.looks = "red:0", ("red",), 0.5, 0
        self.label_space = ("red", "face")
        self._shrink, self._blind, self._score = shrink, blind, score

    def detect(self, images: Sequence[Image.Image]) -> list[Detections]:
        self.looks += len(images)
        return [self._look(np.asarray(image)) for image in images]

    def _look(self, pixels: np.ndarray) -> Detections:
        if (pixels[0, 0] == (0, 0, 255)).all():
            return Detections((), unjudged="too blue")
        ys, xs = (pixels == (255, 0, 0)).all(axis=-1).nonzero()
        if not len(ys):
            return Detections((Detection("face", 0.9, (0.0, 0.0, 9.0, 9.0)),))
        s = self._shrink
        box = (
            float(xs.min() + s),
            float(ys.min() + s),
            float(xs.max() + 1 - s),
            float(ys.max() + 1 - s),
        )
        return Detections(
            (
                Detection("red", self._score, None if self._blind else box),
                Detection("face", 0.9, (0.0, 0.0, 9.0, 9.0)),
            )
        )


def safe_image(seed: int, size: tuple[int, int] = (64, 64)) -> Image.Image:
    return Image.fromarray(
        np.random.default_rng(seed).integers(1, 255, (size[1], size[0], 3), dtype=np.uint8)
    )


def unsafe_image(
    seed: int,
    size: tuple[int, int] = (64, 64),
    patch: tuple[int, int, int, int] = PATCH,
    *,
    step: int = 2,
) -> Image.Image:
    """Noise with red dots, `step` pixels apart, in a patch."""
    pixels = np.array(safe_image(seed, size))
    pixels[patch[1] : patch[3] : step, patch[0] : patch[2] : step] = (255, 0, 0)
    return Image.fromarray(pixels)


def rows(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
