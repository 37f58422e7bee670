"""What a denoiser is conditioned on besides the timestep, for every family of models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Weight = int | float
"""Factor of a sum; the method `float` hides the type's name in the class."""


@dataclass(frozen=True, eq=False)
class Conditioning:
    """Embeddings of texts, one row per text; which parts there are depends on the model.

    Example:
        >>> model = safegen.load("mini")
        >>> model.encode_text(["a castle", ""]).hidden.shape
        torch.Size([2, 32, 128])
    """

    hidden: Tensor
    """Token embeddings, (b, tokens, width)."""
    pooled: Tensor | None = None
    """Pooled embeddings of SDXL, SD 3 and FLUX, (b, width)."""
    added: Mapping[str, Tensor] = field(default_factory=dict)
    """Further inputs by the denoiser's name for them, (b, ...) each, such as SDXL's `time_ids`."""

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.hidden)

    def __getitem__(self, rows: slice | Tensor | Sequence[int]) -> Conditioning:
        """Return some of the rows."""
        return self._map(lambda value: value[rows])

    @staticmethod
    def concat(parts: Sequence[Conditioning]) -> Conditioning:
        """Return the rows of several embeddings in one batch."""
        first = parts[0]
        return Conditioning(
            torch.cat([part.hidden for part in parts]),
            None
            if first.pooled is None
            else torch.cat([part.pooled for part in parts if part.pooled is not None]),
            {name: torch.cat([part.added[name] for part in parts]) for name in first.added},
        )

    def repeat_interleave(self, repeats: int) -> Conditioning:
        """Return every row `repeats` times, repeats adjacent."""
        return self._map(lambda value: value.repeat_interleave(repeats, 0))

    def expand(self, n: int) -> Conditioning:
        """Return `n` rows, a multiple of b: every row repeated equally often, repeats adjacent."""
        return self.repeat_interleave(n // len(self))

    def split(self, size: int) -> list[Conditioning]:
        """Return the rows in parts of at most `size`."""
        return [self[start : start + size] for start in range(0, len(self), size)]

    def float(self) -> Conditioning:
        """Return the embeddings in fp32."""
        return self._map(lambda value: value.float())

    def to(self, *args: Any) -> Conditioning:
        """Return the embeddings on a device or in a dtype; the arguments are those of a tensor."""
        return self._map(lambda value: value.to(*args))

    def plus(self, other: Conditioning, weight: Weight = 1.0) -> Conditioning:
        """Return the embeddings plus `weight` times others; further inputs stay."""
        pooled = self.pooled
        if pooled is not None and other.pooled is not None:
            pooled = pooled + weight * other.pooled
        return Conditioning(self.hidden + weight * other.hidden, pooled, self.added)

    def replace_hidden(self, hidden: Tensor) -> Conditioning:
        """Return the embeddings with other token embeddings."""
        return Conditioning(hidden, self.pooled, self.added)

    def replace_guidance(self, scale: Weight) -> Conditioning:
        """Return the embeddings with another embedded guidance, if the denoiser reads one."""
        if "guidance" not in self.added:
            return self
        guidance = torch.full_like(self.added["guidance"], scale)
        return Conditioning(self.hidden, self.pooled, {**self.added, "guidance": guidance})

    def _map(self, function: Callable[[Tensor], Tensor]) -> Conditioning:
        pooled = None if self.pooled is None else function(self.pooled)
        added = {name: function(value) for name, value in self.added.items()}
        return Conditioning(function(self.hidden), pooled, added)
