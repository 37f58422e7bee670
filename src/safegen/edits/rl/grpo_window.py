"""GRPO on a window: noise and training on a few successive sampler steps only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from safegen.core.errors import ConfigError
from safegen.core.settings import MAX_STEPS
from safegen.edits.functional.rollout import SchedulerName
from safegen.edits.rl.algorithm import Algorithm, AlgorithmSettings, DenoisingPolicy, RolloutBatch
from safegen.edits.rl.ddim import ClipRange, SamplerAlgorithm
from safegen.edits.training.shares import Draws
from safegen.models.families.conditioning import Conditioning

MIN_DEVIATION = 0.03
"""Smallest deviation of a trained step; below it, rounding moves the ratio."""


class GRPOWindow(AlgorithmSettings):
    """Settings of GRPO on a window of sampler steps (MixGRPO, arXiv:2507.21802, for DDIM steps).

    In every rollout `window` successive steps of the first half are drawn with noise, the others by
    the deterministic sampler. Only those are trained, with the loss of DDPO. The advantage is
    GRPO's (arXiv:2402.03300): the reward less the mean of its group, over the group's deviation.
    """

    paper: ClassVar[str] = "arXiv:2507.21802"
    scheduler: ClassVar[SchedulerName] = "ddim"

    name: Literal["grpo_window"] = "grpo_window"
    """Name of the algorithm."""
    window: int = Field(default=2, ge=1, le=MAX_STEPS)
    """Successive steps with noise."""
    placement: Literal["random", "progressive"] = "random"
    """First step of the window: drawn for each rollout, or one later than in the last one."""
    clip: ClipRange = "auto"
    """Largest change of the ratio that is rewarded; `auto` is 0.0128 / sqrt(D)."""

    def build(self, policy: DenoisingPolicy, groups: int, group: int, *, updates: int) -> Algorithm:
        """Return the algorithm; see `AlgorithmSettings.build`."""
        return GRPOWindowAlgorithm(self, policy)

    def limits_ratio(self, updates: int) -> bool:
        """Return whether the clip has an effect; the ratio of a single update is 1."""
        return updates > 1

    def batches_per_image(self, steps: int) -> int:
        """Return the steps of the window."""
        return self.window


class GRPOWindowAlgorithm(SamplerAlgorithm):
    """GRPO on a window in training."""

    deviation: ClassVar[Literal["group", "global"]] = "group"

    def __init__(self, settings: GRPOWindow, policy: DenoisingPolicy) -> None:
        """Check that the window fits into the first half of the schedule.

        Raises:
            ConfigError: it does not, a step has too little noise, or the sampler is not DDIM.
        """
        super().__init__(policy, eta=1.0, clip=settings.clip)
        self.settings, half = settings, (policy.sampler.steps + 1) // 2
        if settings.window > half:
            raise ConfigError(
                f"window must be <= {half}, half of the steps, got {settings.window}. "
                "Raise steps, or set algorithm to ddpo to train all of them."
            )
        self.starts = half - settings.window + 1
        self.steps.check_deviation(
            range(half),
            MIN_DEVIATION,
            f"Lower steps ({policy.sampler.steps}), or set algorithm to v_grpo.",
        )
        self.rollouts = torch.zeros(1)
        self.start: int | None = None
        """First step of the window of the rollout that is drawn."""
        self.source: torch.Generator | None = None
        """Generator of that rollout; another one means that a rollout before it failed."""

    @property
    def state(self) -> Mapping[str, Tensor]:
        """Rollouts so far, which place a progressive window."""
        return {"rollouts": self.rollouts}

    def rollout(
        self, denoiser: nn.Module, noise: Tensor, text: Conditioning, draws: Draws
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Draw images with noise in the window; see `Algorithm.rollout`."""
        if self.start is None or self.source is not draws.generator:
            self.start, self.source = self._place(draws.generator), draws.generator
        timesteps = self.policy.sampler.timesteps
        window = range(self.start, self.start + self.settings.window)
        x = self.policy.draw(denoiser, noise, text, timesteps[: window.start])
        x, extra = self.sample(denoiser, x, text, window, draws)
        return self.policy.draw(denoiser, x, text, timesteps[window.stop :]).cpu(), extra

    def prepare(
        self, denoiser: nn.Module, batch: RolloutBatch, size: int, generator: torch.Generator
    ) -> None:
        """End the rollout: the next one has another window."""
        self.start = None
        self.rollouts += 1
        window = torch.arange(self.settings.window)
        batch.extra["order"] = window.expand(len(batch.prompts), -1)

    def _place(self, generator: torch.Generator) -> int:
        """Return the first step of a window."""
        if self.settings.placement == "progressive":
            return int(self.rollouts) % self.starts
        return int(torch.randint(self.starts, (1,), generator=generator))
