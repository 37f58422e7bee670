"""DiffusionNFT: two implicit models, one to approach and one to leave, in one denoising loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

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
from safegen.edits.training.shares import Draws
from safegen.models.families.conditioning import Conditioning


class NFT(AlgorithmSettings):
    """Settings of DiffusionNFT (arXiv:2509.16117).

    Images are drawn by the ordinary sampler with an old copy of the weights. With the predictions
    v of the weights and v_old of the copy, the image's share p = clip(A / A_max, -1, 1) / 2 + 1/2,
    and |.|^2 divided by the mean absolute error, which has no gradient, the loss is

        A_max / b (p |x0((1 - b) v_old + b v) - x0|^2 + (1 - p) |x0((1 + b) v_old - b v) - x0|^2).

    After the updates of a rollout the copy follows the weights.
    """

    paper: ClassVar[str] = "arXiv:2509.16117"
    deviations: ClassVar[str] = (
        "The paper trains flow models and draws without guidance. Its distance to the original "
        "model has the weight 1e-4; here the weights are those of the edit (kl, weight_keep). The "
        "timesteps of an image are stratified."
    )

    name: Literal["nft"] = "nft"
    """Name of the algorithm."""
    pairs: int = Field(default=4, ge=1, le=MAX_COUNT)
    """Draws of timestep and noise of an image."""
    beta: float = Field(default=1.0, gt=0, le=10)
    """Distance b of the two models from the old one; small values make larger steps."""
    max_advantage: float = Field(default=5.0, gt=0, le=1000)
    """Advantage A_max at which an image belongs to one of the two models alone."""
    decay_rate: float = Field(default=0.001, ge=0, le=1)
    """Growth of the decay of the old copy with each update."""
    max_decay: float = Field(default=0.5, ge=0, lt=1)
    """Largest decay of the old copy; 0 draws with the weights themselves."""

    def build(self, policy: DenoisingPolicy, groups: int, group: int, *, updates: int) -> Algorithm:
        """Return the algorithm; see `AlgorithmSettings.build`."""
        return NFTAlgorithm(self, policy, updates=updates)


class NFTAlgorithm(Algorithm):
    """DiffusionNFT in training."""

    def __init__(self, settings: NFT, policy: DenoisingPolicy, *, updates: int) -> None:
        """Copy the weights, which are drawn with until the end of the first rollout's updates."""
        super().__init__(policy)
        self.settings, self.updates_per_rollout = settings, updates
        self.old = {name: value.float().clone() for name, value in policy.reference.items()}
        self.updates = torch.zeros(1)

    @property
    def state(self) -> Mapping[str, Tensor]:
        """Old copy of the weights and the number of updates."""
        return {"updates": self.updates, **{f"old/{k}": v for k, v in self.old.items()}}

    def rollout(
        self, denoiser: nn.Module, noise: Tensor, text: Conditioning, draws: Draws
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Draw one batch of images with the old weights."""
        return self.policy.draw(denoiser, noise, text, tensors=self.old).cpu(), {}

    def prepare(
        self, denoiser: nn.Module, batch: RolloutBatch, size: int, generator: torch.Generator
    ) -> None:
        """Draw timesteps and noise of every image."""
        schedule = self.policy.schedule
        batch.extra |= draw_pairs(batch, self.settings.pairs, schedule, generator, shared=False)

    def loss(self, denoiser: nn.Module, batch: RolloutBatch, index: int) -> LossTerms:
        """Return the loss and the distance to the original predictions."""
        policy, k, x = self.policy, self.settings.pairs, noise_images(self.policy, batch)
        prediction = policy.predict(denoiser, x.x, x.t, x.text)
        old = policy.predict_frozen(denoiser, x.x, x.t, x.text, self.old)
        loss = two_sided_loss(
            policy.x0(prediction, x.x, x.t) - x.z,
            policy.x0(old, x.x, x.t) - x.z,
            batch.advantages.to(policy.device).repeat_interleave(k),
            beta=self.settings.beta,
            max_advantage=self.settings.max_advantage,
        )
        kl = policy.distance(denoiser, prediction, x.x, x.t, x.text)
        moved = per_image((prediction.detach() - old).pow(2))
        terms = [value.view(-1, k).mean(1) for value in (loss, kl, moved)]
        return LossTerms(terms[0], terms[1], {"old_distance": terms[2]})

    def after_update(self, weights: Mapping[str, Tensor]) -> Mapping[str, float]:
        """Move the old copy towards the weights after the last update of a rollout."""
        self.updates += 1
        if int(self.updates) % self.updates_per_rollout:
            return {}
        decay = min(self.settings.decay_rate * int(self.updates), self.settings.max_decay)
        for name, value in self.old.items():
            value.lerp_(weights[name].float(), 1 - decay)
        return {"old_decay": decay}


def two_sided_loss(
    error: Tensor, old_error: Tensor, advantages: Tensor, *, beta: float, max_advantage: float
) -> Tensor:
    """Return the loss of DiffusionNFT, (b,).

    arXiv:2509.16117, with the errors e of the clean latents: x0 is linear in the prediction, so
    the two implicit models have the errors (1 - b) e_old + b e and (1 + b) e_old - b e. Where e is
    e_old, the gradient is A that of |e|^2 / sg(mean |e|), with A clipped to +-A_max.

    Args:
        error: x0 of the prediction less the clean latents, (b, c, h, w).
        old_error: the same for the old weights.
        advantages: advantages, (b,).
        beta: distance of the two models from the old one.
        max_advantage: advantage A_max.
    """
    share = (advantages / max_advantage).clamp(-1, 1) / 2 + 0.5
    approached = (1 - beta) * old_error + beta * error
    left = (1 + beta) * old_error - beta * error
    loss = share * _normalized(approached) + (1 - share) * _normalized(left)
    return loss * max_advantage / beta


def _normalized(error: Tensor) -> Tensor:
    """Return the mean squared error over the mean absolute error, which has no gradient."""
    return per_image(error.pow(2)) / per_image(error.detach().abs()).clamp(min=1e-5)
