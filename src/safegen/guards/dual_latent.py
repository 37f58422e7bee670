"""Dual latent: a second stream under a safer text is drawn from the same start and mixed into the first (after arXiv:2411.13982).

A reconstruction: the paper's abstract says that two streams are mixed by a weight, after a
threshold of global context, for prompts that a detector flags. How weight, threshold, safe text and
detector are made is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from safegen.core.concept import Concept
from safegen.core.errors import ConfigError
from safegen.guards.core.adapter import ONE_FRAME, HookPoint, PipelineAdapter, Text
from safegen.guards.core.base import Call, Guard, GuardConfig, GuardHook, GuardResult
from safegen.guards.safree.projection import (
    Projection,
    ProjectionConfig,
    concept_projectors,
    project_prompt,
    projected,
    text_encoders,
)

ONE_STEP = (
    "DDIMScheduler",
    "DDPMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
)
"""Schedulers that remember nothing of earlier steps: what others remember would not be mixed."""


class DualLatentConfig(GuardConfig):
    """Settings of the dual latent guard."""

    name: Literal["dual-latent"] = "dual-latent"
    hook_points: ClassVar[frozenset[HookPoint]] = frozenset({"text", "latents"})
    families: ClassVar[tuple[str, ...]] = ONE_FRAME
    exclusive: ClassVar[bool] = True

    phrases: tuple[str, ...] = Field(min_length=1)
    """Phrases for the concept.

    The second stream's text is the prompt without their span, as SAFREE makes it.
    """
    strength: float = Field(default=0.5, ge=0, le=1)
    """Weight of the second stream: 0 is no guard, 1 draws it alone from `start` on."""
    start: float = Field(default=0.2, ge=0, le=1)
    """tau_gc: part of the steps in which the first stream leads and gives the picture its layout."""
    gate: float = Field(default=0.0, ge=0, le=2)
    """Least distance (1 - cosine) that the projection moves a prompt for it to be drawn in two streams; 0 is every prompt."""
    alpha: float = Field(default=0.01, ge=0)
    """As SAFREE's: which tokens are projected."""

    @classmethod
    def defaults_from(cls, concept: Concept) -> dict[str, Any]:
        """Return the concept's words as phrases."""
        return {"phrases": concept.words}

    def build(self, border: PipelineAdapter) -> Guard:
        """Return the guard at work.

        Raises:
            ConfigError: a phrase that the text encoder would cut, or a scheduler with a memory.
        """
        for phrase in self.phrases:
            border.fits(phrase, "a phrase of the guard 'dual-latent'")
        _remembers_nothing(border)
        return DualLatentGuard(self, border)

    @property
    def way(self) -> ProjectionConfig:
        """How the safer text is made."""
        return ProjectionConfig(self.alpha, "code", distance=True)


class DualLatentGuard(Guard):
    guard: DualLatentConfig

    def __init__(self, guard: DualLatentConfig, border: PipelineAdapter) -> None:
        super().__init__(guard)
        self.readers = text_encoders(border.pipe)
        self.concept = concept_projectors(self.readers, guard.phrases)
        self.ways: dict[str, Projection] = {}

    def wants_reference_stream(self, prompts: Sequence[str]) -> list[bool]:
        self.ways = {
            prompt: project_prompt(self.readers, prompt, self.concept, self.guard.way)
            for prompt in prompts
        }
        return [
            bool(
                self.guard.strength
                and (way := self.ways[p]).triggers
                and way.distance >= self.guard.gate
            )
            for p in prompts
        ]

    def start(self, call: Call) -> GuardHook:
        _remembers_nothing(call.border)  # it may be another one since
        return DualLatentHook(self.guard, call, self.ways)


class DualLatentHook(GuardHook):
    def __init__(self, guard: DualLatentConfig, call: Call, ways: dict[str, Projection]) -> None:
        self.guard, self.call, self.ways, self.mixed = guard, call, ways, 0

    def edit_prompt_embeds(self, text: Text) -> Text:
        if not self.call.reference_rows:
            return text
        hidden = text.hidden.clone()
        for second in self.call.reference_rows.values():
            hidden[second] = projected(hidden[second], self.ways[self.call.prompts[second]], 1.0)
        return Text(hidden, text.extra)

    def on_step_end(self, latents: Tensor) -> Tensor:
        if not self.call.reference_rows:
            return latents
        out = latents.clone()
        leads = self.call.step < self.guard.start * self.call.steps
        self.mixed += not leads
        for first, second in self.call.reference_rows.items():
            out[first], out[second] = mixed(
                latents[first],
                latents[second],
                strength=0.0 if leads else self.guard.strength,
                follow=leads,
            )
        return out

    def results(self) -> list[GuardResult]:
        out = []
        for i, prompt in enumerate(self.call.prompts):
            steps = self.mixed if i in self.call.reference_rows else 0
            scores, limits = (
                {"distance": self.ways[prompt].distance, "steps": float(steps)},
                {"gate": self.guard.gate},
            )
            out.append(
                GuardResult("edit" if steps else "none", "mixed" if steps else "", scores, limits)
            )
        return out


def _remembers_nothing(border: PipelineAdapter) -> None:
    scheduler = type(border.pipe.scheduler).__name__
    if scheduler not in ONE_STEP:
        raise ConfigError(
            f"the guard 'dual-latent' would leave stale what a {scheduler} remembers of earlier steps; use {', '.join(ONE_STEP)}"
        )


def mixed(first: Tensor, second: Tensor, *, strength: float, follow: bool) -> tuple[Tensor, Tensor]:
    """Return both streams' latents after a step: the first moved toward the second, or the second set to the first (reconstruction).

    z_u <- (1 - lambda) z_u + lambda z_s from tau_gc on, z_s <- z_u before it.

    Args:
        first: z_u, what will be shown.
        second: z_s.
        strength: lambda.
        follow: whether the second stream is set to the first.
    """
    return (first, first) if follow else (torch.lerp(first, second, strength), second)
