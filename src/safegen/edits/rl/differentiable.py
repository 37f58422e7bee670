"""Rewards of latents with a gradient, through the decoder, the judge and the features."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from safegen.core.errors import ConfigError
from safegen.edits.rl.rewards import REWARDS, RewardInputs
from safegen.features.base import DifferentiableExtractor, list_differentiable_extractors
from safegen.judges.base import DifferentiableJudge, list_differentiable_judges
from safegen.models.model import Model

if TYPE_CHECKING:
    from safegen.edits.rl.rewarder import Rewarder
    from safegen.edits.shielddiff import ShieldDiff


class DifferentiableReward:
    """Weighted sum of rewards of latents; see `Reward`.

    The judge rewards images of prompts of the concept only (ours). Rewards are not divided by a
    deviation, so their weights are in units of 1 / reward.
    """

    def __init__(self, edit: ShieldDiff, model: Model, rewarder: Rewarder) -> None:
        """Check that the judge and the features have a gradient.

        Raises:
            ConfigError: they do not, or a reward needs images of the original model.
        """
        self.edit, self.model, self.rewarder = edit, model, rewarder
        self.weights = edit.rewards.used
        name = edit.algorithm.name
        if not isinstance(rewarder.judge, DifferentiableJudge):
            raise ConfigError(
                f"judge must have a gradient for {name}, got {edit.judge!r}. "
                f"Use {' or '.join(list_differentiable_judges())}, or another algorithm."
            )
        if not isinstance(rewarder.extractor, DifferentiableExtractor):
            raise ConfigError(
                f"extractor must have a gradient for {name}, got {edit.extractor!r}. "
                f"Use {' or '.join(list_differentiable_extractors())}, or another algorithm."
            )
        self.judge, self.extractor = rewarder.judge, rewarder.extractor
        if "anchor" in self.weights:
            raise ConfigError(
                f"rewards.anchor must be 0 with {name}, got {self.weights['anchor']}. "
                "weight_keep compares benign prompts with the original model."
            )

    def __call__(self, latents: Tensor, prompts: Tensor) -> Tensor:
        """Return the weighted sum of rewards of each image, in fp32; see `Reward`."""
        with torch.autocast(latents.device.type, enabled=False):
            inputs = self.read(latents.float(), prompts)
            rewards = [weight * REWARDS[name](inputs) for name, weight in self.weights.items()]
            return torch.stack(rewards).sum(0)

    def read(self, latents: Tensor, prompts: Tensor) -> RewardInputs:
        """Return the inputs of the rewards with a gradient; benign images have the score 0."""
        device, prompts = latents.device, prompts.cpu()
        pixels = self.model.decode_pixels(latents).float()
        benign = self.rewarder.benign[prompts].to(device)
        features = nn.functional.normalize(self.extractor.embed(pixels).to(device), dim=1)
        return RewardInputs(
            scores=torch.where(benign, 0.0, self.judge.score(pixels).to(device)),
            images=features,
            captions=self.rewarder.captions[prompts].to(device),
            safe=self.rewarder.safe.to(device),
            base_images=torch.full_like(features, float("nan")),
            benign=benign,
        )
