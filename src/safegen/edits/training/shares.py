"""Batches that several processes share: who computes what, and losses of all samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from safegen.core.errors import ConfigError
from safegen.core.processes import gather_objects, process_share, sum_values


@dataclass(frozen=True)
class Draws:
    """Source of random draws for some images of a batch."""

    generator: torch.Generator
    """Generator that all processes have in the same state."""
    rows: Tensor
    """Places of the images in the batch, (b,)."""
    size: int
    """Number of images of the whole batch."""

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Return normal noise for the images, (b, ...), drawn for the whole batch.

        Args:
            shape: shape of the noise of one image.
        """
        return torch.randn(self.size, *shape, generator=self.generator)[self.rows]


def share_batches(n: int, size: int) -> list[Tensor]:
    """Return which of n images this process computes, a tensor of indices for each batch."""
    rank, processes = process_share()
    return [batch[rank::processes] for batch in torch.arange(n).split(size)]


def check_fingerprints(fingerprint: str) -> None:
    """Check that all processes train the same.

    Args:
        fingerprint: settings, data and weights of the training of this process.

    Raises:
        ConfigError: those of another process differ.
    """
    fingerprints = gather_objects(fingerprint)
    for rank, other in enumerate(fingerprints):
        if other != fingerprints[0]:
            raise ConfigError(
                f"settings, data and weights must be equal on all {len(fingerprints)} processes, "
                f"got others on process {rank}. Start all with the same command."
            )


def means_of_all(terms: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, float]]:
    """Return the part of this process in the mean of each loss over all samples, and that mean.

    The parts of all processes add up to the mean, also where their shares are unequal.

    Args:
        terms: losses of this process's samples by term, (b,) each.
    """
    means = [value.float().mean() for value in terms.values()]
    if process_share()[1] == 1:
        return {name: (mean, mean.item()) for name, mean in zip(terms, means, strict=True)}
    counts = [float(len(value)) for value in terms.values()]
    own = [mean.item() * count for mean, count in zip(means, counts, strict=True)]
    totals = sum_values([*counts, *own])
    parts = zip(terms, means, counts, totals[: len(terms)], totals[len(terms) :], strict=True)
    return {
        name: (mean * (count / total), whole / total) for name, mean, count, total, whole in parts
    }


def mean_of_all(value: Tensor) -> Tensor:
    """Return the mean of the values of all processes, with the gradient of the sum of their losses.

    All processes must go back through it.

    Args:
        value: values of this process, (b,).
    """
    if process_share()[1] == 1:
        return value.mean()
    mean: Tensor = _MeanOfAll.apply(value)  # type: ignore[no-untyped-call]
    return mean


class _MeanOfAll(torch.autograd.Function):
    """Mean over all processes; its derivative is the sum of those that they have for it."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total, ctx.count = sum_values([float(value.double().sum()), value.numel()])
        ctx.shape = value.shape
        return value.new_tensor(total / ctx.count)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (whole,) = sum_values([float(gradient)])
        return gradient.new_full(ctx.shape, whole / ctx.count)
