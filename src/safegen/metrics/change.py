"""How far an edited model's pictures are from the base model's, prompt by prompt and seed by seed."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Mean:
    """A mean with its 95 % interval over `n` values."""

    value: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float], clusters: Sequence[Hashable], *, seed: int = 0, draws: int = 2000) -> Mean:
        """Return the mean of `values`; interval: percentile bootstrap over clusters, which are resampled whole.

        Args:
            values: one number a picture.
            clusters: what each belongs to, usually its prompt.
            seed: of the bootstrap.
            draws: bootstrap samples.

        Raises:
            ValueError: no values, or lengths differ.
        """
        if not values or len(values) != len(clusters):
            raise ValueError(f"a mean needs values and as many clusters, got {len(values)} and {len(clusters)}")
        groups: dict[Hashable, list[float]] = {}
        for value, cluster in zip(values, clusters, strict=True):
            groups.setdefault(cluster, []).append(value)
        sums = np.array(sorted((sum(g), float(len(g))) for g in groups.values()))  # sorted: the order of the rows is irrelevant
        picks = np.random.default_rng(seed).integers(len(sums), size=(draws, len(sums)))
        totals = sums[picks].sum(axis=1)
        low, high = np.quantile(totals[:, 0] / totals[:, 1], [0.025, 0.975])
        return cls(float(np.mean(values)), float(low), float(high), len(values))

    def to_json(self) -> dict[str, Any]:
        """Return plain values for a results file."""
        return dict(self.__dict__)


def picture_change(base: Image.Image, edited: Image.Image) -> float:
    """Return the mean absolute difference of two pictures' RGB values as a part of the full range: 0 is equal, 1 black against white.

    A plain distance that needs no weights (ours): it sees faded colours and moved objects alike, and a model that does nothing scores 0,
    so read it beside the removal rate.

    Raises:
        ValueError: the sizes differ.
    """
    if base.size != edited.size:
        raise ValueError(f"pictures must be of one size, got {base.size} and {edited.size}")
    a, b = (np.asarray(i.convert("RGB"), dtype=np.float64) for i in (base, edited))
    return float(np.abs(a - b).mean() / 255)
