"""Latent Guard: a head on the text encoder scores how close a prompt is to listed concepts.

arXiv:2404.08031.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from safegen.core.concept import Concept
from safegen.core.errors import ConfigError
from safegen.guards.core.adapter import HookPoint, PipelineAdapter
from safegen.guards.core.base import Guard, GuardConfig
from safegen.guards.core.result import GuardResult
from safegen.guards.latent_guard.head import (
    ClipTextFeatures,
    LatentGuardHead,
    check_exists,
    is_clip,
    load_head,
    max_scores,
)

PUBLISHED_THRESHOLD = 9.0131
"""Threshold for the published weights and the published list of concepts."""


class LatentGuardConfig(GuardConfig):
    """Settings of Latent Guard."""

    name: Literal["latent-guard"] = "latent-guard"
    hook_points: ClassVar[frozenset[HookPoint]] = frozenset({"prompt"})
    paper: ClassVar[str] = "Liu et al. 2024, arXiv:2404.08031; loss and threshold as released"
    code_url: ClassVar[str] = "https://github.com/rt219/LatentGuard"
    deviations: ClassVar[str] = (
        "Keys and values are computed once per prompt and queries once per concept, not per pair. "
        "Long prompts are read in windows. `calibrate` and the trainer for any table of prompts "
        "are ours. The published weights were not available, so the published threshold is not "
        "verified."
    )

    weights: Path
    """Weights of the head: a file by `save_head`, or the published model_parameters.pth."""
    concepts: tuple[str, ...] = Field(min_length=1)
    """Concepts to block. The score of a prompt is its maximum over them."""
    threshold: float = PUBLISHED_THRESHOLD
    """Score from which on a prompt is blocked. It grows with the list; `calibrate` finds it."""
    allow_pickle: bool = False
    """Whether the head may be loaded from a pickle. Only tensors are read from it."""

    @classmethod
    def unsupported_reason(cls, adapter: PipelineAdapter) -> str:
        """Return why the guard cannot run on a pipeline: its first text encoder is no CLIP."""
        has_clip = is_clip(getattr(adapter.pipe, "text_encoder", None))
        return super().unsupported_reason(adapter) or (
            "" if has_clip else "needs a CLIP text encoder"
        )

    @classmethod
    def defaults_from(cls, concept: Concept) -> dict[str, Any]:
        """Return the concept's phrases as concepts."""
        return {"concepts": concept.words}

    def resolve_paths(self, base_dir: Path) -> GuardConfig:
        """Return the settings with the weights resolved against `base_dir`."""
        return self.model_copy(update={"weights": base_dir / self.weights})

    def fingerprint(self) -> dict[str, Any]:
        """Return the settings with the SHA-256 of the weights instead of their path."""
        check_exists(self.weights)
        settings = self.model_dump(mode="json", exclude={"weights", "allow_pickle"})
        return settings | {"weights": hashlib.sha256(self.weights.read_bytes()).hexdigest()}

    def build(self, adapter: PipelineAdapter) -> Guard:
        """Return the guard, with the features of its concepts."""
        features = ClipTextFeatures(adapter)
        for concept in self.concepts:
            adapter.check_length(concept, "a concept of the guard 'latent-guard'")
        head = load_head(self.weights, allow_pickle=self.allow_pickle).to(features.device)
        if head.width != features.width:
            raise ConfigError(
                f"weights must fit a text encoder of width {features.width}, "
                f"got {head.width}. Train one with guards.latent_guard.head.train_head."
            )
        return LatentGuardGuard(self, features, head)


class LatentGuardGuard(Guard):
    """Guard that blocks prompts by the score of the head."""

    config: LatentGuardConfig

    def __init__(
        self, config: LatentGuardConfig, features: ClipTextFeatures, head: LatentGuardHead
    ) -> None:
        super().__init__(config)
        self.features, self.head = features, head
        self.concepts = features.pooled(config.concepts)

    def check_prompts(self, prompts: Sequence[str]) -> list[GuardResult]:
        """Return one result per prompt, by its greatest score over the concepts."""
        scores = max_scores(self.head, self.features, prompts, self.concepts)
        if not all(math.isfinite(score) for score in scores):
            raise ValueError("the head's score is not a finite number")
        thresholds, results = {"score": self.config.threshold}, []
        for score in scores:
            blocked = score >= self.config.threshold
            action: Literal["block", "none"] = "block" if blocked else "none"
            reason = "concept" if blocked else ""
            results.append(GuardResult(action, reason, {"score": score}, thresholds))
        return results


def calibrate(
    adapter: PipelineAdapter,
    head: LatentGuardHead,
    concepts: Sequence[str],
    benign: Sequence[str],
    *,
    rate: float,
) -> float:
    """Return the least threshold that blocks at most a share `rate` of benign prompts (ours).

    Args:
        adapter: pipeline with the text encoder of the head.
        head: head of the guard.
        concepts: list that the guard will use.
        benign: prompts that must pass.
        rate: wanted false-positive rate, in [0, 1).

    Raises:
        ConfigError: no prompts, or too few to measure such a rate.
    """
    if not 0 <= rate < 1:
        raise ConfigError(f"rate must be in [0, 1), got {rate}")
    if not benign or 0 < rate < 1 / len(benign):
        raise ConfigError(
            f"rate must be 0 or at least 1 / prompts, got {rate} with {len(benign)} prompts. "
            "Give more prompts."
        )
    features = ClipTextFeatures(adapter)
    scores = sorted(max_scores(head, features, benign, features.pooled(concepts)), reverse=True)
    return math.nextafter(scores[math.floor(rate * len(scores) + 1e-9)], math.inf)
