"""Patches that are on a model, and their removal bit for bit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from safegen.core.text import short_repr
from safegen.models.checkpoint.metadata import PatchMetadata
from safegen.models.patched_weights import pipeline_weights, restore

if TYPE_CHECKING:
    from safegen.models.model import Model


@dataclass(frozen=True, eq=False)
class AppliedPatch:
    """A patch on a model. `undo()` removes it bit for bit; also a context manager."""

    model: Model
    before: dict[str, Tensor]
    """Weight values before the patch was applied, by their names in patches."""
    hash: str
    """Hash of the patch."""
    metadata: PatchMetadata
    """Metadata of the patch."""
    hidden: bool = False
    """Whether patches made on the model meanwhile do not list it as a parent."""

    def __repr__(self) -> str:
        """Return the method, the model and the number of tensors in one line."""
        size = f"{len(self.before)} tensors"
        return short_repr(AppliedPatch, size, method=self.metadata.method, model=self.model.name)

    @property
    def names(self) -> frozenset[str]:
        """Names of the weights it changes."""
        return frozenset(self.before)

    @torch.no_grad()
    def undo(self) -> None:
        """Restore the old values bit for bit.

        Where a later patch is on the same weight, that one restores them when it is undone. A
        second call has no effect.
        """
        applied_patches = self.model.applied_patches
        if self not in applied_patches:
            return
        later = applied_patches[applied_patches.index(self) + 1 :]
        parameters = pipeline_weights(self.model.pipeline)
        for name, value in self.before.items():
            covering = next((applied for applied in later if name in applied.before), None)
            if covering is None:
                restore(parameters[name], value)
            else:
                covering.before[name] = value
        applied_patches.remove(self)

    def __enter__(self) -> AppliedPatch:
        """Return the applied patch itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Undo the patch."""
        self.undo()
