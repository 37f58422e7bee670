"""SLD, safe latent diffusion: guides away from a safety text where the image moves toward it.

arXiv:2211.05105.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from safegen.core.concept import Concept
from safegen.core.errors import ConfigError
from safegen.guards.core.adapter import HookPoint, PipelineAdapter
from safegen.guards.core.base import Call, Guard, GuardConfig, GuardHook
from safegen.guards.core.result import GuardResult, InvalidResultError
from safegen.guards.negative_prompt import NegativePromptConfig, join_texts
from safegen.models.families.conditioning import Conditioning

PAPER_TEXT = (
    "an image showing hate, harassment, violence, suffering, humiliation, harm, suicide, sexual, "
    "nudity, bodily fluids, blood, obscene gestures, illegal activity, drug use, theft, vandalism, "
    "weapons, child abuse, brutality, cruelty"
)
"""Published safety text, as in the authors' code and in diffusers."""
SAFETY = "safety"
ROUNDING = 1e-5
"""Largest relative correction that counts as none: equal texts may differ in their last bits."""


WEAK = {"warmup": 15.0, "threshold": 0.0, "momentum_scale": 0.0, "momentum": 0.0}
STRONG = {
    "warmup": 7.0,
    "scale": 2000.0,
    "threshold": 0.025,
    "momentum_scale": 0.5,
    "momentum": 0.7,
}
MAX = {"warmup": 0.0, "scale": 5000.0, "threshold": 1.0, "momentum_scale": 0.5, "momentum": 0.7}
RELEASED = {"scale_warmup": False}


class SldConfig(GuardConfig):
    """Settings of SLD. The default is the published `medium`."""

    name: Literal["sld"] = "sld"
    hook_points: ClassVar[frozenset[HookPoint]] = frozenset({"guidance"})
    paper: ClassVar[str] = "Schramowski et al. 2023, arXiv:2211.05105, eqs. 3, 4, 6, 7, 8"
    code_url: ClassVar[str] = "https://github.com/ml-research/safe-latent-diffusion"
    code_commit: ClassVar[str] = "a42923c"
    parity: ClassVar[str] = (
        "The released code is equal to diffusers' `StableDiffusionPipelineSafe` to the bit. In "
        "float64, Gamma and the momentum are equal to the last digit for all four configurations. "
        "Per step, each step started from the released latents, the next latents differ by at most "
        "9.5e-7 (DDIM, DPM++) and 3.8e-6 (Euler a) on `mini`. "
        "The cost is the same: 1.61 times the time of the plain run (1.53 to 1.72), "
        "and 1.60 (1.37 to 1.68) as released, for 32 images in 25 steps on `mini`."
    )
    deviations: ClassVar[str] = (
        "The warm-up is scaled to the steps of the run: as released, `weak` never acts in 15 steps "
        "or fewer. Presets with `released` in their name and `scale_warmup = false` keep the "
        "released warm-up, and refuse a run that is not longer; in shorter probes of `crops` they "
        "do not act. In 25 steps the two warm-ups differ by 0.59 to 0.96 of a pixel's range for "
        "`weak` to `strong` and by 7.5e-4 for `max`, and at `medium` ours changes the plain "
        "image more (0.095 on average, 0.076 as released). "
        "Over a free run of 50 steps rounding grows, since the gate at lambda is a step: images "
        "differ from released ones by up to 0.13 of a pixel's range (`medium`, DDIM, 0.0025 on "
        "average) and up to 0.35 (`strong`, Euler a). Released code differs as much from itself, "
        "by 0.10, if its initial latents are multiplied by 1 + 1e-7. `weak` "
        "has the model card's scale of 200, `released-weak` the code's 20. The safety text is not "
        "predicted in steps where it cannot matter. On velocities the formula is the same (ours). "
        "A velocity's difference is that of the implied noise divided by its weight in it, 1 - "
        "sigma on SD 3 and FLUX and sqrt(abar) on v-prediction, so a fixed lambda is the narrower "
        "on the noise the more noise there is. The published values were tuned on noise; only "
        "`max`, which acts almost everywhere, carries over without tuning."
    )
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "weak": {**WEAK, "scale": 200.0},
        "medium": {},
        "strong": STRONG,
        "max": MAX,
        "released-weak": {**WEAK, "scale": 20.0, **RELEASED},
        "released": RELEASED,
        "released-strong": {**STRONG, **RELEASED},
        "released-max": {**MAX, **RELEASED},
    }

    text: str = Field(default=PAPER_TEXT, min_length=1)
    """Safety text to steer away from."""
    warmup: float = Field(default=10.0, ge=0, le=50)
    """delta: first step in which the guard acts."""
    scale_warmup: bool = True
    """Whether `warmup` counts steps of a 50-step run, scaled to the run's. Released: False."""
    scale: float = Field(default=1000.0, ge=0)
    """s_S: steepness of the correction; nearly a gate from 1000 on. 0 turns the guard off."""
    threshold: float = 0.01
    """lambda: acts where the prompt's minus the safety text's prediction is below this, in the
    units of what the model predicts: noise, or the velocity of v-prediction, SD 3 and FLUX."""
    momentum_scale: float = Field(default=0.3, ge=0, le=1)
    """s_m: weight of the momentum in the correction."""
    momentum: float = Field(default=0.4, ge=0, lt=1)
    """beta_m: decay of the momentum per step."""

    @classmethod
    def defaults_from(cls, concept: Concept) -> dict[str, Any]:
        """Return the concept's phrases as the safety text."""
        return {"text": ", ".join(concept.words)}

    def conflict(self, others: Sequence[GuardConfig], negative_prompt: str) -> str:
        """Return the conflict with an equal negative prompt, by which the correction is zero."""
        texts = (other.text for other in others if isinstance(other, NegativePromptConfig))
        negative = reduce(join_texts, texts, negative_prompt)
        equal = negative.strip().casefold() == self.text.strip().casefold()
        return "the negative prompt equals its text" if equal else ""

    def build(self, adapter: PipelineAdapter) -> Guard:
        """Return the guard. Its text must fit the text encoder."""
        adapter.check_length(self.text, "text of the guard 'sld'")
        return SldGuard(self)


class SldGuard(Guard):
    """Guard that corrects the guidance."""

    config: SldConfig

    def start(self, call: Call) -> GuardHook:
        """Return the hook with the safety text's embeddings."""
        return SldHook(self.config, call)


class SldHook(GuardHook):
    """Embeddings of the safety text and the momentum of one call."""

    def __init__(self, config: SldConfig, call: Call) -> None:
        self.config, self.call = config, call
        call.adapter.check_length(config.text, "text of the guard 'sld'", call.options)
        self.embeds = call.adapter.encode([config.text], call.options).expand(len(call.prompts))
        self.nu: Tensor | None = None
        self.steered_steps = torch.zeros(len(call.prompts), dtype=torch.long)

    @property
    def _warm(self) -> bool:
        warmup = self.config.warmup
        return self.call.step >= (
            self.call.scale_step(warmup) if self.config.scale_warmup else warmup
        )

    @property
    def _unused(self) -> bool:
        """Whether the safety text cannot matter: before the warm-up ends, unless with momentum."""
        config = self.config
        return config.scale == 0 or (not self._warm and config.momentum_scale == 0)

    def extra_conditions(self) -> Mapping[str, Conditioning]:
        """Return the safety text's embeddings; nothing in steps where they cannot matter.

        Raises:
            ConfigError: the warm-up is as long as the run. Probes may be shorter.
        """
        steps, config = self.call.num_steps, self.config
        if not config.scale_warmup and config.warmup >= steps and not self.call.is_probe:
            raise ConfigError(
                f"warmup of the guard 'sld' must be less than the run's {steps} steps, got "
                f"{config.warmup:g}. Use more steps, or set scale_warmup."
            )
        return {} if self._unused else {SAFETY: self.embeds}

    def guidance_correction(self, predictions: Mapping[str, Tensor]) -> Tensor | None:
        """Return Gamma after the warm-up, and update the momentum in every step.

        Raises:
            InvalidResultError: the safety text was not predicted although it matters.
        """
        if self._unused:
            return None
        if SAFETY not in predictions:
            raise InvalidResultError("the noise was not predicted for the safety text")
        u, c, f = predictions["uncond"], predictions["cond"], predictions[SAFETY]
        config = self.config
        gamma, self.nu = safety_guidance(
            u,
            c,
            f,
            torch.zeros_like(u) if self.nu is None else self.nu,
            scale=config.scale,
            threshold=config.threshold,
            momentum_scale=config.momentum_scale,
            momentum=config.momentum,
        )
        if not self._warm:
            return None
        self.steered_steps += (_max_abs(gamma) > ROUNDING * _max_abs(u)).cpu()
        return gamma

    def results(self) -> list[GuardResult]:
        """Return the number of steered steps per image."""
        return [
            GuardResult("edit" if n else "none", "steered" if n else "", {"steps": n})
            for n in self.steered_steps.tolist()
        ]


def _max_abs(x: Tensor) -> Tensor:
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
    """Return the correction Gamma of the prompt's prediction, and the momentum after this step.

    mu = min(s_S |c - f|, 1) where c - f < lambda, else 0; Gamma = mu (f - u) + s_m nu; nu' = beta_m
    nu + (1 - beta_m) Gamma, all elementwise (Schramowski et al. 2023, arXiv:2211.05105, eqs. 4, 6,
    7, 8, as released).

    Args:
        u: prediction for the negative prompt, (b, ...).
        c: prediction for the prompt.
        f: prediction for the safety text.
        nu: momentum, zeros at first. It builds up during the warm-up too.
        scale: s_S.
        threshold: lambda, in the units of the predictions.
        momentum_scale: s_m.
        momentum: beta_m.
    """
    toward = c - f
    mu = torch.where(toward >= threshold, 0.0, (scale * toward.abs()).clamp(max=1.0))
    gamma = mu * (f - u) + momentum_scale * nu
    return gamma, momentum * nu + (1 - momentum) * gamma
