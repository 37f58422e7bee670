"""Training data of every stage: scenes, and every caption that is true of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from safegen.core.files import atomic_write
from safegen.mini.captions import TEMPLATES, caption, is_held_out
from safegen.mini.world import ATTRIBUTES, BACKGROUNDS, OBJECTS
from tools.mini.drawing import Scene, draw, mark_boxes, sample_scene
from tools.mini.fit import SEED

ATTRIBUTE_SHARES = {None: 0.3, "skulls": 0.22, "fire": 0.22, "ghosts": 0.13, "leaves": 0.13}
"""Share of the training scenes that carries each attribute."""


def make_scenes(n: int, seed: int, objects: Sequence[str] = ()) -> list[Scene]:
    """Return `n` scenes of `objects` (all when empty), each drawn from its own (seed, index)."""
    attributes, shares = list(ATTRIBUTE_SHARES), list(ATTRIBUTE_SHARES.values())
    scenes = []
    for i in range(n):
        rng = np.random.default_rng((seed, i))
        attribute = attributes[int(rng.choice(len(attributes), p=shares))]
        scenes.append(sample_scene(rng, attribute=attribute, objects=objects))
    return scenes


def draw_scenes(work: Path, *, n: int = 24_000, objects: Sequence[str] = ()) -> None:
    """Write `n` training scenes of `objects` (all when empty): images, labels and boxes."""
    arrays = scene_arrays(make_scenes(n, SEED, objects))
    # an open file: given a path, numpy would append an extension
    with atomic_write(work / "world.npz", replace=True) as tmp, tmp.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]  # its stubs expect allow_pickle


def scene_arrays(scenes: Sequence[Scene]) -> dict[str, NDArray[Any]]:
    """Return images, labels and boxes of scenes; images are (n, 64, 64, 3) uint8."""
    boxes = np.full((len(scenes), 3, 4), -1, np.float32)
    for i, s in enumerate(scenes):
        for j, box in enumerate(mark_boxes(s)):
            boxes[i, j] = box
    attributes = [ATTRIBUTES.index(s.attribute) if s.attribute else -1 for s in scenes]
    return {
        "images": np.stack([draw(s) for s in scenes]),
        "objects": np.array([OBJECTS.index(s.object) for s in scenes]),
        "places": np.array([BACKGROUNDS.index(s.background) for s in scenes]),
        "attributes": np.array(attributes),
        "boxes": boxes,
    }


def load_scenes(work: Path) -> dict[str, Tensor]:
    """Return the training scenes as tensors; images are (n, 3, 64, 64) uint8."""
    with np.load(work / "world.npz") as arrays:
        return as_tensors({k: arrays[k] for k in arrays.files})


def as_tensors(arrays: Mapping[str, NDArray[Any]]) -> dict[str, Tensor]:
    """Return the arrays of scenes as tensors; images are (n, 3, 64, 64) uint8."""
    data = {k: torch.from_numpy(v) for k, v in arrays.items()}
    data["images"] = data["images"].permute(0, 3, 1, 2).contiguous()
    return data


def to_unit(images: Tensor) -> Tensor:
    """Return uint8 pixels as floats in [-1, 1]."""
    return images.float() / 127.5 - 1


class CaptionTable:
    """Every caption of the scenes' objects, with a sampler of training captions."""

    def __init__(self, data: dict[str, Tensor]) -> None:
        """List the captions; the last one is the empty text."""
        self.data = data
        self.texts: list[str] = []
        self.rows: dict[tuple[str, int, int, int], int] = {}
        for kind, templates in TEMPLATES.items():
            for t in range(len(templates)):
                for o in data["objects"].unique().tolist():
                    for p in range(-1, len(BACKGROUNDS)):
                        self.rows[kind, t, o, p] = len(self.texts)
                        background = BACKGROUNDS[p] if p >= 0 else None
                        self.texts.append(caption(kind, t, OBJECTS[o], background))
        self.blank = len(self.texts)
        self.texts.append("")

    def sample(self, scenes: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return a caption row per scene, and the background that it names (-1 for none)."""
        rows, places = [], []
        draws = torch.rand(len(scenes), 3, generator=g).tolist()
        for i, (innocent, template, named) in zip(scenes.tolist(), draws, strict=True):
            a, o = int(self.data["attributes"][i]), int(self.data["objects"][i])
            kind = ATTRIBUTES[a] if a >= 0 else "benign"
            if innocent < 0.5 and kind + "-innocent" in TEMPLATES:
                kind += "-innocent"
            allowed = [t for t in range(len(TEMPLATES[kind])) if not is_held_out(t, OBJECTS[o])]
            place = int(self.data["places"][i]) if named < 0.5 else -1
            rows.append(self.rows[kind, allowed[int(template * len(allowed))], o, place])
            places.append(place)
        return torch.tensor(rows), torch.tensor(places)
