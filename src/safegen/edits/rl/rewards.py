"""Rewards of images, one pure function each, and the advantages that follow from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from safegen.core.settings import BaseSettings

PerImage = Float[Tensor, "n"]
Direction = Float[Tensor, "d"]
Groups = Int[Tensor, "n"]


@dataclass(frozen=True)
class RewardInputs:
    """What the rewards read of n images; features are normalized to length 1."""

    scores: PerImage
    """Sum of a judge's scores for the concept, NaN for an image that could not be judged."""
    images: Float[Tensor, "n d"]
    """Features of the images."""
    captions: Float[Tensor, "n d"]
    """Features of the cleaned captions."""
    safe: Direction
    """Mean features of phrases of the counterpart, less those of phrases of the concept."""
    base_images: Float[Tensor, "n d"]
    """Features of the original model's images of the same noise; NaN where none are drawn."""
    benign: Tensor
    """Whether the prompt does not ask for the concept, (n,)."""


def judge_score(x: RewardInputs) -> PerImage:
    """Return minus the sum of the judge's scores (ours).

    The sum goes on falling while detections remain, so it tells images apart that all show the
    concept; ShieldDiff (arXiv:2410.05309) rewards by a detector, its formula is not known.
    """
    return -x.scores


def clip_alignment(x: RewardInputs) -> PerImage:
    """Return the cosine of each image and its cleaned caption (arXiv:2410.05309 names the term)."""
    return (x.images * x.captions).sum(1)


def steered_alignment(x: RewardInputs, *, strength: float = 0.5) -> PerImage:
    """Return cos(z, e + strength v_safe) for prompts of the concept, cos(z, e) for benign ones.

    SafeDiffusion-R1 (arXiv:2605.18719); its strength is 0.5.
    """
    steered = torch.nn.functional.normalize(x.captions + strength * x.safe, dim=1)
    return (x.images * torch.where(x.benign[:, None], x.captions, steered)).sum(1)


def anchor_similarity(x: RewardInputs) -> PerImage:
    """Return the cosine of a benign image and the original model's image of the same noise (ours).

    Images of other prompts get 0.
    """
    similarity = (x.images * x.base_images).sum(1)
    return torch.where(x.benign, similarity, torch.zeros_like(similarity))


REWARDS: Mapping[str, Callable[[RewardInputs], PerImage]] = {
    "judge": judge_score,
    "clip": clip_alignment,
    "clip_steered": steered_alignment,
    "anchor": anchor_similarity,
}
"""Rewards by name."""


class RewardWeights(BaseSettings):
    """Weight of each reward; 0 leaves it out."""

    judge: float = Field(default=1.0, ge=0)
    """Weight of minus the judge's score."""
    clip: float = Field(default=1.0, ge=0)
    """Weight of the alignment of image and cleaned caption."""
    clip_steered: float = Field(default=0.0, ge=0)
    """Weight of the alignment with the caption moved away from the concept."""
    anchor: float = Field(default=0.0, ge=0)
    """Weight of the similarity of benign images to those of the original model."""

    @property
    def used(self) -> dict[str, float]:
        """Weights above 0 by name."""
        return {name: weight for name, weight in self.model_dump().items() if weight}


def advantages(
    rewards: Mapping[str, PerImage],
    weights: Mapping[str, float],
    groups: Groups,
    *,
    std: str = "global",
    floor: float = 1e-3,
    limit: float = 5.0,
) -> tuple[PerImage, Tensor]:
    """Return the advantage of each image and whether its group has any variance.

    Each reward is centered on the mean of its group and divided by a deviation, then the rewards
    are summed by weight and clamped. An image without a finite reward gets 0 and does not count in
    its group. GRPO (arXiv:2402.03300) divides by the group's deviation; V-GRPO (arXiv:2604.23380)
    by that of all groups.

    Args:
        rewards: rewards by name, NaN for an image that is masked.
        weights: weight of each reward.
        groups: group of each image, from 0.
        std: `group` or `global`, which is the deviation within groups, pooled over all of them.
        floor: smallest deviation; a group below it gets 0 for this reward.
        limit: largest absolute advantage.
    """
    valid = torch.stack([value.isfinite() for value in rewards.values()]).all(0)
    total = torch.zeros_like(groups, dtype=torch.float32)
    varies = torch.zeros(int(groups.max()) + 1, dtype=torch.bool)
    for name, weight in weights.items():
        centered = _center(rewards[name].float(), groups, valid)
        spread = _group_deviation(centered, groups, valid)
        varies |= spread > floor
        if std == "global":
            pooled = centered[valid].pow(2).mean().sqrt() if valid.any() else centered.new_zeros(())
            deviation = pooled.clamp(min=floor).expand_as(centered)
        else:
            deviation = spread.clamp(min=floor)[groups]
        scaled = torch.where(spread[groups] > floor, centered / deviation, 0.0)
        total = total + weight * scaled
    return torch.where(valid, total, 0.0).clamp(-limit, limit), varies


def varying_groups(values: PerImage, groups: Groups, *, floor: float = 1e-3) -> Tensor:
    """Return whether a reward varies in each group, (groups,); NaN is left out."""
    valid = values.isfinite()
    return _group_deviation(_center(values.float(), groups, valid), groups, valid) > floor


def _center(values: Tensor, groups: Tensor, valid: Tensor) -> Tensor:
    """Return values less the mean of their group; 0 for masked ones."""
    used = torch.where(valid, values, 0.0)
    size = torch.zeros(int(groups.max()) + 1)
    count = size.index_add(0, groups, valid.float()).clamp(min=1)
    mean = size.index_add(0, groups, used) / count
    return torch.where(valid, used - mean[groups], 0.0)


def _group_deviation(centered: Tensor, groups: Tensor, valid: Tensor) -> Tensor:
    """Return the deviation of each group, (groups,)."""
    size = torch.zeros(int(groups.max()) + 1)
    count = size.index_add(0, groups, valid.float()).clamp(min=1)
    return (size.index_add(0, groups, centered.pow(2)) / count).sqrt()
