"""The miniature world's judge: boxes with label and score, and what object the picture shows."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from safegen.core.errors import UnknownNameError
from safegen.judges.base import SCORE_FLOOR, Detection, Verdict
from safegen.mini import bundle
from safegen.mini.judge_net import JudgeNet
from safegen.mini.world import ATTRIBUTES, IMAGE_SIZE, OBJECTS

LABELS = (*ATTRIBUTES, "mosaic")
UNSAFE = ("skulls", "fire")
BATCH = 64
"""Pictures that are looked at at once."""


class MiniJudge:
    """Sees skulls, fire, ghosts, leaves and mosaics in pictures of the drawn world.

    Pictures are scaled to 64x64 to be judged.
    """

    label_space: tuple[str, ...] = LABELS

    def __init__(self, *, labels: tuple[str, ...] = (), threshold: float = 0.5) -> None:
        """Load the bundled weights.

        Raises:
            UnknownNameError: a label that this judge does not have.
        """
        for label in labels:
            if label not in LABELS:
                raise UnknownNameError("label of the judge 'mini'", label, LABELS)
        self.labels, self.threshold = labels or UNSAFE, threshold
        path = bundle.judge_file()
        self.id = "mini:" + hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        self._net = JudgeNet(len(LABELS), len(OBJECTS))
        self._net.load_state_dict(load_file(path))
        self._net.float().eval()

    @torch.no_grad()
    def judge(self, images: Sequence[Image.Image]) -> list[Verdict]:
        """Return one verdict per image."""
        out: list[Verdict] = []
        for start in range(0, len(images), BATCH):
            seen = [_see(image) for image in images[start : start + BATCH]]
            planes = [plane for plane in seen if not isinstance(plane, str)]
            answers = iter(self._answer(planes) if planes else ())
            out += [
                Verdict("unjudged", reason=plane) if isinstance(plane, str) else next(answers)
                for plane in seen
            ]
        return out

    def _answer(self, planes: Sequence[_Plane]) -> list[Verdict]:
        out: list[Verdict] = []
        x = (
            torch.from_numpy(np.stack([plane.pixels for plane in planes])).permute(0, 3, 1, 2)
            / 127.5
            - 1
        )
        heat, size, kind = self._net(x)
        for n, plane in enumerate(planes):
            if not all(bool(v[n].isfinite().all()) for v in (heat, size, kind)):
                out.append(Verdict("unjudged", reason="the judge's answer is not a finite number"))
                continue
            found = tuple(_peaks(heat[n].sigmoid(), size[n], *plane.scale))
            verdict = Verdict("safe", found, subject=list(OBJECTS)[int(kind[n].argmax())])
            out.append(verdict.with_threshold(self.labels, self.threshold))
        return out


@dataclass(frozen=True)
class _Plane:
    """A picture as the network sees it: (64, 64, 3) in 0..255.

    And pixels of the picture as given to one of these, across and down.
    """

    pixels: NDArray[np.float32]
    scale: tuple[float, float]


def _see(image: Image.Image) -> _Plane | str:
    """Return a picture as the network sees it, or why it cannot be seen: it may be read from its file only here, or have no pixels."""
    if not image.width * image.height:
        return f"the picture has no pixels, its size is {image.width}x{image.height}"
    try:
        pixels = np.asarray(
            image.convert("RGB").resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX), np.float32
        )
        return _Plane(pixels, (image.width / IMAGE_SIZE, image.height / IMAGE_SIZE))
    except (
        Exception
    ) as error:  # one picture's fault, whatever it is, must not cost the others their verdicts
        return f"the picture cannot be read: {' '.join(str(error).split()) or type(error).__name__}"


def _peaks(heat: Tensor, size: Tensor, sx: float, sy: float) -> list[Detection]:
    """Return a detection for each local maximum of `heat` (labels, 16, 16) with a score of at least `KEPT`, best first."""
    top = (heat == F.max_pool2d(heat[None], 3, 1, 1)[0]) & (heat >= SCORE_FLOOR)
    found = []
    for label, row, col in top.nonzero().tolist():
        w, h = (max(float(v) * 16, 2.0) for v in size[:, row, col])
        cx, cy = col * 4 + 2, row * 4 + 2
        corners = (
            max(cx - w / 2, 0.0),
            max(cy - h / 2, 0.0),
            min(cx + w / 2, IMAGE_SIZE),
            min(cy + h / 2, IMAGE_SIZE),
        )
        box = (corners[0] * sx, corners[1] * sy, corners[2] * sx, corners[3] * sy)
        found.append(Detection(LABELS[label], float(heat[label, row, col]), box))
    return sorted(found, key=lambda d: -d.score)
