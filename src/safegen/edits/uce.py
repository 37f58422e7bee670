"""UCE: send words to what others are sent to, or lean them toward attributes, in closed form (Gandikota et al. 2023, arXiv:2308.14761)."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, FiniteFloat, model_validator
from torch import Tensor

from safegen.core.concept import Concept
from safegen.core.errors import ConfigError, DivergedError
from safegen.data.triplets.triplets import Triplets
from safegen.edits.base import (
    Edit,
    check_inputs,
    check_phrases,
    join_quoted,
    phrases_from,
    provenance_of,
    require_phrases,
)
from safegen.edits.functional.closed_form import (
    as_patch,
    debias_value,
    embed,
    projections,
    solve_projection,
)
from safegen.edits.training.samples import read_captions
from safegen.edits.training.trainer import TrainingCallback
from safegen.models.checkpoint.metadata import PatchMetadata
from safegen.models.model import Model
from safegen.patches.patch import Patch

PRESETS: dict[str, dict[str, Any]] = {"default": {}, "paper": {"captions": ()}}
"""`paper`: the defaults of the present code (2025).

`default`: the same, and a concept's harmless captions stay (ours, docs/edits.md).
"""
TEMPLATES = ("image of {}", "photo of {}", "portrait of {}", "picture of {}", "painting of {}")
"""What `expand` puts around each word, as published."""


class UCE(Edit):
    """Settings of the UCE edit."""

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = PRESETS
    inputs: ClassVar[Literal["triplets", "words"]] = "words"
    is_trained: ClassVar[bool] = False

    erase: tuple[str, ...] = ()
    """Words that ask for the concept; a concept lends its own."""
    guide: str = ""
    """Text whose keys and values they get instead.

    The blank one is the published default for objects.
    """
    debias: dict[str, FiniteFloat] = Field(default_factory=dict)
    """Attributes that each word leans toward, with their shares, in the place of a guide: `{"a woman": 0.3}`. Then nothing is erased: the
    words keep their meaning and how often each attribute is drawn changes; the shares that give the
    wanted numbers are not looked for.
    """
    preserve: tuple[str, ...] = ()
    """Words whose keys and values should stay."""
    captions: tuple[str, ...] = ()
    """Prompt lists (`source:list`) and text files whose captions should stay too, at every position (ours)."""
    tokens: Literal["last", "tail", "all"] = "last"
    """Positions that are edited: the last token of each word (present code), everything from there on (first code), or every one."""
    expand: bool = False
    """Whether each word is also erased inside five short templates.

    The published flag also preserves what it adds; ours does not.
    """
    erase_scale: float = Field(default=1.0, gt=0)
    """Weight of the erased words."""
    preserve_scale: float = Field(default=1.0, ge=0)
    """Weight of the preserved words and captions, captions as a mean."""
    stay: float = Field(default=0.5, gt=0)
    """Weight of leaving a projection as it is (lamb in the published code)."""

    @model_validator(mode="after")
    def _no_idle_setting(self) -> Self:
        check_unused_phrases(self)
        if self.debias and self.guide != type(self).model_fields["guide"].default:
            raise ValueError(
                "guide has no effect with debias, which sends words to themselves and the attributes; leave it out"
            )
        if idle := [name for name, share in self.debias.items() if not share]:
            raise ValueError(
                f"the attribute {idle[0]!r} has a share of 0 in debias and no effect; leave it out"
            )
        if not all(name.strip() for name in self.debias):
            raise ValueError("debias has a blank attribute; leave it out")
        return self

    @property
    def erases_concept(self) -> bool:
        """Whether it erases words: those that it debiases keep their meaning."""
        return not self.debias

    def describe(self) -> str:
        """Return it."""
        if self.debias:
            return f"Words ({join_quoted(self.erase)}) lean toward {join_quoted(tuple(self.debias))}. Nothing is erased: they keep their meaning."
        return (
            f"It is given words ({join_quoted(self.erase)}) and no pictures, and solves for new keys and values of cross-attention under "
            "which these words mean something else. A prompt that asks for the same in other words may still get it."
        )

    @classmethod
    def defaults_from(cls, concept: Concept, said: Mapping[str, Any]) -> dict[str, Any]:
        """Return its words and captions."""
        return phrases_from(cls.method(), concept, said) | {"captions": concept.captions}

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

        Raises:
            ConfigError: there are no words to erase, or something given has no effect.
            DivergedError: a solved weight is not finite.
        """
        check_inputs(self, triplets, folder, resume)
        began = time.perf_counter()
        said = (self.erase, self.guide, self.preserve, self.captions, self.tokens, self.expand)
        keys, guides, kept = concept_embeddings(model, "uce", *said, debias=self.debias)
        edited = {
            name: solve_projection(
                w,
                keys,
                guides @ w.T,
                kept,
                erase_scale=self.erase_scale,
                preserve_scale=self.preserve_scale,
                stay=self.stay,
            )
            for name, w in projections(model).items()
        }
        return to_patch(self, "uce", model, edited, began, callback)


def check_unused_phrases(edit: Any) -> None:
    """Refuse settings about preserving that meet nothing to preserve, or have no weight; and a weight of what there is not.

    Raises:
        ValueError: they do.
    """
    if (edit.preserve or edit.captions) and not edit.preserve_scale:
        raise ValueError(
            "preserve and captions have no effect with preserve_scale 0; leave them out, or give it a weight"
        )
    if (
        not (edit.preserve or edit.captions)
        and edit.preserve_scale != type(edit).model_fields["preserve_scale"].default
    ):
        raise ValueError(
            "preserve_scale has no effect without preserve or captions; leave it out, or name something to preserve"
        )
    check_phrases(edit.erase)


def concept_embeddings(
    model: Model,
    method: str,
    erase: tuple[str, ...],
    guide: str,
    preserve: tuple[str, ...],
    captions: tuple[str, ...],
    tokens: str,
    expand: bool,
    debias: Mapping[str, float] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the embeddings that are erased, of what they become, and that stay: (n, width) twice and (m, width).

    Captions count as their mean: their rows are scaled so that their Gram matrix is that of one
    caption.

    Raises:
        ConfigError: there are no words, or the guide is one of them.
    """
    words = require_phrases(method, erase)
    if guide in words and not debias:
        raise ConfigError(
            f"the guide {guide!r} is among the words to erase; {method} would change nothing there; name another guide"
        )
    texts = (
        [*words, *(t.format(word) for t in TEMPLATES for word in words)] if expand else list(words)
    )
    found, toward = (
        embed(model, texts, tokens=tokens),
        embed(model, list(debias or [guide]), tokens=tokens),
    )
    long = [
        min(len(rows), *map(len, toward)) for rows in found
    ]  # tails of different texts are as long as the shortest
    rows = [key[:n] for key, n in zip(found, long, strict=True)]
    if debias:
        aims = [
            debias_value(key, [one[: len(key)] for one in toward], list(debias.values()))
            for key in rows
        ]
    else:
        aims = [toward[0][:n] for n in long]
    keys = torch.cat(rows)
    kept = [keys[:0], *(embed(model, preserve, tokens=tokens) if preserve else [])]
    if captions:
        lines = embed(model, read_captions(captions), tokens="all")
        kept.append(torch.cat(lines) / len(lines) ** 0.5)
    return keys, torch.cat(aims), torch.cat(kept)


def to_patch(
    edit: Edit,
    method: str,
    model: Model,
    edited: dict[str, Tensor],
    began: float,
    callback: TrainingCallback | None,
) -> Patch:
    """Return solved weights as a patch, with how far they moved.

    Raises:
        DivergedError: a weight is not finite.
    """
    old = projections(model)
    for name, value in edited.items():
        if not bool(value.isfinite().all()):
            raise DivergedError(
                f"{method} found no finite weight for {name}; raise stay, or lower erase_scale"
            )
    moved = sum(float((value - old[name]).norm() ** 2) for name, value in edited.items()) ** 0.5
    size = sum(float(value.norm() ** 2) for value in old.values()) ** 0.5
    if callback:
        callback(1, 1, {"update": 1, "moved": moved / size})
    seconds = round(time.perf_counter() - began, 2)
    return Patch(
        as_patch(edited), PatchMetadata(**provenance_of(edit, model, seconds=seconds, moved=round(moved / size, 6)))
    )
