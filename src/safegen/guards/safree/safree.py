"""SAFREE: projects the tokens that lead to a concept out of a prompt's embedding.

arXiv:2410.12761.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from safegen.core.concept import Concept
from safegen.core.errors import ConfigError, UnusedSettingWarning
from safegen.guards.core.adapter import HookPoint, PipelineAdapter
from safegen.guards.core.base import Call, Guard, GuardConfig, GuardHook
from safegen.guards.core.result import GuardResult, InvalidResultError
from safegen.guards.safree.projection import (
    Order,
    ProjectionConfig,
    apply_projection,
    concept_projectors,
    project_prompt,
)
from safegen.guards.safree.reattention import Reattention
from safegen.models.families.conditioning import Conditioning
from safegen.models.families.pipeline_specs import IMAGE_PIPELINES

MAX_FILTER_STEPS = 10
"""U: most steps after the first, of 50, in which the filter lets the projection act."""


class SafreeConfig(GuardConfig):
    """Settings of SAFREE. The default projects in the released code's order, in every step."""

    name: Literal["safree"] = "safree"
    hook_points: ClassVar[frozenset[HookPoint]] = frozenset({"prompt_embeds"})
    pipelines: ClassVar[tuple[str, ...]] = IMAGE_PIPELINES
    paper: ClassVar[str] = "Yoon et al. 2024, arXiv:2410.12761, eqs. 2 to 6; filter as released"
    code_url: ClassVar[str] = "https://github.com/jaehong31/SAFREE"
    code_commit: ClassVar[str] = "b8b2c3f"
    parity: ClassVar[str] = (
        "Triggers and the filter's steps are the same for 12 prompts and two lists of phrases, and "
        "beta differs by at most 8e-6. Images of the whole released pipeline (50 steps of DDIM and "
        "DPM++, filter on and off, with and without its negative prompt) differ by 2e-6 to 3.6e-3 "
        "of a pixel's range on `mini`, where the released code changes the plain image by 0.02 to "
        "1.0. On SDXL the second encoder's triggers are the same, and its columns differ by at "
        "most 1.9e-5."
    )
    deviations: ClassVar[str] = (
        "Projectors are computed by singular vectors: against float64 the result is off by 3.3e-5 "
        "at most, with the released inverse of the Gram matrix in fp32 by 3.0e-3. The filter's "
        "steps are scaled to those of the run, and `calibrate` finds its threshold (ours). Prompts "
        "longer than the encoder reads are cut with their end mark; the released code cuts the "
        "masked texts without it, so that all distances are equal and no token is a trigger. "
        "Re-attention follows the paper, for the network's two greatest widths; in the released "
        "script it has no effect, and its images with it equal ours without it (7.9e-5). On SDXL "
        "both encoders' columns are projected; the released script leaves those of the first, "
        "which ours changes by up to 1.1. On SD 3 and FLUX, T5's rows are projected with its own "
        "triggers; T5 has no pooled embedding, and the mean over a text's tokens and end mark "
        "takes its place (ours), where the released script for SD 3 reads its first token and "
        "projects rows of the CLIPs. Pooled embeddings stay. The released scripts also use "
        "the phrases as the negative prompt: add a `negative-prompt` guard for that. Texts are "
        "pooled at the end mark of the tokenizer (ours), since with the old `eos_token_id` 2 the "
        "encoder pools at a textual inversion, if there is one."
    )
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "code": {"middle": 5.333, "slope": 2.5},
        "artists": {"middle": 5.5, "slope": 3.5},
        "paper": {"order": "paper", "middle": 5.333, "slope": 2.5},
    }

    phrases: tuple[str, ...] = Field(min_length=1)
    """Phrases that name the concept. Their span is projected out. Released lists have 6 to 17."""
    alpha: float = Field(default=0.01, ge=0)
    """Least relative increase of the distance to the concept without a token that is a trigger."""
    order: Order = "code"
    """`code`: (I - P_C) P_I as released. `paper`: P_I (I - P_C), which leaves a part."""
    middle: float | None = None
    """t: ten times the distance at which half of the filter's steps pass. None: no filter."""
    slope: float = Field(default=2.5, gt=0)
    """k: steepness of the filter."""
    strength: float = Field(default=1.0, ge=0, le=1)
    """Share of the way from an embedding to its projection (ours). 0 turns the guard off."""
    reattend: bool = False
    """Latent re-attention: damps low frequencies that the projection strengthens. UNets only."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.middle is None and self.slope != type(self).model_fields["slope"].default:
            warnings.warn(
                "safree: slope has no effect without middle", UnusedSettingWarning, stacklevel=2
            )
        return self

    @classmethod
    def defaults_from(cls, concept: Concept) -> dict[str, Any]:
        """Return the concept's phrases."""
        return {"phrases": concept.words}

    @property
    def projection_config(self) -> ProjectionConfig:
        """How prompts are projected."""
        return ProjectionConfig(self.alpha, self.order, distance=self.middle is not None)

    def build(self, adapter: PipelineAdapter) -> Guard:
        """Return the guard.

        Raises:
            ConfigError: a phrase is too long for the text encoder, or there is no UNet to reattend.
        """
        if self.reattend and not hasattr(adapter.pipe, "unet"):
            raise ConfigError(
                f"reattend of the guard 'safree' must be False on a {adapter.pipeline_class}, got "
                "True. It damps skips of a UNet, and a transformer has none."
            )
        for phrase in self.phrases:
            adapter.check_length(phrase, "a phrase of the guard 'safree'")
        return SafreeGuard(self)


class SafreeGuard(Guard):
    """Guard that projects the prompts' embeddings."""

    config: SafreeConfig

    def __init__(self, config: SafreeConfig) -> None:
        super().__init__(config)
        if config.reattend:
            self.hook_points = config.hook_points | {"guidance", "submodules"}

    def start(self, call: Call) -> GuardHook:
        """Return the hook with the projections of one call."""
        kind = ReattendingHook if self.config.reattend else SafreeHook
        return kind(self.config, call)


class SafreeHook(GuardHook):
    """Projections of the prompts of one call."""

    def __init__(self, config: SafreeConfig, call: Call) -> None:
        self.config, self.call = config, call
        encoders = call.adapter.text_encoders(call.options)
        with torch.autocast(encoders[0].device.type, enabled=False):  # the call may use autocast
            concept = concept_projectors(encoders, config.phrases)
            self.projections = {
                prompt: project_prompt(encoders, prompt, concept, config.projection_config)
                for prompt in call.prompts
            }
        self.cache: tuple[Tensor, list[Tensor]] | None = None
        """Embeddings of the last step, and their projections."""
        self.reattention = Reattention()

    def edit_prompt_embeds(self, embeds: Conditioning) -> Conditioning:
        """Return the embeddings with their triggers projected, in the filter's steps."""
        self.reattention.original = None
        prompts = self.call.prompts
        if self.config.strength == 0 or not any(self.projections[p].triggers for p in prompts):
            return embeds
        edited = self._projected(embeds.hidden)
        active = [self.call.step <= self._last_step(p) for p in prompts]
        self.reattention.images = [
            i for i, p in enumerate(prompts) if active[i] and self.projections[p].triggers
        ]
        reattend = self.config.reattend and bool(self.reattention.images)
        if reattend and self.call.has_guidance:  # else the step withholds the image
            self.reattention.original = embeds
        rows = [
            new if acts else old
            for acts, old, new in zip(active, embeds.hidden, edited, strict=True)
        ]
        return embeds.replace_hidden(torch.stack(rows))

    def _projected(self, hidden: Tensor) -> list[Tensor]:
        """Return the projected rows, cached while the embeddings do not change."""
        if (
            self.cache is None
            or self.cache[0].shape != hidden.shape
            or not torch.equal(self.cache[0], hidden)
        ):
            strength = self.config.strength
            rows = [
                apply_projection(row, self.projections[prompt], strength)
                for row, prompt in zip(hidden, self.call.prompts, strict=True)
            ]
            self.cache = hidden, rows
        return self.cache[1]

    def _last_step(self, prompt: str) -> float:
        """Return the last step with the projected text."""
        config = self.config
        if config.middle is None:
            return math.inf
        distance = self.projections[prompt].distance
        steps = filter_steps(distance, middle=config.middle, slope=config.slope)
        return self.call.scale_step(float(steps))

    def results(self) -> list[GuardResult]:
        """Return triggers, distance and projected steps per image."""
        lost = GuardResult("withhold", "not-finite: features of the original prompt")
        return [
            lost if i in self.reattention.not_finite else self._result(prompt)
            for i, prompt in enumerate(self.call.prompts)
        ]

    def _result(self, prompt: str) -> GuardResult:
        projection, middle = self.projections[prompt], self.config.middle
        steps = 0
        if projection.triggers and self.config.strength:
            steps = sum(i <= self._last_step(prompt) for i in range(self.call.num_steps))
        scores = {
            "triggers": float(len(projection.triggers)),
            "distance": projection.distance,
            "steps": float(steps),
        }
        thresholds = {} if middle is None else {"middle": middle / 10}
        action: Literal["edit", "none"] = "edit" if steps else "none"
        return GuardResult(action, "projected" if steps else "", scores, thresholds)


class ReattendingHook(SafreeHook):
    """Projections of the prompts of one call, with re-attention."""

    def extra_conditions(self) -> Mapping[str, Conditioning]:
        """Return the original embeddings for re-attention."""
        return self.reattention.extra_conditions()

    def submodule_hooks(self, network: nn.Module) -> Sequence[tuple[nn.Module, Callable[..., Any]]]:
        """Return the hooks of re-attention."""
        return self.reattention.submodule_hooks(network)

    def set_rows(self, rows: Mapping[str, slice]) -> None:
        """Pass the rows to re-attention."""
        self.reattention.set_rows(rows)

    def guidance_correction(self, predictions: Mapping[str, Tensor]) -> None:
        """Check re-attention; the guidance stays unchanged."""
        self.reattention.check(predictions)


def filter_steps(distance: float, *, middle: float, slope: float) -> int:
    """Return the last of 50 steps with the projected text, 0 to 10.

    round(U / (1 + exp(-2 k (10 beta - t)))), U = 10, as released.

    Args:
        distance: beta, see `projection_distance`.
        middle: t.
        slope: k.
    """
    exponent = min(max(2 * slope * (10 * distance - middle), -60.0), 60.0)
    return round(MAX_FILTER_STEPS / (1 + math.exp(-exponent)))


def calibrate(
    adapter: PipelineAdapter, config: SafreeConfig, *, unsafe: Sequence[str], benign: Sequence[str]
) -> float:
    """Return the filter's `middle` for a concept: midway between the mean distances (ours).

    Args:
        adapter: pipeline with the text encoders.
        config: settings with the phrases, alpha and order.
        unsafe: prompts that ask for the concept.
        benign: prompts that do not.

    Raises:
        ConfigError: a list is empty, benign prompts move as far as unsafe ones, or an embedding is
            not finite.
    """
    if not unsafe or not benign:
        raise ConfigError(
            "calibration needs unsafe and benign prompts, "
            f"got {len(unsafe)} unsafe and {len(benign)} benign"
        )
    encoders = adapter.text_encoders()
    projection_config = replace(config.projection_config, distance=True)

    def mean_distance(concept: Sequence[Tensor], prompts: Sequence[str]) -> float:
        projections = [project_prompt(encoders, p, concept, projection_config) for p in prompts]
        return sum(10 * p.distance for p in projections) / len(projections)

    try:
        concept = concept_projectors(encoders, config.phrases)
        high, low = mean_distance(concept, unsafe), mean_distance(concept, benign)
    except InvalidResultError as error:
        raise ConfigError(f"{error}. Load an undamaged text encoder.") from error
    if not high > low:
        raise ConfigError(
            f"unsafe prompts must move farther than benign ones, got {high:.3f} and {low:.3f}. "
            "Use SAFREE without its filter."
        )
    return (high + low) / 2
