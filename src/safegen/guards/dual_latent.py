"""Dual latent: a reference stream under a safer text, from the same latents, is mixed in.

A reconstruction from the abstract of arXiv:2411.13982: two streams are mixed by a weight, after a
threshold of global context, for prompts that a detector flags. How weight, threshold, safe text and
detector are made is ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from safegen.core.concept import Concept
from safegen.core.errors import ConfigError
from safegen.guards.core.adapter import HookPoint, PipelineAdapter
from safegen.guards.core.base import Call, Guard, GuardConfig, GuardHook
from safegen.guards.core.result import GuardResult
from safegen.guards.safree.projection import (
    Projection,
    ProjectionConfig,
    apply_projection,
    concept_projectors,
    project_prompt,
)
from safegen.models.families.conditioning import Conditioning
from safegen.models.families.pipeline_specs import IMAGE_PIPELINES

MEMORYLESS_SCHEDULERS = (
    "DDIMScheduler",
    "DDPMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
)
"""Schedulers without state from earlier steps, which would not be mixed."""


class DualLatentConfig(GuardConfig):
    """Settings of the dual latent guard."""

    name: Literal["dual-latent"] = "dual-latent"
    hook_points: ClassVar[frozenset[HookPoint]] = frozenset({"prompt_embeds", "latents"})
    pipelines: ClassVar[tuple[str, ...]] = IMAGE_PIPELINES
    exclusive: ClassVar[bool] = True
    paper: ClassVar[str] = "after Vice et al. 2024, arXiv:2411.13982 (abstract only)"
    deviations: ClassVar[str] = (
        "Reconstruction: no released code was found, so nothing was compared. Weight, threshold of "
        "global context, safe text (SAFREE's) and detector (how far SAFREE's projection moves the "
        "prompt) are ours."
    )

    phrases: tuple[str, ...] = Field(min_length=1)
    """Phrases that name the concept. The reference stream's prompt has their span projected out."""
    strength: float = Field(default=0.5, ge=0, le=1)
    """Weight of the reference stream. 0: off. 1: the reference stream alone from `start` on."""
    start: float = Field(default=0.2, ge=0, le=1)
    """tau_gc: share of the steps in which the prompt's stream alone sets the layout."""
    gate: float = Field(default=0.0, ge=0, le=2)
    """Least distance (1 - cosine) of a prompt and its projection to act. 0: every prompt."""
    alpha: float = Field(default=0.01, ge=0)
    """Threshold for the tokens to project, as in SAFREE."""

    @classmethod
    def unsupported_reason(cls, adapter: PipelineAdapter) -> str:
        """Return why the guard cannot run on a pipeline: inpainting starts its streams unlike.

        An image for several rows is encoded with the generator of the first row alone.
        """
        inpaints = "Inpaint" in adapter.family
        return super().unsupported_reason(adapter) or (
            "needs two streams of equal noise, and inpainting does not start them alike"
            if inpaints
            else ""
        )

    @classmethod
    def defaults_from(cls, concept: Concept) -> dict[str, Any]:
        """Return the concept's phrases."""
        return {"phrases": concept.words}

    def build(self, adapter: PipelineAdapter) -> Guard:
        """Return the guard.

        Raises:
            ConfigError: a phrase is too long for the text encoder, or the scheduler has state.
        """
        for phrase in self.phrases:
            adapter.check_length(phrase, "a phrase of the guard 'dual-latent'")
        _check_scheduler(adapter)
        return DualLatentGuard(self, adapter)

    @property
    def projection_config(self) -> ProjectionConfig:
        """How the safer text is made."""
        return ProjectionConfig(self.alpha, "code", distance=True)


class DualLatentGuard(Guard):
    """Guard that requests a reference stream for prompts near the concept."""

    config: DualLatentConfig

    def __init__(self, config: DualLatentConfig, adapter: PipelineAdapter) -> None:
        super().__init__(config)
        self.adapter = adapter
        self.projections: dict[str, Projection] = {}

    def wants_reference_stream(self, prompts: Sequence[str]) -> list[bool]:
        """Return which prompts the projection moves far enough."""
        encoders = self.adapter.text_encoders()  # read anew, they may have changed
        concept = concept_projectors(encoders, self.config.phrases)
        config = self.config.projection_config
        self.projections = {
            prompt: project_prompt(encoders, prompt, concept, config) for prompt in prompts
        }
        return [self._is_flagged(self.projections[prompt]) for prompt in prompts]

    def _is_flagged(self, projection: Projection) -> bool:
        far = projection.distance >= self.config.gate
        return bool(self.config.strength and projection.triggers and far)

    def start(self, call: Call) -> GuardHook:
        """Return the hook that mixes the streams of one call."""
        _check_scheduler(call.adapter)  # it may have been replaced
        return DualLatentHook(self.config, call, self.projections)


class DualLatentHook(GuardHook):
    """Both streams of one call."""

    def __init__(
        self, config: DualLatentConfig, call: Call, projections: Mapping[str, Projection]
    ) -> None:
        self.config, self.call, self.projections = config, call, projections
        self.mixed_steps = 0

    def edit_prompt_embeds(self, embeds: Conditioning) -> Conditioning:
        """Return the embeddings, projected in the reference rows."""
        if not self.call.reference_rows:
            return embeds
        hidden = embeds.hidden.clone()
        for row in self.call.reference_rows.values():
            projection = self.projections[self.call.prompts[row]]
            hidden[row] = apply_projection(hidden[row], projection, 1.0)
        return embeds.replace_hidden(hidden)

    def on_step_end(self, latents: Tensor) -> Tensor:
        """Return the latents after mixing both streams."""
        if not self.call.reference_rows:
            return latents
        mixed = latents.clone()
        follow = self.call.step < self.config.start * self.call.num_steps
        self.mixed_steps += not follow
        strength = 0.0 if follow else self.config.strength
        for row, reference in self.call.reference_rows.items():
            mixed[row], mixed[reference] = mix_streams(
                latents[row], latents[reference], strength=strength, follow=follow
            )
        return mixed

    def results(self) -> list[GuardResult]:
        """Return the number of mixed steps per image."""
        results = []
        for i, prompt in enumerate(self.call.prompts):
            steps = self.mixed_steps if i in self.call.reference_rows else 0
            scores = {"distance": self.projections[prompt].distance, "steps": float(steps)}
            action: Literal["edit", "none"] = "edit" if steps else "none"
            reason = "mixed" if steps else ""
            results.append(GuardResult(action, reason, scores, {"gate": self.config.gate}))
        return results


def _check_scheduler(adapter: PipelineAdapter) -> None:
    scheduler = type(adapter.pipe.scheduler).__name__
    if scheduler not in MEMORYLESS_SCHEDULERS:
        raise ConfigError(
            f"scheduler must be one of {', '.join(MEMORYLESS_SCHEDULERS)} for the guard "
            f"'dual-latent', got {scheduler}. Its state from earlier steps would not be mixed."
        )


def mix_streams(
    latents: Tensor, reference: Tensor, *, strength: float, follow: bool
) -> tuple[Tensor, Tensor]:
    """Return the latents of both streams after a step (reconstruction).

    z_u <- (1 - lambda) z_u + lambda z_s from tau_gc on, z_s <- z_u before it.

    Args:
        latents: z_u, the stream that is shown.
        reference: z_s.
        strength: lambda.
        follow: set the reference stream to the other.
    """
    if follow:
        return latents, latents
    return torch.lerp(latents, reference, strength), reference
