"""RECE: erase in closed form, find the embeddings that still give the concept, erase them too.

Gong et al. 2024, arXiv:2407.12383.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from safegen.core.concept import Concept
from safegen.edits.base import ClosedFormEdit, join_quoted
from safegen.edits.functional.closed_form import (
    adversarial_embeddings,
    embed_concept,
    projections,
    solve_projection,
)
from safegen.models.model import Model

CAPTIONS_SCALE = 10.0
"""Default of `preserve_scale` for a concept with captions (ours)."""


class RECE(ClosedFormEdit):
    """Settings of the RECE edit."""

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "default": {},
        "paper": {"captions": (), "preserve_scale": 0.1},
    }
    """`paper`: released values for nudity. `default`: captions are preserved too (ours)."""
    TINY: ClassVar[Mapping[str, Any]] = {"rounds": 1}
    paper: ClassVar[str] = "arXiv:2407.12383"
    code_url: ClassVar[str] = "https://github.com/CharlesGong12/RECE"
    deviations: ClassVar[str] = (
        "Solved in float64. The first round starts from the original model, not from a UCE "
        "checkpoint. The last round is kept, not the best by a detector. "
        "Captions are preserved in `default` (ours)."
    )

    guide: str = " "
    """Text that provides the new keys and values of the phrases."""
    preserve: tuple[str, ...] = (" ",)
    """Phrases that keep their keys and values; the published code preserves a blank."""
    captions: tuple[str, ...] = ()
    """Prompt lists (`source:list`) and text files with captions to preserve too (ours)."""
    tokens: Literal["last", "tail", "all"] = "all"
    """Positions that are edited: every one as published, the last token, or all from there on."""
    expand: bool = False
    """Whether each phrase is also erased inside five short templates (ours)."""
    rounds: int = Field(default=3, ge=0, le=50)
    """Rounds in which adversarial embeddings are found and erased; 0 is UCE alone."""
    ridge: float = Field(default=0.1, gt=0)
    """Weight of the norm of an adversarial embedding: 0.1 for nudity, 0.001 for styles."""
    erase_scale: float = Field(default=1.0, gt=0)
    """Weight of the erased embeddings."""
    preserve_scale: float = Field(default=0.1, ge=0)
    """Weight of the preserved phrases and of the mean over captions."""
    lamb: float = Field(default=0.1, gt=0)
    """Weight of the distance to the original projection."""

    def unused_settings(self) -> Iterable[tuple[str, str]]:
        """Yield each setting that has no effect with the others, and why."""
        if not self.rounds and self.changed("ridge"):
            yield "ridge", "with rounds 0"
        if not self.preserve_scale and self.captions:
            yield "captions", "with preserve_scale 0"
        elif not (self.preserve or self.captions) and self.changed("preserve_scale"):
            yield "preserve_scale", "without preserve or captions"

    def describe(self) -> str:
        """Return one or two sentences for a report."""
        return (
            f"The edit learns from phrases ({join_quoted(self.erase)}), not from images. It solves "
            "for new keys and values of cross-attention under which these phrases, and the "
            "embeddings that bring their meaning back, mean something else. "
            "A prompt that paraphrases them may still generate the concept."
        )

    @classmethod
    def defaults_from(cls, concept: Concept, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return the phrases and captions of a concept, and the weight that preserves captions."""
        defaults = super().defaults_from(concept, settings) | {"captions": concept.captions}
        if concept.captions and settings.get("captions", True):
            defaults["preserve_scale"] = CAPTIONS_SCALE
        return defaults

    def solve(self, model: Model) -> dict[str, Tensor]:
        """Return the new keys and values of cross-attention.

        Every round starts from the weights of the round before: targets and preserved outputs are
        theirs, as in the published code.
        """
        concept = embed_concept(
            model,
            self.erase,
            guide=self.guide,
            tokens=self.tokens,
            preserve=self.preserve,
            captions=self.captions,
        )
        erased, targets = concept.erased, concept.targets
        if self.expand:
            erased, targets, _ = embed_concept(
                model, self.erase, guide=self.guide, tokens=self.tokens, expand=True
            )
        scales = self.model_dump(include={"erase_scale", "preserve_scale", "lamb"})
        original = projections(model)
        edited = dict(original)
        for i in range(self.rounds + 1):
            if i:
                erased = adversarial_embeddings(
                    list(edited.values()), list(original.values()), concept.erased, ridge=self.ridge
                )
                targets = concept.targets
            edited = {
                name: solve_projection(w, erased, targets @ w.T, concept.preserved, **scales)
                for name, w in edited.items()
            }
        return edited
