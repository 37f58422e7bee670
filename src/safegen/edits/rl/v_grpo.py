"""V-GRPO: the denoising loss as the likelihood of an image, on shared draws."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from safegen.core.settings import MAX_COUNT
from safegen.edits.functional import losses
from safegen.edits.rl.algorithm import (
    Algorithm,
    AlgorithmSettings,
    LossTerms,
    Policy,
    RolloutBatch,
    per_image,
)


class VGRPO(AlgorithmSettings):
    """Settings of V-GRPO (arXiv:2604.23380).

    Images are drawn by the ordinary sampler. Each has the likelihood surrogate -L, where L is the
    mean denoising error on `pairs` draws of timestep and noise; the images of a group share them,
    and the timesteps are stratified. The loss is -min(r A, clip(r) A) with r = exp(L_old - L).
    """

    source: ClassVar[str] = "arXiv:2604.23380"

    name: Literal["v_grpo"] = "v_grpo"
    """Name of the algorithm."""
    pairs: int = Field(default=4, ge=1, le=MAX_COUNT)
    """Draws of timestep and noise of an image."""
    weighting: Literal["adaptive", "uniform"] = "adaptive"
    """Weight of a draw: `adaptive` divides its squared error by its mean absolute error."""
    clip: float | None = Field(default=0.2, gt=0)
    """Largest change of the ratio that is rewarded; None does not clip."""

    def build(self, policy: Policy, groups: int, group: int, *, updates: int) -> Algorithm:
        """Return the algorithm; see `AlgorithmSettings.build`."""
        return VGRPOAlgorithm(self, policy, updates=updates)


class VGRPOAlgorithm(Algorithm):
    """V-GRPO in training."""

    def __init__(self, settings: VGRPO, policy: Policy, *, updates: int) -> None:
        """Store the settings; without further updates the old losses are the current ones."""
        super().__init__(policy)
        self.settings, self.keeps_old = settings, updates > 1

    def prepare(
        self, denoiser: nn.Module, batch: RolloutBatch, size: int, generator: torch.Generator
    ) -> None:
        """Draw timesteps and noise of every group, and compute the losses before the update."""
        k, count = self.settings.pairs, int(batch.groups.max()) + 1
        t = stratified_timesteps(count, k, len(self.policy.abar), generator)
        eps = torch.randn(count, k, *batch.latents.shape[1:], generator=generator)
        batch.extra |= {"t": t[batch.groups], "eps": eps[batch.groups]}
        if self.keeps_old:
            with torch.no_grad(), self.policy.autocast():
                rows = torch.arange(len(batch.prompts)).split(size)
                old = [self._errors(denoiser, batch.rows(part), frozen=True)[0] for part in rows]
            batch.extra["old"] = torch.cat(old).cpu()

    def loss(self, denoiser: nn.Module, batch: RolloutBatch, index: int) -> LossTerms:
        """Return the clipped surrogate and the distance to the original predictions."""
        surrogate, kl = self._errors(denoiser, batch)
        old = batch.extra["old"].to(surrogate.device) if self.keeps_old else surrogate.detach()
        ratio = (old - surrogate).exp()
        loss, clipped = clipped_surrogate(
            ratio, batch.advantages.to(ratio.device), self.settings.clip
        )
        return LossTerms(loss, kl, {"ratio": ratio.detach(), "clipped": clipped})

    def _errors(
        self, denoiser: nn.Module, batch: RolloutBatch, *, frozen: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return the denoising error L of each image and its distance to the original model."""
        policy, k = self.policy, self.settings.pairs
        z = batch.latents.to(policy.device).repeat_interleave(k, 0)
        t = batch.extra["t"].flatten().to(policy.device)
        eps = batch.extra["eps"].flatten(0, 1).to(policy.device)
        x = losses.add_noise(z, eps, policy.abar[t])
        text = policy.text[batch.prompts.to(policy.device)].repeat_interleave(k, 0)
        predict = policy.predict_frozen if frozen else policy.predict
        prediction = predict(denoiser, x, t, text)
        error = prediction - policy.truth(eps, z, t)
        squared = per_image(error.pow(2))
        if self.settings.weighting == "adaptive":
            squared = squared / per_image(error.detach().abs()).clamp(min=1e-5)
        surrogate = squared.view(-1, k).mean(1)
        if frozen:
            return surrogate, torch.zeros_like(surrogate)
        reference = policy.predict_frozen(denoiser, x, t, text, policy.reference)
        return surrogate, per_image((prediction - reference).pow(2)).view(-1, k).mean(1)


def stratified_timesteps(
    groups: int, pairs: int, timesteps: int, generator: torch.Generator
) -> Tensor:
    """Return timesteps (groups, pairs), one in each of `pairs` equal parts of the schedule."""
    part = torch.rand(groups, pairs, generator=generator) + torch.arange(pairs)
    return (part * timesteps / pairs).long().clamp(max=timesteps - 1)


def clipped_surrogate(
    ratio: Tensor, advantages: Tensor, clip: float | None
) -> tuple[Tensor, Tensor]:
    """Return max(-A r, -A clip(r, 1 - c, 1 + c)) and whether the clipped term was taken.

    PPO (Schulman et al. 2017, arXiv:1707.06347, eq. 7).

    Args:
        ratio: new over old probability, (b,).
        advantages: advantages, (b,).
        clip: the range c; None does not clip.
    """
    plain = -advantages * ratio
    if clip is None:
        return plain, torch.zeros_like(ratio)
    limited = -advantages * ratio.clamp(1 - clip, 1 + clip)
    return torch.maximum(plain, limited), (limited > plain).float()
