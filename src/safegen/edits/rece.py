"""RECE: erase in closed form, find the embedding that still asks for the concept, erase that too (Gong et al. 2024, arXiv:2407.12383)."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from safegen.core.concept import Concept
from safegen.data.triplets.triplets import Triplets
from safegen.edits.base import Edit, check_inputs, join_quoted, phrases_from
from safegen.edits.functional.closed_form import (
    adversarial_embeddings,
    projections,
    solve_projection,
)
from safegen.edits.training.trainer import TrainingCallback
from safegen.edits.uce import check_unused_phrases, concept_embeddings, to_patch
from safegen.models.model import Model
from safegen.patches.patch import Patch

PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {"captions": (), "preserve_scale": 0.1},
}
"""`paper`: the published code's values for nudity.

`default`: a concept's harmless captions stay, with weight (ours, docs/edits.md).
"""
KEPT = 10.0
"""Weight of preserving where a concept lends captions."""


class RECE(Edit):
    """Settings of the RECE edit."""

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = PRESETS
    inputs: ClassVar[Literal["triplets", "words"]] = "words"
    is_trained: ClassVar[bool] = False

    erase: tuple[str, ...] = ()
    """Words that ask for the concept; a concept lends its own."""
    guide: str = " "
    """Text whose keys and values they get instead."""
    preserve: tuple[str, ...] = (" ",)
    """Words whose keys and values should stay; the published code keeps a blank."""
    captions: tuple[str, ...] = ()
    """Prompt lists (`source:list`) and text files whose captions should stay too, at every position (ours)."""
    tokens: Literal["last", "tail", "all"] = "all"
    """Positions that are edited: every one as published, or the last token of each word, or everything from there on (ours)."""
    expand: bool = False
    """Whether each word is also erased inside five short templates (ours)."""
    rounds: int = Field(default=3, ge=0, le=50)
    """Times that the embedding which still asks for the concept is found and erased; 0 is UCE alone. The published code keeps the
    best of its rounds by a detector on a set of prompts; we keep the last, and measure apart."""
    ridge: float = Field(default=0.1, gt=0)
    """Weight that keeps the found embedding short: 0.1 for nudity, 0.001 for styles."""
    erase_scale: float = Field(default=1.0, gt=0)
    """Weight of the erased embeddings."""
    preserve_scale: float = Field(default=0.1, ge=0)
    """Weight of the preserved words and captions, captions as a mean."""
    stay: float = Field(default=0.1, gt=0)
    """Weight of leaving a projection as it is (lamb in the published code)."""

    @model_validator(mode="after")
    def _no_idle_setting(self) -> Self:
        check_unused_phrases(self)
        if not self.rounds and self.ridge != type(self).model_fields["ridge"].default:
            raise ValueError(
                "ridge has no effect with rounds 0, which look for no embedding; leave it out"
            )
        return self

    def describe(self) -> str:
        """Return it."""
        return (
            f"It is given words ({join_quoted(self.erase)}) and no pictures, and solves for new keys and values of cross-attention under "
            "which these words, and the texts that bring their meaning back, mean something else. A prompt that asks for the same in "
            "other words may still get it."
        )

    @classmethod
    def defaults_from(cls, concept: Concept, said: Mapping[str, Any]) -> dict[str, Any]:
        """Return its words and captions, and with captions the weight that they are kept with."""
        weight = {"preserve_scale": KEPT} if concept.captions and said.get("captions", True) else {}
        return phrases_from(cls.method(), concept, said) | {"captions": concept.captions} | weight

    def apply(
        self,
        model: Model,
        triplets: Triplets | None = None,
        *,
        folder: Path | None = None,
        resume: bool = False,
        callback: TrainingCallback | None = None,
    ) -> Patch:
        """Solve the edit and return it as a patch; `model` is not touched. `callback` is called once.

        Every round starts from the weights of the round before, and what is kept and where erased
        embeddings go is in their terms, as in the published code.

        Raises:
            ConfigError: there are no words to erase, or something given has no effect.
            DivergedError: a solved weight is not finite.
        """
        check_inputs(self, triplets, folder, resume)
        began = time.perf_counter()
        keys, guides, kept = concept_embeddings(
            model, "rece", self.erase, self.guide, self.preserve, self.captions, self.tokens, False
        )
        concept, aims = keys, guides
        if self.expand:
            keys, guides, _ = concept_embeddings(
                model, "rece", self.erase, self.guide, (), (), self.tokens, True
            )
        original = projections(model)
        edited = dict(original)
        scales = {
            "erase_scale": self.erase_scale,
            "preserve_scale": self.preserve_scale,
            "stay": self.stay,
        }
        for turn in range(self.rounds + 1):
            if turn:
                keys = adversarial_embeddings(
                    list(edited.values()), list(original.values()), concept, ridge=self.ridge
                )
                guides = aims
            edited = {
                name: solve_projection(w, keys, guides @ w.T, kept, **scales)
                for name, w in edited.items()
            }
        return to_patch(self, "rece", model, edited, began, callback)
