"""UCE: map phrases to another text, or toward attributes, in closed form.

Gandikota et al. 2023, arXiv:2308.14761.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, FiniteFloat, model_validator
from torch import Tensor

from safegen.core.concept import Concept, Phrase
from safegen.edits.base import ClosedFormEdit, join_quoted
from safegen.edits.functional.closed_form import (
    Projections,
    apply_maps,
    embed_concept,
    expand_phrases,
    projections,
    solve_text_map,
)
from safegen.models.model import Model
from safegen.models.text_embeddings import TextInput

GUIDES = {"object": "", "art": "art"}
"""Released guide by type of concept."""


class UCE(ClosedFormEdit):
    """Settings of the UCE edit."""

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "mini": {},
        "full": {},
        "paper": {"captions": ()},
    }
    """`paper`: defaults of the code of 2025. The others: captions are preserved too (ours)."""
    paper: ClassVar[str] = "arXiv:2308.14761"
    code_url: ClassVar[str] = "https://github.com/rohitgandikota/unified-concept-editing"
    code_commit: ClassVar[str] = "28c81ed"
    parity: ClassVar[str] = (
        "`paper`: the released `UCE()`, run on `mini`, differs by 4e-5 of the change with two "
        "phrases, and by 1.9e-4 with a guide, preserved phrases and scales (its fp32 inverse). "
        "`debias`: one iteration of the released loop with fixed shares differs by 1.7e-4. "
        "`expand` and `concept_type`: the lists of `trainscripts/uce_sd_erase.py`, with templates "
        "on phrase and guide and nothing of it preserved; the restated algebra differs by at most "
        "6e-8, and 1.8e-7 for `art` (older commits keep the bare guide, 81f4950, or preserve "
        "templates, 4502388). "
        "`tokens=tail`: the first code, restated, preserved phrases included, differs by less "
        "than 1e-7."
    )
    deviations: ClassVar[str] = (
        "Solved in float64; the released code inverts in fp32. "
        "Captions are preserved in `mini` and `full` (ours). "
        "One guide serves all phrases. "
        "Shares of `debias` are given; the released loop searches for them with a classifier. "
        "SD 3 has no released code: its rows of CLIP and of T5 are phrases of their own. "
        "FLUX (`uce_flux_edit.py`, 81f4950): its outputs contain the bias, which the layer then "
        "adds again, and an empty text has the last row of padding; here weights map to weights, "
        "and an empty text has the row of its end mark."
    )

    concept_type: Literal["object", "art"] = "object"
    """Type of the concept: the templates of `expand`, and the default of `guide`."""
    guide: str = ""
    """Text that the phrases are mapped to. Default: blank, and `art` for that type."""
    debias: dict[Phrase, FiniteFloat] = Field(default_factory=dict)
    """Shares of attributes that each phrase moves toward, instead of a guide: `{"a woman": 0.3}`.

    Nothing is erased then: the phrases keep their meaning.
    """
    preserve: tuple[str, ...] = ()
    """Phrases that are mapped as before."""
    captions: tuple[str, ...] = ()
    """Prompt lists (`source:list`) and text files with captions to preserve too (ours)."""
    tokens: Literal["last", "tail", "all"] = "last"
    """Positions that are edited: the last token, all from there on (first code), or every one.

    Phrases are preserved at the same positions, with `tail` at every one.
    """
    expand: bool = False
    """Whether phrase and guide are also put into five templates, such as `image of`.

    On `mini` this removed 74 % of the explicit detections instead of 98 %, and changed benign
    images by 19 % instead of 8 % (16 prompts per list).
    """
    erase_scale: float = Field(default=1.0, gt=0)
    """Weight of the erased phrases."""
    preserve_scale: float = Field(default=1.0, ge=0)
    """Weight of the preserved phrases and of the mean over captions."""
    lamb: float = Field(default=0.5, gt=0)
    """Weight of the distance to the original projection."""

    @model_validator(mode="before")
    @classmethod
    def _guide_of_type(cls, settings: Any) -> Any:
        if isinstance(settings, Mapping) and settings.get("concept_type") == "art":
            return {"guide": GUIDES["art"], **settings}
        return settings

    def unused_settings(self) -> Iterable[tuple[str, str]]:
        """Yield each setting that has no effect with the others, and why."""
        if self.debias:
            if self.guide != GUIDES[self.concept_type]:
                yield "guide", "with debias"
            for name in self.changed("expand", "concept_type"):
                yield name, "with debias"
        elif self.guide != GUIDES["art"] and not self.expand:
            for name in self.changed("concept_type"):
                yield name, "with a guide and without expand"
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
            f"The edit learns from phrases ({phrases}), not from images. It solves for new "
            "projections of the text under which these phrases mean something else. "
            "A prompt that paraphrases them may still generate the concept."
        )

    @classmethod
    def defaults_from(cls, concept: Concept, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return the phrases and captions of a concept."""
        return super().defaults_from(concept, settings) | {"captions": concept.captions}

    def solve(self, model: Model) -> dict[str, Tensor]:
        """Return the new projections of text; see `closed_form.projections`."""
        weights = projections(model)
        return apply_maps(weights, self.text_maps(model, weights))

    def text_maps(self, model: Model, weights: Projections) -> dict[TextInput, Tensor]:
        """Return the map of text embeddings that the edit is, by part; see `solve_text_map`."""
        erase, guides = list(self.erase), [self.guide] * len(self.erase)
        if self.expand and not self.debias:
            erase, guides = (expand_phrases(texts, self.concept_type) for texts in (erase, guides))
        concepts = embed_concept(
            model,
            weights,
            erase,
            guides,
            tokens=self.tokens,
            preserve=self.preserve,
            captions=self.captions,
            debias=self.debias,
        )
        scales = self.model_dump(include={"erase_scale", "preserve_scale", "lamb"})
        return {part: solve_text_map(*concept, **scales) for part, concept in concepts.items()}
