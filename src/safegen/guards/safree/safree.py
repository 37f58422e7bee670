"""SAFREE: the words of a prompt that lie near a concept are projected out of its embedding (arXiv:2410.12761)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from safegen.core.concept import Concept
from safegen.core.errors import ConfigError
from safegen.guards.core.adapter import ONE_FRAME, HookPoint, PipelineAdapter, Text
from safegen.guards.core.base import Call, Guard, GuardConfig, GuardHook, GuardResult
from safegen.guards.safree.projection import (
    ProjectionConfig,
    concept_projectors,
    project_prompt,
    projected,
    text_encoders,
)
from safegen.guards.safree.reattention import Reattention

MOST = 10
"""U: the filter decides for at most this many steps after the first, of 50."""


class SafreeConfig(GuardConfig):
    """Settings of SAFREE. The default projects in the released code's order, in every step."""

    name: Literal["safree"] = "safree"
    hook_points: ClassVar[frozenset[HookPoint]] = frozenset({"text"})
    families: ClassVar[tuple[str, ...]] = ONE_FRAME
    later: ClassVar[frozenset[str]] = frozenset({"reattend"})
    PRESETS: ClassVar = {
        "code": {"filter": True, "middle": 5.333, "slope": 2.5},
        "artists": {"filter": True, "middle": 5.5, "slope": 3.5},
        "paper": {"order": "paper", "filter": True, "middle": 5.333, "slope": 2.5},
    }

    phrases: tuple[str, ...] = Field(min_length=1)
    """Phrases for the concept; their span is what is taken out. The released lists have 6 to 17."""
    alpha: float = Field(default=0.01, ge=0)
    """How much farther from the concept than the other tokens' mean a prompt must be without a token for that token to be a trigger."""
    order: Literal["code", "paper"] = "code"
    """(I - P_C) P_I as released, which leaves nothing of the concept's span, or P_I (I - P_C) as printed, which leaves some."""
    filter: bool = False
    """Whether the self-validating filter decides for how many steps the projected text is used.

    Otherwise in all.
    """
    middle: float | None = None
    """t: ten times the distance (1 - cosine) at which the filter lets half of its steps pass.

    See `calibrate`: each concept has its own.
    """
    slope: float | None = Field(default=None, gt=0)
    """k: steepness of the filter."""
    strength: float = Field(default=1.0, ge=0, le=1)
    """Part of the way from a token's embedding to the projected one (ours); 0 is no guard."""
    reattend: bool = False
    """Latent re-attention: what projected text strengthens in low frequencies of the denoiser's skips is damped, for a third row."""

    @model_validator(mode="after")
    def _no_idle_setting(self) -> Self:
        if self.filter != (self.middle is not None) or self.filter != (self.slope is not None):
            raise ValueError(
                "middle and slope go with the filter, and only with it; give all three or none"
            )
        if self.reattend and not self.strength:
            raise ValueError(
                "reattend has no effect at strength 0, where no text is projected; leave it out"
            )
        return self

    @classmethod
    def defaults_from(cls, concept: Concept) -> dict[str, Any]:
        """Return the concept's words as phrases."""
        return {"phrases": concept.words}

    @property
    def way(self) -> ProjectionConfig:
        """How a prompt is looked at."""
        return ProjectionConfig(self.alpha, self.order, distance=self.filter)

    @property
    def active_points(self) -> frozenset[HookPoint]:
        """Where it takes hold: on guidance too if it asks for the prompt as it was."""
        return self.hook_points | ({"branch"} if self.reattend else frozenset())

    def build(self, border: PipelineAdapter) -> Guard:
        """Return the guard at work.

        Raises:
            ConfigError: a phrase that the text encoder would cut.
        """
        for phrase in self.phrases:
            border.fits(phrase, "a phrase of the guard 'safree'")
        return SafreeGuard(self, border)


class SafreeGuard(Guard):
    guard: SafreeConfig

    def __init__(self, guard: SafreeConfig, border: PipelineAdapter) -> None:
        super().__init__(guard)
        self.concept = concept_projectors(text_encoders(border.pipe), guard.phrases)

    def start(self, call: Call) -> GuardHook:
        return SafreeHook(self.guard, call, self.concept)


class SafreeHook(GuardHook):
    def __init__(self, guard: SafreeConfig, call: Call, concept: Sequence[Tensor]) -> None:
        self.guard, self.call = guard, call
        found = text_encoders(call.border.pipe)
        device = found[0].device
        with torch.autocast(
            device.type, enabled=False
        ):  # the call may be drawn in coarser arithmetic
            self.ways = {
                prompt: project_prompt(
                    found, prompt, [own.to(device) for own in concept], guard.way
                )
                for prompt in call.prompts
            }
        self.cached: tuple[Tensor, list[Tensor]] | None = None
        self.again = Reattention()

    def edit_prompt_embeds(self, text: Text) -> Text:
        self.again.original = None
        if self.guard.strength == 0 or not any(
            bool(self.ways[p].triggers) for p in self.call.prompts
        ):
            return text
        if (
            self.cached is None
            or self.cached[0].shape != text.hidden.shape
            or not torch.equal(self.cached[0], text.hidden)
        ):
            self.cached = (
                text.hidden,
                [
                    projected(row, self.ways[p], self.guard.strength)
                    for row, p in zip(text.hidden, self.call.prompts, strict=True)
                ],
            )
        acts = [self.call.step <= self._last(p) for p in self.call.prompts]
        self.again.acts = [
            i for i, p in enumerate(self.call.prompts) if acts[i] and self.ways[p].triggers
        ]
        if self.guard.reattend and self.again.acts:
            self.again.original = text
        rows = [new if now else old for now, old, new in zip(acts, *self.cached, strict=True)]
        return Text(torch.stack(rows), text.extra)

    def extra_conditions(self) -> Mapping[str, Text]:
        return self.again.extra_conditions()

    def submodule_hooks(self, network: nn.Module) -> Sequence[tuple[nn.Module, Callable[..., Any]]]:
        return self.again.submodule_hooks(network) if self.guard.reattend else ()

    def set_rows(self, rows: Mapping[str, slice]) -> None:
        self.again.set_rows(rows)

    def guidance_correction(self, said: Mapping[str, Tensor]) -> None:
        self.again.check()

    def _last(self, prompt: str) -> float:
        """Return the last step with the projected text."""
        if not self.guard.filter:
            return math.inf
        return self.call.at(
            float(
                filter_steps(
                    self.ways[prompt].distance,
                    middle=self.guard.middle or 0.0,
                    slope=self.guard.slope or 1.0,
                )
            )
        )

    def results(self) -> list[GuardResult]:
        out = []
        for prompt in self.call.prompts:
            way = self.ways[prompt]
            steps = (
                sum(i <= self._last(prompt) for i in range(self.call.steps))
                if way.triggers and self.guard.strength
                else 0
            )
            scores = {
                "triggers": float(len(way.triggers)),
                "distance": way.distance,
                "steps": float(steps),
            }
            limits = {"middle": self.guard.middle / 10} if self.guard.middle is not None else {}
            out.append(
                GuardResult(
                    "edit" if steps else "none", "projected" if steps else "", scores, limits
                )
            )
        return out


def filter_steps(distance: float, *, middle: float, slope: float) -> int:
    """Return the last of 50 steps with the projected text, 0 to 10: round(U / (1 + exp(-2 k (10 beta - t)))), U = 10, as released.

    Args:
        distance: beta, see `shift`.
        middle: t.
        slope: k.
    """
    return round(
        MOST / (1 + math.exp(-min(max(2 * slope * (10 * distance - middle), -60.0), 60.0)))
    )


def calibrate(
    border: PipelineAdapter, guard: SafreeConfig, *, unsafe: Sequence[str], benign: Sequence[str]
) -> float:
    """Return the filter's `middle` for a concept: half way between the means of ten times the distance of both kinds of prompts (ours).

    Args:
        border: the pipeline whose text encoder is asked.
        guard: its phrases, alpha and order count.
        unsafe: prompts that ask for the concept.
        benign: prompts that do not.

    Raises:
        ConfigError: a list is empty, or benign prompts move as far as unsafe ones: then the filter
            cannot tell them apart.
    """
    if not unsafe or not benign:
        raise ConfigError(
            f"a calibration needs prompts of both kinds, got {len(unsafe)} unsafe and {len(benign)} benign"
        )
    encoders = text_encoders(border.pipe)
    concept = concept_projectors(encoders, guard.phrases)
    asked = replace(guard.way, distance=True)
    high, low = (
        sum(10 * project_prompt(encoders, p, concept, asked).distance for p in prompts)
        / len(prompts)
        for prompts in (unsafe, benign)
    )
    if high <= low:
        raise ConfigError(
            f"the filter cannot tell these prompts apart: unsafe ones lie at {high:.3f}, benign ones at {low:.3f}; leave it off"
        )
    return (high + low) / 2
