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
from safegen.core.errors import BadSetting
from safegen.guards.core.adapter import ONE_FRAME, Border, Seam, Text
from safegen.guards.core.base import Call, Finding, Guard, Ready, Turn
from safegen.guards.safree.projection import Rule, Way, look, projected, readers, spans

ONE_STEP = (
    "DDIMScheduler",
    "DDPMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
)
"""Schedulers that remember nothing of earlier steps: what others remember would not be mixed."""


class DualLatent(Guard):
    """Settings of the dual latent guard."""

    name: Literal["dual-latent"] = "dual-latent"
    seams: ClassVar[frozenset[Seam]] = frozenset({"text", "latents"})
    families: ClassVar[tuple[str, ...]] = ONE_FRAME
    once: ClassVar[bool] = True

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
    def lent(cls, concept: Concept) -> dict[str, Any]:
        """Return the concept's words as phrases."""
        return {"phrases": concept.words}

    def ready(self, border: Border) -> Ready:
        """Return the guard at work.

        Raises:
            BadSetting: a phrase that the text encoder would cut, or a scheduler with a memory.
        """
        for phrase in self.phrases:
            border.fits(phrase, "a phrase of the guard 'dual-latent'")
        _remembers_nothing(border)
        return _Ready(self, border)

    @property
    def way(self) -> Rule:
        """How the safer text is made."""
        return Rule(self.alpha, "code", distance=True)


class _Ready(Ready):
    guard: DualLatent

    def __init__(self, guard: DualLatent, border: Border) -> None:
        super().__init__(guard)
        self.readers = readers(border.pipe)
        self.concept = spans(self.readers, guard.phrases)
        self.ways: dict[str, Way] = {}

    def twice(self, prompts: Sequence[str]) -> list[bool]:
        self.ways = {
            prompt: look(self.readers, prompt, self.concept, self.guard.way) for prompt in prompts
        }
        return [
            bool(
                self.guard.strength
                and (way := self.ways[p]).triggers
                and way.distance >= self.guard.gate
            )
            for p in prompts
        ]

    def begin(self, call: Call) -> Turn:
        _remembers_nothing(call.border)  # it may be another one since
        return _Turn(self.guard, call, self.ways)


class _Turn(Turn):
    def __init__(self, guard: DualLatent, call: Call, ways: dict[str, Way]) -> None:
        self.guard, self.call, self.ways, self.mixed = guard, call, ways, 0

    def cond(self, text: Text) -> Text:
        if not self.call.twins:
            return text
        hidden = text.hidden.clone()
        for second in self.call.twins.values():
            hidden[second] = projected(hidden[second], self.ways[self.call.prompts[second]], 1.0)
        return Text(hidden, text.extra)

    def latents(self, latents: Tensor) -> Tensor:
        if not self.call.twins:
            return latents
        out = latents.clone()
        leads = self.call.step < self.guard.start * self.call.steps
        self.mixed += not leads
        for first, second in self.call.twins.items():
            out[first], out[second] = mixed(
                latents[first],
                latents[second],
                strength=0.0 if leads else self.guard.strength,
                follow=leads,
            )
        return out

    def findings(self) -> list[Finding]:
        out = []
        for i, prompt in enumerate(self.call.prompts):
            steps = self.mixed if i in self.call.twins else 0
            scores, limits = (
                {"distance": self.ways[prompt].distance, "steps": float(steps)},
                {"gate": self.guard.gate},
            )
            out.append(
                Finding("edit" if steps else "none", "mixed" if steps else "", scores, limits)
            )
        return out


def _remembers_nothing(border: Border) -> None:
    scheduler = type(border.pipe.scheduler).__name__
    if scheduler not in ONE_STEP:
        raise BadSetting(
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
