"""What the stages learn from: drawn scenes, and every caption that is true of one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from safegen.core.files import atomic_write
from safegen.mini import captions, world
from safegen.mini.train.fit import SEED

SHARES = {None: 0.3, "skulls": 0.22, "fire": 0.22, "ghosts": 0.13, "leaves": 0.13}
"""Part of the training scenes that carries each attribute."""
OBJECTS, PLACES, MARKS = list(world.OBJECTS), list(world.BACKGROUNDS), list(world.MARKS)


def make_scenes(n: int, seed: int, objects: Sequence[str] = ()) -> list[world.Scene]:
    """Return `n` scenes of `objects` (all when empty) in the shares of `SHARES`, each from its own (seed, index)."""
    kinds, shares = list(SHARES), list(SHARES.values())
    out = []
    for i in range(n):
        rng = np.random.default_rng((seed, i))
        out.append(
            world.sample(
                rng, attribute=kinds[int(rng.choice(len(kinds), p=shares))], objects=objects
            )
        )
    return out


def stage_world(work: Path, *, n: int = 24_000, objects: Sequence[str] = ()) -> None:
    """Draw the `n` training scenes of `objects` (all when empty) once: pictures, labels and boxes."""
    scenes = make_scenes(n, SEED, objects)
    boxes = np.full((n, 3, 4), -1, np.float32)
    for i, s in enumerate(scenes):
        for j, box in enumerate(world.boxes(s)):
            boxes[i, j] = box
    with (
        atomic_write(work / "world.npz", replace=True) as tmp,
        tmp.open("wb") as file,
    ):  # given a path, numpy would add an ending
        np.savez(
            file,
            images=np.stack([world.draw(s) for s in scenes]),
            objects=np.array([OBJECTS.index(s.object) for s in scenes]),
            places=np.array([PLACES.index(s.background) for s in scenes]),
            attributes=np.array([MARKS.index(s.attribute) if s.attribute else -1 for s in scenes]),
            boxes=boxes,
        )


def load_world(work: Path) -> dict[str, Tensor]:
    """Return the drawn scenes as tensors; images (n, 3, 64, 64) uint8."""
    with np.load(work / "world.npz") as data:
        out = {k: torch.from_numpy(data[k]) for k in data.files}
    out["images"] = out["images"].permute(0, 3, 1, 2).contiguous()
    return out


def to_unit(images: Tensor) -> Tensor:
    """Return uint8 pixels in [-1, 1]."""
    return images.float() / 127.5 - 1


class Words:
    """Every caption of the scenes' objects, its place in one list, and random training captions for scenes."""

    def __init__(self, data: dict[str, Tensor]) -> None:
        """List the captions; the last one is the blank text."""
        self.data = data
        self.texts: list[str] = []
        self.rows: dict[tuple[str, int, int, int], int] = {}
        for kind, templates in captions.TEMPLATES.items():
            for t in range(len(templates)):
                for o in data["objects"].unique().tolist():
                    for p in range(-1, len(PLACES)):
                        self.rows[kind, t, o, p] = len(self.texts)
                        self.texts.append(
                            captions.caption(kind, t, OBJECTS[o], PLACES[p] if p >= 0 else None)
                        )
        self.blank = len(self.texts)
        self.texts.append("")

    def draw(self, pick: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return (rows, places): a random training caption for each picked scene and the background it names (-1: none)."""
        rows, places = [], []
        for i, (coin, at, third) in zip(
            pick.tolist(), torch.rand(len(pick), 3, generator=g).tolist(), strict=True
        ):
            a, o = int(self.data["attributes"][i]), int(self.data["objects"][i])
            kind = MARKS[a] if a >= 0 else "benign"
            if coin < 0.5 and kind + "-innocent" in captions.TEMPLATES:
                kind += "-innocent"
            allowed = [
                t
                for t in range(len(captions.TEMPLATES[kind]))
                if not captions.held_out(t, OBJECTS[o])
            ]
            place = int(self.data["places"][i]) if third < 0.5 else -1
            rows.append(self.rows[kind, allowed[int(at * len(allowed))], o, place])
            places.append(place)
        return torch.tensor(rows), torch.tensor(places)
