"""Figures of a rollout, and what follows from them: known failures of reinforcement learning."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from safegen.core.errors import ConfigError, SafegenWarning
from safegen.edits.rl.rewards import RewardInputs

STATE = ("kl", "keep", "diversity", "alignment", "rollouts", "idle")
"""Names of the monitor's values."""
FACTOR = 1.5
"""Factor by which a weight is raised or lowered after a rollout."""
BOUND = 100.0
"""Largest factor between a weight and its setting."""


class TrainingHealthWarning(SafegenWarning):
    """Sign that a training by reward goes wrong."""


class Monitor:
    """Adapts the weights of the two distances to the original model, and ends a training.

    | failure | sign | consequence |
    |---|---|---|
    | collapse | the images of a group are less than half as far apart as at first | `kl` rises |
    | over-erasure | images of benign prompts fit their captions less than at first | `keep` rises |
    | sparse reward | no group of the first rollouts has any variance | the training is refused |
    | reward hacking | the held-out judge finds the concept where the judge does not | it ends |
    """

    def __init__(
        self, kl: float, keep: float, *, budget: float | None, min_diversity: float = 0.5
    ) -> None:
        """Store the weights to start from.

        Args:
            kl: weight of the distance on prompts of the concept.
            keep: weight of the distance on benign prompts.
            budget: distance on benign prompts that `keep` is adapted to; None leaves it.
            min_diversity: share of the first diversity below which `kl` rises.
        """
        self.initial, self.budget, self.min_diversity = (kl, keep), budget, min_diversity
        self.values = {name: torch.zeros(1) for name in STATE}
        self.values["kl"].fill_(kl)
        self.values["keep"].fill_(keep)

    @property
    def kl(self) -> float:
        """Weight of the distance on prompts of the concept."""
        return float(self.values["kl"])

    @property
    def keep(self) -> float:
        """Weight of the distance on benign prompts."""
        return float(self.values["keep"])

    def follow_rollout(self, figures: Mapping[str, float]) -> None:
        """Compare a rollout with the first one.

        Raises:
            ConfigError: five rollouts in a row from the start have no variance.

        Warns:
            TrainingHealthWarning: the images of a group collapse.
        """
        first = self.values["rollouts"] == 0
        self.values["rollouts"] += 1
        if figures["zero_variance"] >= 1 and self.values["idle"] >= 0:
            self.values["idle"] += 1
        else:
            self.values["idle"].fill_(-1)  # a reward was seen
        if self.values["idle"] >= 5:
            raise ConfigError(
                "rewards must differ within groups, and in 5 rollouts they do not. Start from a "
                "patch that removes part of the concept (--from), or raise group."
            )
        if first:
            self.values["diversity"].fill_(figures["diversity"])
            self.values["alignment"].fill_(figures.get("alignment_benign", 0.0))
        elif figures["diversity"] < self.min_diversity * float(self.values["diversity"]):
            warnings.warn(
                f"images of one prompt are {figures['diversity']:.3f} apart, at first "
                f"{float(self.values['diversity']):.3f}; the weight kl is raised",
                TrainingHealthWarning,
                stacklevel=2,
            )
            self._scale("kl", FACTOR)

    def follow_distance(self, distance: float) -> None:
        """Adapt `keep` to the distance on benign prompts in an update."""
        if self.budget is not None:
            self._scale("keep", FACTOR if distance > self.budget else 1 / FACTOR)

    def _scale(self, name: str, factor: float) -> None:
        initial = self.initial[("kl", "keep").index(name)]
        value = float(self.values[name]) * factor
        self.values[name].fill_(min(max(value, initial / BOUND), max(initial, 1e-3) * BOUND))


def rollout_figures(
    x: RewardInputs, rewards: Mapping[str, Tensor], groups: Tensor, varies: Tensor
) -> dict[str, float]:
    """Return the figures of a rollout, for the log.

    Mean and deviation of each reward on prompts of the concept and on benign ones, the share of
    groups without variance, of masked images, the diversity (mean of 1 - cosine within groups) and
    the mean cosine of benign images and their captions.
    """
    figures: dict[str, float] = {}
    for name, value in rewards.items():
        for kind, rows in (("concept", ~x.benign), ("benign", x.benign)):
            part = value[rows & value.isfinite()]
            if len(part):
                figures[f"reward_{name}_{kind}"] = float(part.mean())
                figures[f"reward_{name}_{kind}_std"] = float(part.std(correction=0))
    figures["zero_variance"] = float((~varies).float().mean())
    figures["masked"] = float((~x.scores.isfinite()).float().mean())
    figures["diversity"] = group_diversity(x.images, groups)
    if x.benign.any():
        figures["alignment_benign"] = float((x.images * x.captions).sum(1)[x.benign].mean())
    return figures


def group_diversity(features: Tensor, groups: Tensor) -> float:
    """Return the mean of 1 - cosine over all pairs of a group, over all groups."""
    same = (groups[:, None] == groups[None]) & ~torch.eye(len(groups), dtype=torch.bool)
    return float((1 - features @ features.T)[same].mean()) if same.any() else 0.0
