"""Micro-steps of an update, several of which one forward pass can compute."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from safegen.edits.training.config import Objective, Training, step_seed

MERGED_POSITIONS = 64 * 64
"""Maximum number of latent positions of the samples that are merged: those of one at full size."""


@runtime_checkable
class MergesMicroSteps(Protocol):
    """An objective that can compute several micro-steps in one forward pass.

    Draws, losses and gradients are those of separate passes, up to rounding.
    """

    @property
    def micro_steps_per_pass(self) -> int:
        """Maximum number of micro-steps in one forward pass, >= 1."""
        ...

    def training_steps(
        self, denoiser: nn.Module, generators: Mapping[int, torch.Generator], share: tuple[int, int]
    ) -> Mapping[str, Tensor]:
        """Return the losses of several micro-steps; see `Objective.training_step`.

        Args:
            denoiser: the network in training.
            generators: source of random draws of each micro-step, by its index.
            share: (rank, world size).
        """
        ...


def merged_micro_steps(samples: int, size: Sequence[int]) -> int:
    """Return how many micro-steps small latents let one forward pass compute, >= 1.

    Args:
        samples: samples of a micro-step.
        size: height and width of the latents.
    """
    return max(1, MERGED_POSITIONS // (samples * size[0] * size[1]))


def forward_passes(objective: Objective, config: Training, update: int) -> Iterator[range]:
    """Yield the micro-steps of each forward pass of an update."""
    merged = objective.micro_steps_per_pass if isinstance(objective, MergesMicroSteps) else 1
    count = math.ceil(config.accumulation / merged)
    ends = [i * config.accumulation // count for i in range(count + 1)]
    for start, end in pairwise(update * config.accumulation + end for end in ends):
        yield range(start, end)


def compute_losses(
    objective: Objective, denoiser: nn.Module, steps: range, seed: int, share: tuple[int, int]
) -> Mapping[str, Tensor]:
    """Return the unweighted losses of the micro-steps of one forward pass by term."""
    generators = {step: torch.Generator("cpu").manual_seed(step_seed(seed, step)) for step in steps}
    if isinstance(objective, MergesMicroSteps):
        return objective.training_steps(denoiser, generators, share)
    ((step, generator),) = generators.items()
    return objective.training_step(denoiser, step, generator, share)
