"""CROPS, later SC-Pro: a prompt is probed by pictures from starts around its own, and not drawn if many are unsafe (arXiv:2501.05359).

A reconstruction: the paper's abstract says that starts are moved on a sphere or a circle, that the checker's answers are averaged, and that
a prompt is stopped from a threshold on. The circle, the sizes and the threshold are ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from safegen.errors import BadSetting
from safegen.guard.base import Finding, Probe, Ready
from safegen.guard.judge_filter import Judged, ask_judge
from safegen.judge import Judge
from safegen.models.seams import ONE_FRAME, Border, Seam, copied


class Crops(Judged):
    """Settings of probing."""

    name: Literal["crops"] = "crops"
    seams: ClassVar[frozenset[Seam]] = frozenset({"start"})
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {"one-step": {"steps": 1}}

    shape: Literal["spherical", "circular"] = "spherical"
    """Where the probes start: in random directions from the prompt's own start, or evenly round it on a circle."""
    angle: float = Field(default=0.3, gt=0, lt=math.pi)
    """psi: how far from the prompt's own start, in radians."""
    probes: int = Field(default=8, ge=1)
    """k: probes a prompt, each a picture's worth of work, or a part of it with fewer `steps`."""
    steps: int | None = Field(default=None, ge=1)
    """Denoising steps of a probe; the picture's own when not given. 1 is the one-step variant, by this model and not a distilled one."""
    limit: float = Field(default=0.5, gt=0, le=1)
    """S_th: share of unsafe probes from which on the prompt is not drawn. A probe that cannot be judged counts as unsafe."""

    def ready(self, border: Border) -> Ready:
        """Return the guard at work.

        Raises:
            BadSetting: another family, whose starts have another shape.
        """
        if border.kind not in ONE_FRAME:
            raise BadSetting(f"the guard 'crops' knows the starts of {' and '.join(ONE_FRAME)}, not those of a {border.kind}; leave it out")
        return _Ready(self, border, self.open())


class _Ready(Ready):
    guard: Crops

    def __init__(self, guard: Crops, border: Border, judge: Judge) -> None:
        super().__init__(guard)
        self.border, self.judge = border, judge

    def probe(self, draw: Probe, prompts: Sequence[str], options: Mapping[str, Any]) -> list[Finding]:
        guard = self.guard
        own, generators = self.border.starts(options, "the guard 'crops'")
        starts = [around(x, copied(g), angle=guard.angle, n=guard.probes, shape=guard.shape) for x, g in zip(own, generators, strict=True)]
        device = self.border.pipe._execution_device
        hits = [0] * len(prompts)
        for k in range(guard.probes):
            noise = torch.stack([own_starts[k] for own_starts in starts]).to(device)
            later = [copied(g) for g in generators]  # for schedulers that add noise
            changed: dict[str, Any] = {"latents": noise, "generator": later, "output_type": "pil", "callback_on_step_end": None}
            if guard.steps is not None:
                changed["num_inference_steps"] = guard.steps
            verdicts = ask_judge(self.judge, draw(prompts, changed))
            hits = [hit + (verdict.outcome != "safe") for hit, verdict in zip(hits, verdicts, strict=True)]
        limits = {"share": guard.limit, "score": self.judge.threshold}
        out = []
        for hit in hits:
            stop = hit / guard.probes >= guard.limit
            out.append(Finding("block" if stop else "none", "probes" if stop else "", {"share": hit / guard.probes}, limits))
        return out


def around(x: Tensor, generator: torch.Generator, *, angle: float, n: int, shape: Literal["spherical", "circular"]) -> Tensor:
    """Return `n` starts at an angle from `x`, of its norm, (n, *x.shape) (reconstruction).

    Spherical: cos(psi) x + sin(psi) r with r random, orthogonal to x and of its length. Circular: r = cos(2 pi j / n) a + sin(2 pi j / n) b
    for two such directions a, b that are orthogonal to each other.

    Args:
        x: a start.
        generator: of the directions.
        angle: psi, in radians.
        n: how many.
        shape: which.
    """
    flat = x.flatten()
    count = n if shape == "spherical" else 2
    found: list[Tensor] = []
    for _ in range(count):
        r = torch.randn(flat.shape, generator=generator, device=generator.device).to(flat)
        for other in [flat] if shape == "spherical" else [flat, *found]:
            r = r - (r @ other) / (other @ other) * other
        found.append(r * flat.norm() / r.norm())
    if shape == "circular":
        a, b = found
        found = [math.cos(2 * math.pi * j / n) * a + math.sin(2 * math.pi * j / n) * b for j in range(n)]
    return torch.stack([(math.cos(angle) * flat + math.sin(angle) * r).view_as(x) for r in found])
