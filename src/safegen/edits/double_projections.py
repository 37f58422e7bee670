"""Double Projections: erase in closed form, and leave preserved embeddings exactly alone.

Zhang et al. 2026, arXiv:2604.10032.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from safegen.core.concept import Concept, Phrases
from safegen.edits.base import ClosedFormEdit, join_quoted
from safegen.edits.functional.closed_form import (
    apply_maps,
    embed_concept,
    embed_rows,
    null_space_map,
    project_rows,
    projections,
)
from safegen.models.model import Model


class DoubleProjections(ClosedFormEdit):
    """Settings of the Double Projections edit."""

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {"mini": {}, "full": {}}
    """Settings are ours for both sizes; not measured at full size."""
    paper: ClassVar[str] = "ours, after arXiv:2604.10032"
    parity: ClassVar[str] = (
        "Not compared: no released code was found. The equations are those of published summaries "
        "of the paper (proxy in the safe subspace, update in the left null space, truncation to "
        "the leading singular directions); the paper itself was not read."
    )
    deviations: ClassVar[str] = (
        "The paper's safe and preserved concepts, its number of directions and the positions of "
        "its embeddings are not known here. The safe subspace is that of the concept's "
        "counterpart, captions are preserved, and `preserve_share` and `tokens` are ours. "
        "Several phrases are solved together with a pseudoinverse (ours)."
    )

    safe: Phrases = ()
    """Phrases that span the safe subspace, onto which the erased ones are projected.

    Default: the counterpart of the concept. Without any, the projection is zero.
    """
    preserve: tuple[str, ...] = ()
    """Phrases that are mapped as before, at the same positions."""
    captions: tuple[str, ...] = ()
    """Prompt lists (`source:list`) and text files to preserve too, at every position."""
    preserve_share: float = Field(default=0.5, gt=0, le=1)
    """Most directions that are preserved exactly, as a share of the columns that texts fill.

    These are the leading singular directions of the preserved embeddings.
    """
    tokens: Literal["last", "tail", "all"] = "last"
    """Positions that are edited: the last token, all from there on, or every one."""

    def unused_settings(self) -> Iterable[tuple[str, str]]:
        """Yield each setting that has no effect with the others, and why."""
        if not (self.preserve or self.captions) and self.changed("preserve_share"):
            yield "preserve_share", "without preserve or captions"

    def describe(self) -> str:
        """Return one or two sentences for a report."""
        return (
            f"The edit learns from phrases ({join_quoted(self.erase)}), not from images. It solves "
            "for new projections of the text under which these phrases mean what safe phrases have "
            "in common with them. A prompt that paraphrases them may still generate the concept."
        )

    @classmethod
    def defaults_from(cls, concept: Concept, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return the phrases, the counterpart and the captions of a concept."""
        defaults = super().defaults_from(concept, settings)
        return defaults | {"safe": concept.counterpart, "captions": concept.captions}

    def solve(self, model: Model) -> dict[str, Tensor]:
        """Return the new projections of text; see `closed_form.null_space_map`."""
        weights = projections(model)
        concepts = embed_concept(
            model,
            weights,
            self.erase,
            [""] * len(self.erase),
            tokens=self.tokens,
            preserve=self.preserve,
            captions=self.captions,
        )
        safe = embed_rows(model, weights, self.safe, self.tokens)
        maps = {}
        for part, (keys, _, preserved) in concepts.items():
            filled = (torch.cat([keys, preserved]) != 0).any(0)  # SD 3 pads CLIP's with zeros
            rank = int(self.preserve_share * int(filled.sum()))
            targets = project_rows(keys, safe[part])
            maps[part] = null_space_map(keys, targets, preserved, rank=rank)
        return apply_maps(weights, maps)
