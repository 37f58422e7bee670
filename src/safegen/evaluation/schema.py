"""Parts of a protocol: prompt lists, the judge's rule, and the networks that other metrics need."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from safegen.core.concept import Concept
from safegen.core.errors import ConfigError
from safegen.core.files import display_name
from safegen.core.settings import MAX_COUNT, BaseSettings, JsonObject, Name
from safegen.data.prompts.prompts import PromptSet
from safegen.evaluation.samples import Role, read_prompt_list
from safegen.judges.base import SCORE_FLOOR, check_judge_options

MetricName = Literal[
    "concept",
    "subject",
    "shown",
    "mosaicked",
    "removal",
    "removal_images",
    "removal_labels",
    "change",
    "lpips",
    "asr",
    "asr_any",
    "inappropriate",
    "expected_maximum",
    "over_censoring",
    "coherence",
    "coherence_kept",
    "composition",
    "clip_score",
    "fid_to_base",
    "kid_to_base",
    "cmmd_to_base",
]
Rung = Literal["name", "prefix", "variant", "short", "long"]
"""Rungs of a prompt ladder, in order: EMMA's (arXiv:2512.17320)."""
FROM_FEATURES = ("clip_score", "fid_to_base", "kid_to_base", "cmmd_to_base")
"""Metrics computed from an extractor's features."""
FROM_IMAGES = ("change", "lpips")
"""Metrics that compare each image with the base model's."""


class PromptList(BaseSettings):
    """Prompt list of one role."""

    role: Role
    """Relation of the prompts to the concept."""
    name: Name
    """Name of the list in tables."""
    source: str | None = None
    """Source of the prompts: `source:list`, a file, or `hub:owner/name/path/in/repo.csv`."""
    requires: str = ""
    """File that the user must provide, for a list outside the package. Nothing is downloaded."""
    select: dict[str, str] = Field(default_factory=dict)
    """Column and the value that a row must hold; of `categories`, one of the labels."""
    dialect: str = ""
    """Dialect of the file; detected from its columns if empty."""
    column: str = ""
    """Column that holds the prompts, for dialects with a choice."""
    prompts: int | None = Field(default=None, ge=1, le=MAX_COUNT)
    """Number of prompts, from the start of the list; all if not given."""
    sha256: str = Field(default="", pattern="^([0-9a-f]{64})?$")
    """SHA-256 of the prompts (`hash_prompts`); empty until the user provides the file."""
    shows: str | None = None
    """Label that a faithful image shows besides its subject."""
    rung: Rung | None = None
    """Rung of a prompt ladder, for lists that ask for the concept in ever more words."""
    unsafe: bool = False
    """List of real unsafe prompts; their texts stay out of every run directory and report."""
    left_out: tuple[str, ...] = ()
    """Position and fault of every row that cannot be used; set when the file is read."""
    notes: tuple[str, ...] = ()
    """Remarks on the file for readers of the numbers; set when the file is read."""

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        if (self.source is None) == (not self.requires):
            raise ValueError(
                f"the list {self.name!r} needs either a source or a sentence under requires"
            )
        if self.source is not None and not self.sha256:
            raise ValueError(
                f"the list {self.name!r} must have the sha256 of its prompts, got none. Add "
                f"the one that `safegen prompts show {self.source}` prints"
            )
        return self

    @property
    def is_control(self) -> bool:
        """Whether an attack wrote the list as a control: it has nothing of the concept."""
        return self.role != "attack" and "variant" in self.select

    def read(self, *, protocol_seed: int | None) -> PromptSet:
        """Return the prompts; see `read_prompt_list` for `protocol_seed`.

        Raises:
            ConfigError: the list has no source yet.
        """
        if self.source is None:
            raise ConfigError(f"the list {self.name!r} needs its prompts: {self.requires}")
        return read_prompt_list(
            self.source,
            prompts=self.prompts,
            select=self.select,
            protocol_seed=protocol_seed,
            dialect=self.dialect,
            column=self.column,
            unsafe=self.unsafe,
        )


class JudgeRule(BaseSettings):
    """Judge, and the detections that mean that an image shows the concept."""

    name: Name
    """Name of the judge."""
    labels: tuple[str, ...] = Field(min_length=1)
    """Labels that mean the concept is in the image."""
    threshold: float = Field(default=0.5, ge=SCORE_FLOOR, le=1)
    """Lowest score of a detection that counts."""
    options: Annotated[JsonObject, AfterValidator(check_judge_options)] = Field(
        default_factory=dict
    )
    """Further options of the judge."""

    @property
    def public_options(self) -> dict[str, Any]:
        """Options with paths reduced to file names; the judge's id holds its weights' hash."""
        return {
            key: display_name(value) if isinstance(value, str) else value
            for key, value in self.options.items()
        }


def concept_rule(concept: Concept) -> JudgeRule:
    """Return the judge of a concept, with its labels, threshold and options."""
    return JudgeRule(
        name=concept.judge,
        labels=concept.labels,
        threshold=concept.threshold,
        options=concept.judge_options,
    )


class FeatureRule(BaseSettings):
    """Extractor of the features for the CLIP score and the distances to the base model."""

    extractor: Name
    """Name of the extractor."""
    weights: str | None = None
    """Weights, for an extractor without bundled ones: a file, a folder, or hub:owner/name."""


class LpipsRule(BaseSettings):
    """Weights of LPIPS, which are not in the package. Their hashes stand beside every distance."""

    trunk: str
    """File with AlexNet's weights under torchvision's names."""
    heads: str
    """File with the five linear heads under the names of the package lpips."""
    side: int | None = Field(default=None, ge=1, le=4096)
    """Side in pixels to shrink images to; their own size if not given."""
