"""Latent Guard: a head on the text encoder scores how close a prompt is to listed concepts.

arXiv:2404.08031.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from safegen.core.concept import Concept
from safegen.core.errors import ConfigError, SafegenWarning
from safegen.guards.core.adapter import HookPoint, PipelineAdapter
from safegen.guards.core.base import Guard, GuardConfig
from safegen.guards.core.result import GuardResult, InvalidResultError
from safegen.guards.latent_guard.head import (
    ClipTextFeatures,
    LatentGuardHead,
    check_exists,
    is_clip,
    load_head,
    max_scores,
)
from safegen.models.wrapping import patched_encoders

PUBLISHED_THRESHOLD = 9.0131
"""Threshold for the published weights and the published list of concepts."""


class PatchedEncoderWarning(SafegenWarning):
    """A guard with a trained head reads a text encoder that a patch changes."""


class LatentGuardConfig(GuardConfig):
    """Settings of Latent Guard."""

    name: Literal["latent-guard"] = "latent-guard"
    hook_points: ClassVar[frozenset[HookPoint]] = frozenset({"prompt"})
    paper: ClassVar[str] = "Liu et al. 2024, arXiv:2404.08031; loss and threshold as released"
    code_url: ClassVar[str] = "https://github.com/rt219/LatentGuard"
    code_commit: ClassVar[str] = "5b13ece"
    parity: ClassVar[str] = (
        "The released head's state loads name by name. Its scores differ by 1.1e-6 in fp32 and by "
        "1.8e-15 in float64. The text encoder's features and the loss are equal to the last digit, "
        "the loss's gradients to 8e-7. After 60 updates, scores of heads trained by the released "
        "loop and by `train_head` differ by at most 4e-6."
    )
    deviations: ClassVar[str] = (
        "Keys and values are computed once per prompt and queries once per concept, not per pair. "
        "Long prompts are read in windows, and texts pooled at the tokenizer's end mark (as for "
        "`safree`). `calibrate` and the trainer for any table of prompts "
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
        """Return the guard, with the features of its concepts.

        Warns:
            PatchedEncoderWarning: a patch changes the text encoder.
        """
        if "text_encoder" in patched_encoders(adapter.pipe):
            warnings.warn(
                "latent-guard scores prompts by the text encoder, which a patch changes. A head "
                "of another encoder may miss the concept: train and calibrate it on this one",
                PatchedEncoderWarning,
                stacklevel=2,
            )
        head = load_head(self.weights, allow_pickle=self.allow_pickle)
        return LatentGuardGuard(self, adapter, head)


class LatentGuardGuard(Guard):
    """Guard that blocks prompts by the score of the head."""

    config: LatentGuardConfig

    def __init__(
        self, config: LatentGuardConfig, adapter: PipelineAdapter, head: LatentGuardHead
    ) -> None:
        super().__init__(config)
        self.adapter, self.head = adapter, head
        self.tokenizer: tuple[Any, int, int] | None = None
        """Tokenizer of `ids` with its number of tokens and its limit."""
        self.ids: list[list[int]] = []
        """Token ids of the concepts."""
        self.last_probe: tuple[list[list[int]], Tensor] | None = None
        """Token ids and features by which a changed text encoder is noticed."""
        self.concepts = torch.empty(0)
        """Features of the concepts, (c, width)."""
        self.read_encoder()

    def read_encoder(self) -> ClipTextFeatures:
        """Return the pipeline's text features, and encode the concepts if the encoder changed.

        Raises:
            ConfigError: the head or a concept does not fit the text encoder.
        """
        features = ClipTextFeatures(self.adapter)
        if self.head.width != features.width:
            raise ConfigError(
                f"weights must fit a text encoder of width {features.width}, "
                f"got {self.head.width}. Train one with guards.latent_guard.head.train_head."
            )
        concepts = self.config.concepts
        ids = self._concept_ids(features)
        probe = features.probe(ids)
        last_ids, last_probe = self.last_probe or (None, probe)
        if ids != last_ids or not torch.equal(probe, last_probe):
            for concept in concepts:
                name = "a concept of the guard 'latent-guard'"
                self.adapter.check_length(concept, name, encoder=features.view)
            self.last_probe, self.concepts = (ids, probe), features.pooled(concepts)
        self.head = self.head.to(features.device)
        self.concepts = self.concepts.to(features.device)
        return features

    def _concept_ids(self, features: ClipTextFeatures) -> list[list[int]]:
        """Return the token ids of the concepts, kept until the tokenizer changes."""
        tokenizer = features.view.tokenizer
        state = (len(tokenizer), features.view.limit)
        if (
            self.tokenizer is None
            or self.tokenizer[0] is not tokenizer
            or self.tokenizer[1:] != state
        ):
            self.tokenizer, self.ids = (tokenizer, *state), features.token_ids(self.config.concepts)
        return self.ids

    def check_prompts(self, prompts: Sequence[str]) -> list[GuardResult]:
        """Return one result per prompt, by its greatest score over the concepts."""
        features = self.read_encoder()
        scores = max_scores(self.head, features, prompts, self.concepts)
        if not all(math.isfinite(score) for score in scores):
            raise InvalidResultError("the head's score is not a finite number")
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
        ConfigError: no prompts, or too few to measure such a rate, or a score is not finite.
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
    if invalid := [score for score in scores if not math.isfinite(score)]:
        raise ConfigError(
            f"scores of benign prompts must be finite, got {invalid[0]}. "
            "Load an undamaged text encoder."
        )
    return math.nextafter(scores[math.floor(rate * len(scores) + 1e-9)], math.inf)
