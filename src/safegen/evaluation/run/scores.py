"""Schema of a scores file, for readers: figures in their range, stacks and lists that belong."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from safegen.core.documents import check_plain, read_json_object, validate
from safegen.core.settings import Count, Digest, FolderName, Name, Number, Share
from safegen.evaluation.run.records import Kind
from safegen.evaluation.samples import Role
from safegen.judges.base import SCORE_FLOOR

FORMAT: Literal["safegen-scores/3"] = "safegen-scores/3"
Fraction = Annotated[float, Field(ge=-1e12, le=1)]
"""Part that was removed; negative if there is more than before."""


class ScoresPart(BaseModel):
    """Part of a scores file. Keys that no reader uses are plain values."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True, allow_inf_nan=False)

    @model_validator(mode="after")
    def _check_extra(self) -> Self:
        check_plain(self.model_extra)
        return self


class RateScores(ScoresPart):
    """Rate with its interval."""

    value: Share
    low: Share | None
    high: Share | None
    n: Count


class BlankScores(RateScores):
    """Rate of images of one color."""

    hits: Count


class RemovalScores(ScoresPart):
    """Removal rate with its interval."""

    value: Fraction
    low: Fraction
    high: Fraction
    n: Count


class MeanScores(ScoresPart):
    """Mean with its interval."""

    value: Number
    low: Number | None
    high: Number | None
    n: Count


class ListScores(ScoresPart):
    """Figures of a stack on a prompt list."""

    role: Role
    shows: str | None = None
    concept: RateScores | None = None
    subject: RateScores | None = None
    shown: RateScores | None = None
    mosaicked: RateScores | None = None
    removal: RemovalScores | None = None
    change: MeanScores | None = None


class MeasuredListScores(ListScores):
    """Figures of a stack on a prompt list, with the numbers of its images."""

    prompts: Count
    images: Count
    blank: BlankScores


class StackScores(ScoresPart):
    """Figures of a stack."""

    hash: Digest
    kind: Kind
    baseline: FolderName
    lists: dict[Name, MeasuredListScores] = Field(min_length=1)


class ScoredRule(ScoresPart):
    """Labels and threshold that the scores rest on."""

    labels: list[str] = Field(min_length=1)
    threshold: Annotated[float, Field(ge=SCORE_FLOOR, le=1)]


class ScoredSettings(ScoresPart):
    """What decides the scores."""

    judge: ScoredRule


class ScoredProtocol(ScoresPart):
    """Protocol of a scores file."""

    name: Name
    id: Annotated[str, Field(pattern="^[0-9a-f]{16}$")]
    decides: ScoredSettings


class ScoresFile(ScoresPart):
    """Content of `scores.json`."""

    format: Literal["safegen-scores/3"]
    protocol: ScoredProtocol
    judge: str
    weights: dict[str, str]
    inputs: dict[str, Digest]
    stacks: dict[FolderName, StackScores] = Field(min_length=1)

    @model_validator(mode="after")
    def _check_stacks(self) -> Self:
        lists = [list(stack.lists) for stack in self.stacks.values()]
        if any(names != lists[0] for names in lists):
            raise ValueError("stacks must have figures of the same lists")
        for name, stack in self.stacks.items():
            if stack.baseline not in self.stacks:
                raise ValueError(f"the baseline of {name!r} has no figures: {stack.baseline!r}")
        return self


def read_scores(path: Path) -> dict[str, Any]:
    """Return the content of a scores file as plain values that fit `ScoresFile`.

    Raises:
        FileError: the file cannot be read, or its content does not fit.
    """
    scores = read_json_object(path)
    validate(ScoresFile, scores, str(path))
    return scores
