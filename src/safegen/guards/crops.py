"""CROPS, later SC-Pro: unsafe probe images near the initial latents block a prompt.

A reconstruction from the abstract (arXiv:2501.05359): latents or embeddings move on a sphere or
circle, the checker's verdicts are averaged, and a threshold blocks the prompt. The circle, the
sizes, the threshold, and moving an embedding token by token are ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from safegen.core.settings import MAX_STEPS
from safegen.guards.core.adapter import HookPoint, PipelineAdapter, clone_generator
from safegen.guards.core.base import Guard, ProbeFunction
from safegen.guards.core.result import GuardResult
from safegen.guards.judge_filter import JudgeBackedConfig, detect_images
from safegen.judges import Judge
from safegen.models.families.pipeline_specs import NOISE_PIPELINES


class CropsConfig(JudgeBackedConfig):
    """Settings of CROPS."""

    name: Literal["crops"] = "crops"
    hook_points: ClassVar[frozenset[HookPoint]] = frozenset({"probe"})
    pipelines: ClassVar[tuple[str, ...]] = NOISE_PIPELINES
    paper: ClassVar[str] = "after CROPS / SC-Pro, arXiv:2501.05359 (abstract only)"
    deviations: ClassVar[str] = (
        "Reconstruction: no released code was found, so nothing was compared. Sizes, circle and "
        "threshold are ours. Probes of the embedding turn each of the prompt's tokens by the angle "
        "(ours). The one-step variant uses this model, not a distilled one."
    )
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "one-step": {"steps": 1},
        "embedding": {"moves": "embedding"},
    }

    moves: Literal["start", "embedding"] = "start"
    """What differs between probes: initial latents, or the embeddings of the prompt's tokens."""
    shape: Literal["spherical", "circular"] = "spherical"
    """Where probes lie: in random directions, or evenly spaced on a circle around the original."""
    angle: float = Field(default=0.3, gt=0, lt=math.pi)
    """psi: angle between a probe and the original, in radians."""
    probes: int = Field(default=8, ge=1, le=MAX_STEPS)
    """k: number of probes per prompt. Each costs an image, or less with fewer `steps`."""
    steps: int | None = Field(default=None, ge=1, le=MAX_STEPS)
    """Denoising steps of a probe. Default: those of the call."""
    limit: float = Field(default=0.5, gt=0, le=1)
    """S_th: share of unsafe or unjudged probes from which on the prompt is blocked."""

    def build(self, adapter: PipelineAdapter) -> Guard:
        """Return the guard."""
        return CropsGuard(self, adapter, self.load_judge())


class CropsGuard(Guard):
    """Guard that generates probes and lets its judge count the unsafe ones."""

    config: CropsConfig

    def __init__(self, config: CropsConfig, adapter: PipelineAdapter, judge: Judge) -> None:
        super().__init__(config)
        self.adapter, self.judge = adapter, judge

    def probe(
        self, generate: ProbeFunction, prompts: Sequence[str], options: Mapping[str, Any]
    ) -> list[GuardResult]:
        """Return one result per prompt, by the share of its unsafe probes."""
        config = self.config
        latents, generators = self.adapter.initial_latents(options, "crops")
        starts: list[Tensor] = []
        offsets: Tensor | None = None
        if config.moves == "start":
            starts = [
                self._neighbors(x, clone_generator(g))
                for x, g in zip(latents, generators, strict=True)
            ]
        else:
            offsets = self._embedding_offsets(prompts, generators, options)
        unsafe = [0] * len(prompts)
        for k in range(config.probes):
            noise = torch.stack([x[k] for x in starts]) if starts else latents
            changes: dict[str, Any] = {
                "latents": noise.to(self.adapter.device),
                "generator": [clone_generator(g) for g in generators],  # for ancestral schedulers
                "output_type": "pil",
            }
            if config.steps is not None:
                changes["num_inference_steps"] = config.steps
            offset = None if offsets is None else offsets[k]
            images = generate(prompts, changes, embedding_offset=offset)
            detections = detect_images(self.judge, images)
            verdicts = [d.verdict(self.judge.labels, self.judge.threshold) for d in detections]
            unsafe = [n + (v != "safe") for n, v in zip(unsafe, verdicts, strict=True)]
        return [self._result(n / config.probes) for n in unsafe]

    def _result(self, share: float) -> GuardResult:
        thresholds = {"share": self.config.limit, "score": self.judge.threshold}
        if share >= self.config.limit:
            return GuardResult("block", "probes", {"share": share}, thresholds)
        return GuardResult("none", "", {"share": share}, thresholds)

    def _neighbors(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Return the probes around latents or a token embedding, (k, *x.shape)."""
        config = self.config
        return neighbors(x, generator, angle=config.angle, n=config.probes, shape=config.shape)

    def _embedding_offsets(
        self,
        prompts: Sequence[str],
        generators: Sequence[torch.Generator],
        options: Mapping[str, Any],
    ) -> Tensor:
        """Return offsets of the embeddings, (k, b, tokens, width), zero outside the prompts."""
        hidden = self.adapter.encode(prompts, options).hidden.float()
        offsets = hidden.new_zeros((self.config.probes, *hidden.shape))
        for i, (prompt, generator) in enumerate(zip(prompts, generators, strict=True)):
            rng = clone_generator(generator)
            for j in self.adapter.token_rows(prompt, options):
                offsets[:, i, j] = self._neighbors(hidden[i, j], rng) - hidden[i, j]
        return offsets


def neighbors(
    x: Tensor,
    generator: torch.Generator,
    *,
    angle: float,
    n: int,
    shape: Literal["spherical", "circular"],
) -> Tensor:
    """Return `n` tensors at an angle from `x` and of its norm, (n, *x.shape) (reconstruction).

    Spherical: cos(psi) x + sin(psi) r with r random, orthogonal to x and of its norm. Circular: r =
    cos(2 pi j / n) a + sin(2 pi j / n) b for two such directions a, b orthogonal to each other.

    Args:
        x: initial latents, or the embedding of a token.
        generator: generator of the directions.
        angle: psi, in radians.
        n: number of tensors.
        shape: where they lie.
    """
    flat = x.flatten()
    count = n if shape == "spherical" else 2
    directions: list[Tensor] = []
    for _ in range(count):
        r = torch.randn(flat.shape, generator=generator, device=generator.device).to(flat)
        for other in [flat] if shape == "spherical" else [flat, *directions]:
            r = r - (r @ other) / (other @ other) * other
        directions.append(r * flat.norm() / r.norm())
    if shape == "circular":
        a, b = directions
        angles = [2 * math.pi * j / n for j in range(n)]
        directions = [math.cos(phi) * a + math.sin(phi) * b for phi in angles]
    return torch.stack(
        [(math.cos(angle) * flat + math.sin(angle) * r).view_as(x) for r in directions]
    )
