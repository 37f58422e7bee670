"""V-GRPO: the denoising loss as the likelihood of an image, on shared draws."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from safegen.core.processes import gather_rows
from safegen.core.settings import MAX_COUNT
from safegen.edits.rl.algorithm import (
    Algorithm,
    AlgorithmSettings,
    DenoisingPolicy,
    LossTerms,
    RolloutBatch,
    per_image,
)
from safegen.edits.rl.forward import draw_pairs, noise_images
from safegen.edits.training.shares import share_batches


class VGRPO(AlgorithmSettings):
    """Settings of V-GRPO (arXiv:2604.23380).

    Images are drawn by the ordinary sampler. Each has the likelihood surrogate -L, where L is the
    mean denoising error on `pairs` draws of timestep and noise; the images of a group share them,
    and the timesteps are stratified. The loss is -min(r A, clip(r) A) with r = exp(L_old - L).
    """

    paper: ClassVar[str] = "arXiv:2604.23380"
    deviations: ClassVar[str] = (
        "Written from the abstract and others' accounts of the equations. The paper trains flow "
        "models and measures the error of the clean latents, here an option (error x0). Its "
        "distance is that to the model of the rollout, here that to the original model, which "
        "keeps other content."
    )

    name: Literal["v_grpo"] = "v_grpo"
    """Name of the algorithm."""
    pairs: int = Field(default=4, ge=1, le=MAX_COUNT)
    """Draws of timestep and noise of an image."""
    error: Literal["prediction", "x0"] = "prediction"
    """What the error is measured on: the network's output or the clean latents it implies."""
    weighting: Literal["adaptive", "uniform"] = "adaptive"
    """Weight of a draw: `adaptive` divides its squared error by its mean absolute error."""
    clip: float | None = Field(default=0.2, gt=0)
    """Largest change of the ratio that is rewarded; None does not clip."""
    soft_clip: float | None = Field(default=3.0, gt=0)
    """Limit c of advantages, which become c tanh(A / c); None leaves them."""

    def build(self, policy: DenoisingPolicy, groups: int, group: int, *, updates: int) -> Algorithm:
        """Return the algorithm; see `AlgorithmSettings.build`."""
        return VGRPOAlgorithm(self, policy, updates=updates)

    def limits_ratio(self, updates: int) -> bool:
        """Return whether the clip has an effect; the ratio of a single update is 1."""
        return self.clip is not None and updates > 1


class VGRPOAlgorithm(Algorithm):
    """V-GRPO in training."""

    def __init__(self, settings: VGRPO, policy: DenoisingPolicy, *, updates: int) -> None:
        """Store the settings; without further updates the old losses are the current ones."""
        super().__init__(policy)
        self.settings, self.keeps_old = settings, updates > 1

    def prepare(
        self, denoiser: nn.Module, batch: RolloutBatch, size: int, generator: torch.Generator
    ) -> None:
        """Draw timesteps and noise of every group, and compute the losses before the update."""
        schedule = self.policy.schedule
        batch.extra |= draw_pairs(batch, self.settings.pairs, schedule, generator, shared=True)
        if self.keeps_old:
            with torch.no_grad(), self.policy.autocast():
                rows = share_batches(len(batch.prompts), size)
                old = [self.errors(denoiser, batch.rows(part), frozen=True)[0] for part in rows]
            own = torch.cat(old).cpu()
            batch.extra["old"] = gather_rows(own, torch.cat(rows), len(batch.prompts))

    def loss(self, denoiser: nn.Module, batch: RolloutBatch, index: int) -> LossTerms:
        """Return the clipped surrogate and the distance to the original predictions."""
        surrogate, kl = self.errors(denoiser, batch)
        old = batch.extra["old"].to(surrogate.device) if self.keeps_old else surrogate.detach()
        ratio = (old - surrogate).exp()
        advantages = soft_clip(batch.advantages.to(ratio.device), self.settings.soft_clip)
        loss, clipped = clipped_surrogate(ratio, advantages, self.settings.clip)
        return LossTerms(loss, kl, {"ratio": ratio.detach(), "clipped": clipped})

    def errors(
        self, denoiser: nn.Module, batch: RolloutBatch, *, frozen: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return the denoising error L of each image and its distance to the original model.

        Args:
            denoiser: the network.
            batch: images with their draws.
            frozen: whether to compute neither a gradient nor the distance, which is 0.
        """
        policy, k, x = self.policy, self.settings.pairs, noise_images(self.policy, batch)
        predict = policy.predict_frozen if frozen else policy.predict
        prediction = predict(denoiser, x.x, x.t, x.text)
        if self.settings.error == "x0":
            error = policy.x0(prediction, x.x, x.t) - x.z
        else:
            error = prediction - policy.truth(x.eps, x.z, x.t)
        squared = per_image(error.pow(2))
        if self.settings.weighting == "adaptive":
            squared = squared / per_image(error.detach().abs()).clamp(min=1e-5)
        surrogate = squared.view(-1, k).mean(1)
        if frozen:
            return surrogate, torch.zeros_like(surrogate)
        distance = policy.distance(denoiser, prediction, x.x, x.t, x.text)
        return surrogate, distance.view(-1, k).mean(1)


def soft_clip(advantages: Tensor, limit: float | None) -> Tensor:
    """Return c tanh(A / c) for a limit c, which is near A for small advantages.

    V-GRPO (arXiv:2604.23380, eq. 17).
    """
    return advantages if limit is None else limit * (advantages / limit).tanh()


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
