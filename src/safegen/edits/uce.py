"""UCE: map phrases to another text, or toward attributes, in closed form.

Gandikota et al. 2023, arXiv:2308.14761.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, FiniteFloat
from torch import Tensor

from safegen.core.concept import Concept, Phrase
from safegen.edits.base import ClosedFormEdit, join_quoted
from safegen.edits.functional.closed_form import embed_concept, projections, solve_projection
from safegen.models.model import Model


class UCE(ClosedFormEdit):
    """Settings of the UCE edit."""

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {"default": {}, "paper": {"captions": ()}}
    """`paper`: defaults of the code of 2025. `default`: captions are preserved too (ours)."""
    paper: ClassVar[str] = "arXiv:2308.14761"
    code_url: ClassVar[str] = "https://github.com/rohitgandikota/unified-concept-editing"
    deviations: ClassVar[str] = (
        "Solved in float64. `expand` does not put the guide into the templates. "
        "Captions are preserved in `default` (ours)."
    )

    guide: str = ""
    """Text that provides the new keys and values; the published default is the blank text."""
    debias: dict[Phrase, FiniteFloat] = Field(default_factory=dict)
    """Shares of attributes that each phrase moves toward, instead of a guide: `{"a woman": 0.3}`.

    Nothing is erased then: the phrases keep their meaning.
    """
    preserve: tuple[str, ...] = ()
    """Phrases that keep their keys and values."""
    captions: tuple[str, ...] = ()
    """Prompt lists (`source:list`) and text files with captions to preserve too (ours)."""
    tokens: Literal["last", "tail", "all"] = "last"
    """Positions that are edited: the last token, all from there on (first code), or every one."""
    expand: bool = False
    """Whether each phrase is also erased inside five short templates."""
    erase_scale: float = Field(default=1.0, gt=0)
    """Weight of the erased phrases."""
    preserve_scale: float = Field(default=1.0, ge=0)
    """Weight of the preserved phrases and of the mean over captions."""
    lamb: float = Field(default=0.5, gt=0)
    """Weight of the distance to the original projection."""

    def unused_settings(self) -> Iterable[tuple[str, str]]:
        """Yield each setting that has no effect with the others, and why."""
        if self.debias and self.changed("guide"):
            yield "guide", "with debias"
        for attribute, share in self.debias.items():
            if not share:
                yield f"debias[{attribute!r}]", "with a share of 0"
        if not self.preserve_scale:
            for name in self.changed("preserve", "captions"):
                yield name, "with preserve_scale 0"
        elif not (self.preserve or self.captions) and self.changed("preserve_scale"):
            yield "preserve_scale", "without preserve or captions"

    @property
    def erases_concept(self) -> bool:
        """Whether the edit erases its phrases; debiased phrases keep their meaning."""
        return not self.debias

    def describe(self) -> str:
        """Return one or two sentences for a report."""
        phrases = join_quoted(self.erase)
        if self.debias:
            return (
                f"The phrases {phrases} are moved toward {join_quoted(tuple(self.debias))} in "
                "closed form. Nothing is erased: they keep their meaning."
            )
        return (
            f"The edit learns from phrases ({phrases}), not from images. It solves for new keys "
            "and values of cross-attention under which these phrases mean something else. "
            "A prompt that paraphrases them may still generate the concept."
        )

    @classmethod
    def defaults_from(cls, concept: Concept, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return the phrases and captions of a concept."""
        return super().defaults_from(concept, settings) | {"captions": concept.captions}

    def solve(self, model: Model) -> dict[str, Tensor]:
        """Return the new keys and values of cross-attention."""
        erased, targets, preserved = embed_concept(
            model,
            self.erase,
            guide=self.guide,
            tokens=self.tokens,
            preserve=self.preserve,
            captions=self.captions,
            expand=self.expand,
            debias=self.debias,
        )
        scales = self.model_dump(include={"erase_scale", "preserve_scale", "lamb"})
        return {
            name: solve_projection(w, erased, targets @ w.T, preserved, **scales)
            for name, w in projections(model).items()
        }
