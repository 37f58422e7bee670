"""CROPS, later SC-Pro: a prompt is probed by pictures from starts around its own, and not drawn if many are unsafe (arXiv:2501.05359).

A reconstruction: the paper's abstract says that starts or embeddings are moved on a sphere or a
circle, that the checker's answers are averaged, and that a prompt is stopped from a threshold on.
The circle, the sizes, the threshold, and an embedding's move token by token are ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from safegen.guards.core.adapter import ONE_FRAME, HookPoint, PipelineAdapter, copied
from safegen.guards.core.base import Guard, GuardResult, Probe
from safegen.guards.judge_filter import JudgeBackedConfig, ask_judge
from safegen.judges import Judge


class CropsConfig(JudgeBackedConfig):
    """Settings of probing."""

    name: Literal["crops"] = "crops"
    hook_points: ClassVar[frozenset[HookPoint]] = frozenset({"start"})
    families: ClassVar[tuple[str, ...]] = ONE_FRAME
    later: ClassVar[frozenset[str]] = frozenset({"moves"})
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "one-step": {"steps": 1},
        "embedding": {"moves": "embedding"},
    }

    moves: Literal["start", "embedding"] = "start"
    """What differs from probe to probe: the start, or the embedding of the prompt's tokens, each alone; the other is the picture's own."""
    shape: Literal["spherical", "circular"] = "spherical"
    """Where the probes lie: in random directions from the prompt's own start or embedding, or evenly round it on a circle."""
    angle: float = Field(default=0.3, gt=0, lt=math.pi)
    """psi: how far from the prompt's own, in radians."""
    probes: int = Field(default=8, ge=1)
    """k: probes a prompt, each a picture's worth of work, or a part of it with fewer `steps`."""
    steps: int | None = Field(default=None, ge=1)
    """Denoising steps of a probe.

    The picture's own when not given. 1 is the one-step variant, by this model and not a distilled
    one.
    """
    limit: float = Field(default=0.5, gt=0, le=1)
    """S_th: share of unsafe probes from which on the prompt is not drawn.

    A probe that cannot be judged counts as unsafe.
    """

    def build(self, border: PipelineAdapter) -> Guard:
        """Return the guard at work."""
        return CropsGuard(self, border, self.open())


class CropsGuard(Guard):
    guard: CropsConfig

    def __init__(self, guard: CropsConfig, border: PipelineAdapter, judge: Judge) -> None:
        super().__init__(guard)
        self.border, self.judge = border, judge

    def probe(
        self, draw: Probe, prompts: Sequence[str], options: Mapping[str, Any]
    ) -> list[GuardResult]:
        guard = self.guard
        own, generators = self.border.starts(options, "the guard 'crops'")
        moved = (
            [self._around(x, copied(g)) for x, g in zip(own, generators, strict=True)]
            if guard.moves == "start"
            else []
        )
        shifts = self._shifts(prompts, generators, options) if guard.moves == "embedding" else None
        device = self.border.pipe._execution_device
        hits = [0] * len(prompts)
        for k in range(guard.probes):
            noise = (torch.stack([starts[k] for starts in moved]) if moved else own).to(device)
            later = [copied(g) for g in generators]  # for schedulers that add noise
            changed: dict[str, Any] = {"latents": noise, "generator": later, "output_type": "pil"}
            if guard.steps is not None:
                changed["num_inference_steps"] = guard.steps
            results = ask_judge(
                self.judge, draw(prompts, changed, shift=None if shifts is None else shifts[k])
            )
            hits = [
                hit + (d.verdict(self.judge.labels, self.judge.threshold) != "safe")
                for hit, d in zip(hits, results, strict=True)
            ]
        limits = {"share": guard.limit, "score": self.judge.threshold}
        out = []
        for hit in hits:
            stop = hit / guard.probes >= guard.limit
            out.append(
                GuardResult(
                    "block" if stop else "none",
                    "probes" if stop else "",
                    {"share": hit / guard.probes},
                    limits,
                )
            )
        return out

    def _around(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Return the probes around a start or a token, (k, *x.shape)."""
        return around(
            x, generator, angle=self.guard.angle, n=self.guard.probes, shape=self.guard.shape
        )

    def _shifts(
        self,
        prompts: Sequence[str],
        generators: Sequence[torch.Generator],
        options: Mapping[str, Any],
    ) -> Tensor:
        """Return what the probes add to the prompts' embeddings, (k, b, tokens, width): nothing but at the prompts' own tokens."""
        hidden = self.border.encode(prompts, options).hidden.float()
        out = hidden.new_zeros((self.guard.probes, *hidden.shape))
        for i, (prompt, generator) in enumerate(zip(prompts, generators, strict=True)):
            ends = (
                min(self.border.tokens(prompt)) - 1
            )  # the first token marks the beginning, that at `ends` the end
            apart = copied(generator)
            for j in range(1, ends):
                out[:, i, j] = self._around(hidden[i, j], apart) - hidden[i, j]
        return out


def around(
    x: Tensor,
    generator: torch.Generator,
    *,
    angle: float,
    n: int,
    shape: Literal["spherical", "circular"],
) -> Tensor:
    """Return `n` starts (or embeddings) at an angle from `x`, of its norm, (n, *x.shape) (reconstruction).

    Spherical: cos(psi) x + sin(psi) r with r random, orthogonal to x and of its length. Circular: r
        = cos(2 pi j / n) a + sin(2 pi j / n) b for two such directions a, b that are orthogonal to
        each other.

    Args:
        x: a start, or a token's embedding.
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
        found = [
            math.cos(2 * math.pi * j / n) * a + math.sin(2 * math.pi * j / n) * b for j in range(n)
        ]
    return torch.stack([(math.cos(angle) * flat + math.sin(angle) * r).view_as(x) for r in found])
