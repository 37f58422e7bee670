"""Figures of a rollout, for the log of a training by reward."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from safegen.edits.rl.rewards import RewardInputs, varying_groups


def rollout_figures(
    x: RewardInputs,
    rewards: Mapping[str, Tensor],
    groups: Tensor,
    varies: Tensor,
    verdicts: Mapping[str, Tensor],
) -> dict[str, float]:
    """Return the figures of a rollout, for the log.

    KIND is `concept` or `benign`, for images of prompts of that kind; JUDGE is `judge` or
    `held_out`. A figure without an image is left out.

    | key | figure |
    |---|---|
    | `reward_NAME_KIND`, `reward_NAME_KIND_std` | mean and deviation of a reward, unweighted |
    | `JUDGE_unsafe_KIND` | share of judged images in which the judge finds the concept |
    | `JUDGE_unsafe_KIND_n` | number of judged images |
    | `zero_variance` | share of groups in which no reward varies |
    | `zero_variance_judge` | share of groups of the concept with one score of the judge |
    | `masked` | share of images without a reward, which train nothing |
    | `diversity` | mean of 1 - cosine of the features of the images of a group |
    | `alignment_benign` | mean cosine of benign images and their captions |

    Each row of the log, one for an update, also has:

    | key | figure |
    |---|---|
    | `L_policy`, `L_kl`, `L_keep` | losses, unweighted; a distance is 0 if none has a weight |
    | `reward` | mean reward of DRaFT, weighted |
    | `weight_kl`, `weight_keep` | weights of L_kl and L_keep in this update |
    | `ratio`, `ratio_deviation` | mean of the ratio new / old, and largest distance from 1 |
    | `clipped` | share of images with a clipped ratio |
    | `old_distance` | squared distance of predictions to those of NFT's old weights |
    | `old_decay` | decay with which NFT's old weights followed |
    | `rollout` | number of rollouts so far |
    | `passes` | passes through the network so far; a backward pass counts as 2 |
    | `skipped` | 1 if a loss or the gradient was not finite, so that nothing was learned |
    | `update`, `lr`, `norm`, `seconds` | see `TrainResult` |

    Args:
        x: inputs of the rewards.
        rewards: rewards by name, NaN for masked images, (n,) each.
        groups: group of each image, (n,).
        varies: whether a reward varies in each group.
        verdicts: see `JudgedImages`.
    """
    figures: dict[str, float] = {}
    kinds = {"concept": ~x.benign, "benign": x.benign}
    for kind, rows in kinds.items():
        for name, value in rewards.items():
            part = value[rows & value.isfinite()]
            if len(part):
                figures[f"reward_{name}_{kind}"] = float(part.mean())
                figures[f"reward_{name}_{kind}_std"] = float(part.std(correction=0))
        for judge, found in verdicts.items():
            part = found[rows & found.isfinite()]
            if len(part):
                figures[f"{judge}_unsafe_{kind}"] = float(part.mean())
                figures[f"{judge}_unsafe_{kind}_n"] = float(len(part))
    figures["zero_variance"] = float((~varies).float().mean())
    if "judge" in rewards and not x.benign.all():
        used = groups[~x.benign].unique()
        constant = ~varying_groups(rewards["judge"], groups)
        figures["zero_variance_judge"] = float(constant[used].float().mean())
    valid = torch.stack([value.isfinite() for value in rewards.values()]).all(0)
    figures["masked"] = float((~valid).float().mean())
    figures["diversity"] = group_diversity(x.images, groups)
    alignment = (x.images * x.captions).sum(1)[x.benign]
    if alignment.isfinite().any():
        figures["alignment_benign"] = float(alignment[alignment.isfinite()].mean())
    return figures


def group_diversity(features: Tensor, groups: Tensor) -> float:
    """Return the mean of 1 - cosine over all pairs of a group, over all groups.

    Images with features that are not finite are left out.

    Args:
        features: normalized features, (n, d).
        groups: group of each image, (n,).
    """
    finite = features.isfinite().all(1)
    features, groups = features[finite], groups[finite]
    same = (groups[:, None] == groups[None]) & ~torch.eye(len(groups), dtype=torch.bool)
    return float((1 - features @ features.T)[same].mean()) if same.any() else 0.0
