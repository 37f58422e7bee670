"""The parts of a protocol: its prompt lists, its judge, and what else looks at pictures."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from safegen.core.errors import ConfigError
from safegen.core.files import display_name
from safegen.evaluation.plan import Role
from safegen.evaluation.samples import Found, read_rows
from safegen.judges.base import SCORE_FLOOR, no_rule

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
    "clip_score",
    "fid_to_base",
    "kid_to_base",
    "cmmd_to_base",
]
FROM_FEATURES = ("clip_score", "fid_to_base", "kid_to_base", "cmmd_to_base")
"""Metrics that rest on an extractor's features."""
FROZEN = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class PromptList(BaseModel):
    """Prompts of one role."""

    model_config = FROZEN

    role: Role
    """What the prompts are to the concept: explicit, innocent, neighbour, other or benign."""
    name: str
    """Heads the list's column of every table."""
    source: str | None = None
    """Where the prompts are: `source:list`, a file in any dialect of docs/prompts.md, or `hub:owner/name/path/in/repo.csv`."""
    requires: str = ""
    """Which file the user must give, for a list that is not in the package.

    Nothing is downloaded.
    """
    select: dict[str, str] = {}
    """Column and the value that it must hold, for a file of which only some rows are meant.

    Of `categories`, one of a row's labels.
    """
    dialect: str = ""
    """Dialect of the file; told by its columns when empty."""
    column: str = ""
    """Column that holds the prompts, where a dialect has a choice."""
    prompts: int | None = Field(default=None, ge=1)
    """How many of its first prompts; all when not given."""
    sha256: str = Field(default="", pattern="^([0-9a-f]{64})?$")
    """SHA-256 of the rows that are meant (`hash_rows`); empty until the user gives the file."""
    shows: str | None = None
    """Label that a faithful picture shows besides its subject."""
    unsafe: bool = False
    """A list of real unsafe prompts: their texts stay out of every run folder and report, which know them by id and hash."""
    left_out: tuple[str, ...] = ()
    """Every row of the file that cannot be used, as its place and the reason.

    Filled in when the file is read.
    """
    notes: tuple[str, ...] = ()
    """What whoever reads the numbers must know of the file; filled in when it is read."""

    @model_validator(mode="after")
    def _has_one_origin(self) -> Self:
        if (self.source is None) == (not self.requires):
            raise ValueError(
                f"the list {self.name!r} needs either a source or a sentence under requires"
            )
        if self.source is not None and not self.sha256:
            raise ValueError(f"the list {self.name!r} has a source but no sha256")
        return self

    def read(self, *, seeds: bool) -> Found:
        """Return the rows of a list that has a source; see `read_rows`."""
        if self.source is None:
            raise ConfigError(f"the list {self.name!r} needs its prompts: {self.requires}")
        return read_rows(
            self.source,
            prompts=self.prompts,
            select=self.select,
            seeds=seeds,
            dialect=self.dialect,
            column=self.column,
            unsafe=self.unsafe,
        )


class JudgeRule(BaseModel):
    """Which judge looks, and what it must see for a picture to count."""

    model_config = FROZEN

    name: str
    """Name of the judge."""
    labels: tuple[str, ...] = Field(min_length=1)
    """Labels that mean the concept is in the picture."""
    threshold: float = Field(default=0.5, ge=SCORE_FLOOR, le=1)
    """Least score of a detection that counts."""
    options: Annotated[dict[str, Any], AfterValidator(no_rule)] = {}
    """Settings of the judge's own."""

    @property
    def told(self) -> dict[str, Any]:
        """The options as ids and cards have them: of a path only its last part, for the judge's id holds the weights' hash."""
        return {
            key: display_name(value) if isinstance(value, str) else value
            for key, value in self.options.items()
        }


class FeatureRule(BaseModel):
    """What makes the features of pictures (and prompts) for the CLIP score and distances."""

    model_config = FROZEN

    extractor: str
    """Name of the extractor."""
    weights: str | None = None
    """Its weights, for one that has none of its own: a file, a folder, or hub:owner/name.

    Their hash is in the extractor's id.
    """


class LpipsRule(BaseModel):
    """Weights of LPIPS, which are not in the package. Their hashes stand beside every distance."""

    model_config = FROZEN

    trunk: str
    """File with AlexNet's weights under torchvision's names."""
    heads: str
    """File with the five linear heads under the names of the package lpips."""
    side: int | None = None
    """Pixels that pictures are shrunk to first; as they are when not given."""
