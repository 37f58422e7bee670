"""SLD, safe latent diffusion: guidance away from a text, where the picture goes toward it (arXiv:2211.05105)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from safegen.core.concept import Concept
from safegen.guards.core.adapter import HookPoint, PipelineAdapter, Text
from safegen.guards.core.base import Call, Guard, GuardConfig, GuardHook, GuardResult
from safegen.guards.negative_prompt import NegativePromptConfig, joined

PAPER_TEXT = (
    "an image showing hate, harassment, violence, suffering, humiliation, harm, suicide, sexual, nudity, bodily fluids, blood, "
    "obscene gestures, illegal activity, drug use, theft, vandalism, weapons, child abuse, brutality, cruelty"
)
"""The published safety text: names of harms, as the authors' code and diffusers have it."""
SAFETY = "safety"


class SldConfig(GuardConfig):
    """Settings of SLD; the default is the published `medium`."""

    name: Literal["sld"] = "sld"
    hook_points: ClassVar[frozenset[HookPoint]] = frozenset({"branch"})
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "weak": {
            "warmup": 15.0,
            "scale": 200.0,
            "threshold": 0.0,
            "momentum_scale": 0.0,
            "momentum": 0.0,
        },
        "weak-diffusers": {
            "warmup": 15.0,
            "scale": 20.0,
            "threshold": 0.0,
            "momentum_scale": 0.0,
            "momentum": 0.0,
        },
        "medium": {},
        "strong": {
            "warmup": 7.0,
            "scale": 2000.0,
            "threshold": 0.025,
            "momentum_scale": 0.5,
            "momentum": 0.7,
        },
        "max": {
            "warmup": 0.0,
            "scale": 5000.0,
            "threshold": 1.0,
            "momentum_scale": 0.5,
            "momentum": 0.7,
        },
    }

    text: str = Field(default=PAPER_TEXT, min_length=1)
    """What to steer away from."""
    warmup: float = Field(default=10.0, ge=0, le=50)
    """delta: steps of a 50-step run before it acts.

    Scaled to the steps of the run (ours), so that it acts in short runs too.
    """
    scale: float = Field(default=1000.0, ge=0)
    """s_S: how steeply it acts; from 1000 on it is nearly a gate. 0 is no guard."""
    threshold: float = 0.01
    """lambda: it acts where the prompt's prediction minus the safety text's is below this.

    Made for predictions of noise.
    """
    momentum_scale: float = Field(default=0.3, ge=0, le=1)
    """s_m: how much of the past steps' guidance is added."""
    momentum: float = Field(default=0.4, ge=0, lt=1)
    """beta_m: how much of the past is kept from step to step."""

    @classmethod
    def defaults_from(cls, concept: Concept) -> dict[str, Any]:
        """Return the concept's words as the text."""
        return {"text": ", ".join(concept.words)}

    def conflict(self, others: Sequence[GuardConfig], negative: str) -> str:
        """Return what is wrong where a negative prompt has its text: f - u is nothing, and so is all that it takes away."""
        away = reduce(
            joined,
            (other.text for other in others if isinstance(other, NegativePromptConfig)),
            negative,
        )
        same = away.strip().casefold() == self.text.strip().casefold()
        return (
            "steers by how its text differs from the negative prompt, which says the same"
            if same
            else ""
        )

    def build(self, border: PipelineAdapter) -> Guard:
        """Return the guard at work; the text must fit the text encoder."""
        border.fits(self.text, "the text of the guard 'sld'")
        return SldGuard(self)


ROUNDING = 1e-5
"""Largest push, as a part of the prediction, that counts as none: equal texts in one batch differ by so little on some processors."""


class SldGuard(Guard):
    guard: SldConfig

    def start(self, call: Call) -> GuardHook:
        return SldHook(self.guard, call)


class SldHook(GuardHook):
    def __init__(self, guard: SldConfig, call: Call) -> None:
        self.guard, self.call = guard, call
        call.border.fits(guard.text, "the text of the guard 'sld'", call.options)
        self.text = call.border.encode([guard.text], call.options)
        self.nu: Tensor | None = None
        self.acted = torch.zeros(len(call.prompts), dtype=torch.long)

    @property
    def _warm(self) -> bool:
        return self.call.step >= self.call.at(self.guard.warmup)

    def extra_conditions(self) -> Mapping[str, Text]:
        idle = self.guard.scale == 0 or (
            not self._warm and self.guard.momentum_scale == 0
        )  # without momentum the past is nothing
        return {} if idle else {SAFETY: self.text}

    def guidance_correction(self, said: Mapping[str, Tensor]) -> Tensor | None:
        if SAFETY not in said:
            return None
        u, c, f = said["uncond"], said["cond"], said[SAFETY]
        guard = self.guard
        gamma, self.nu = safety_guidance(
            u,
            c,
            f,
            torch.zeros_like(u) if self.nu is None else self.nu,
            scale=guard.scale,
            threshold=guard.threshold,
            momentum_scale=guard.momentum_scale,
            momentum=guard.momentum,
        )
        if not self._warm:
            return None
        self.acted += (_largest(gamma) > ROUNDING * _largest(u)).cpu()
        return gamma

    def results(self) -> list[GuardResult]:
        return [
            GuardResult("edit" if n else "none", "steered" if n else "", {"steps": n})
            for n in self.acted.tolist()
        ]


def _largest(x: Tensor) -> Tensor:
    """Return the largest absolute value of each row, (b,)."""
    return x.flatten(1).abs().amax(1)


def safety_guidance(
    u: Tensor,
    c: Tensor,
    f: Tensor,
    nu: Tensor,
    *,
    scale: float,
    threshold: float,
    momentum_scale: float,
    momentum: float,
) -> tuple[Tensor, Tensor]:
    """Return what is taken from the prompt's prediction, and the momentum after this step.

    mu = min(s_S |c - f|, 1) where c - f < lambda, else 0; Gamma = mu (f - u) + s_m nu; nu' = beta_m
    nu + (1 - beta_m) Gamma (Schramowski et al. 2023, arXiv:2211.05105, eqs. 4, 6, 7, 8, as
    released). All element by element.

    Args:
        u: the blank's prediction, (b, ...).
        c: the prompt's.
        f: the safety text's.
        nu: the momentum so far; zeros at first. It builds up during the warm-up too.
        scale: s_S.
        threshold: lambda, in the predictions' own units.
        momentum_scale: s_m.
        momentum: beta_m.
    """
    toward = c - f
    mu = torch.where(toward >= threshold, 0.0, (scale * toward.abs()).clamp(max=1.0))
    gamma = mu * (f - u) + momentum_scale * nu
    return gamma, momentum * nu + (1 - momentum) * gamma
