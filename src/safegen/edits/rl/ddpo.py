"""DDPO: policy gradient on every step of the sampler, with statistics of each prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from safegen.core.settings import MAX_COUNT
from safegen.edits.functional.rollout import SchedulerName
from safegen.edits.rl.algorithm import Algorithm, AlgorithmSettings, DenoisingPolicy, RolloutBatch
from safegen.edits.rl.ddim import ClipRange, SamplerAlgorithm
from safegen.edits.rl.rewards import advantages
from safegen.edits.training.shares import Draws
from safegen.models.families.conditioning import Conditioning

MIN_DEVIATION = 1e-3
"""Smallest deviation of a step; 0.02 is that of the last step of Stable Diffusion's schedule."""


class DDPO(AlgorithmSettings):
    """Settings of DDPO (arXiv:2305.13301), the algorithm of ShieldDiff.

    Images are drawn with noise at every step, and every step is trained: the loss is
    -min(r A, clip(r) A), with r the ratio of the step's probabilities. The advantage A is the sum
    of the rewards by weight, less its mean over past images of the prompt, over their deviation.
    """

    paper: ClassVar[str] = "arXiv:2305.13301"
    scheduler: ClassVar[SchedulerName] = "ddim"

    name: Literal["ddpo"] = "ddpo"
    """Name of the algorithm."""
    eta: float = Field(default=1.0, gt=0, le=1)
    """Noise of a step; 1 is that of DDPM."""
    clip: ClipRange = "auto"
    """Largest change of the ratio that is rewarded.

    `auto` is 0.0128 / sqrt(D) for D latent values: the published 1e-4 at those of SD 1.x.
    """
    buffer: int | None = Field(default=32, ge=2, le=MAX_COUNT)
    """Size of the statistics of a prompt, in images; None compares the images of a rollout."""
    min_count: int = Field(default=16, ge=1, le=MAX_COUNT)
    """Images of a prompt below which the images of the rollout are compared instead."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.buffer is not None and self.min_count > self.buffer:
            raise ValueError(
                f"min_count must be <= buffer ({self.buffer}), got {self.min_count}. "
                "Set buffer to None to compare the images of a rollout."
            )
        return self

    def build(self, policy: DenoisingPolicy, groups: int, group: int, *, updates: int) -> Algorithm:
        """Return the algorithm; see `AlgorithmSettings.build`."""
        return DDPOAlgorithm(self, policy)

    def limits_ratio(self, updates: int) -> bool:
        """Return whether the clip has an effect; the ratio of a single update is 1."""
        return updates > 1

    def batches_per_image(self, steps: int) -> int:
        """Return the steps of the sampler, all of which are trained."""
        return steps


class DDPOAlgorithm(SamplerAlgorithm):
    """DDPO in training."""

    def __init__(self, settings: DDPO, policy: DenoisingPolicy) -> None:
        """Check the schedule and start without statistics.

        Raises:
            ConfigError: a step of the schedule has no noise, or the sampler is not DDIM.
        """
        super().__init__(policy, eta=settings.eta, clip=settings.clip)
        self.trained = range(policy.sampler.steps)
        self.steps.check_deviation(
            self.trained,
            MIN_DEVIATION,
            "Set steps_offset to 1 and set_alpha_to_one to false in the model's scheduler, "
            "or algorithm to grpo_window or v_grpo.",
        )
        self.tracker = PromptTracker(len(policy.text), settings.buffer or 0, settings.min_count)

    @property
    def state(self) -> Mapping[str, Tensor]:
        """Rewards of past images by prompt."""
        return {"rewards": self.tracker.rewards, "count": self.tracker.count}

    def advantages(
        self,
        rewards: Mapping[str, Tensor],
        weights: Mapping[str, float],
        prompts: Tensor,
        groups: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return advantages by the statistics of each prompt; see `Algorithm.advantages`.

        A masked image gets 0 and does not enter the statistics.
        """
        total = sum((w * rewards[name] for name, w in weights.items()), torch.zeros(len(prompts)))
        values, valid = torch.zeros(len(prompts)), total.isfinite()
        values[valid] = self.tracker.normalize(prompts[valid], total[valid]).clamp(-5, 5)
        return values, advantages({"total": total}, {"total": 1.0}, groups)[1]

    def rollout(
        self, denoiser: nn.Module, noise: Tensor, text: Conditioning, draws: Draws
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Draw images with noise at every step; see `Algorithm.rollout`."""
        x, extra = self.sample(denoiser, noise, text, self.trained, draws)
        return x.cpu(), extra

    def prepare(
        self, denoiser: nn.Module, batch: RolloutBatch, size: int, generator: torch.Generator
    ) -> None:
        """Draw the order in which the steps of each image are trained."""
        shape = batch.extra["log_prob"].shape
        batch.extra["order"] = torch.rand(shape, generator=generator).argsort(1)


class PromptTracker:
    """Rewards of the last images of each prompt, and the advantages that follow from them.

    As in the released DDPO (kvablack/ddpo-pytorch 1958463), with the state in tensors.
    """

    def __init__(self, prompts: int, buffer: int, min_count: int) -> None:
        """Start without rewards.

        Args:
            prompts: number of prompts.
            buffer: last rewards of a prompt that are stored.
            min_count: rewards of a prompt from which on they are used.
        """
        self.min_count = min_count
        self.rewards = torch.zeros(prompts, max(buffer, 1))
        self.count = torch.zeros(prompts)
        self.buffer = buffer

    def normalize(self, prompts: Tensor, rewards: Tensor) -> Tensor:
        """Store rewards, and return (r - mean) / (std + 1e-6), (n,).

        Mean and deviation are those of the prompt's stored rewards, these included, or of all
        these rewards while the prompt has fewer than `min_count`.

        Args:
            prompts: index of each image's prompt, (n,).
            rewards: finite reward of each image, (n,).
        """
        values = torch.zeros_like(rewards)
        for prompt in prompts.unique().tolist():
            rows = prompts == prompt
            self._store(prompt, rewards[rows])
            count = int(self.count[prompt])
            used = self.buffer > 0 and count >= self.min_count
            sample = (self.rewards[prompt, :count] if used else rewards).double()
            centered = rewards[rows].double() - sample.mean()
            values[rows] = (centered / (sample.std(correction=0) + 1e-6)).float()
        return values

    def _store(self, prompt: int, rewards: Tensor) -> None:
        """Append rewards to those of a prompt and forget the oldest ones."""
        if not self.buffer:
            return
        stored = self.rewards[prompt, : int(self.count[prompt])]
        last = torch.cat([stored, rewards])[-self.buffer :]
        self.rewards[prompt, : len(last)] = last
        self.count[prompt] = len(last)
