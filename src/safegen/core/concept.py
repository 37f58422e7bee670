"""Concepts to remove: their phrases, their judge and the prompts that measure the removal."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from safegen.core.documents import read_toml, validate
from safegen.core.errors import ConfigError, FileError, UnknownNameError
from safegen.core.files import atomic_write, exists
from safegen.core.registry import CONCEPTS, PROMPT_LISTS, expand_labels, resolve
from safegen.core.settings import FOLDER_NAME, BaseSettings, JsonObject, Name, raises_config_error
from safegen.core.text import short_repr

CONCEPT_FOLDER = Path(__file__).parent / "concepts"
"""Folder of the built-in concepts, and of the template for others."""


def _check_phrase(phrase: str) -> str:
    if not phrase.strip():
        raise ValueError("phrases must not be blank, as every prompt contains the blank text")
    return phrase


Phrase = Annotated[str, AfterValidator(_check_phrase)]
"""Phrase that names something in a prompt; it is not blank."""
Phrases = tuple[Phrase, ...]
"""Type of a setting with phrases."""


@raises_config_error
class Concept(BaseSettings):
    """Visual concept to remove, built in or read from a TOML file.

    Example:
        >>> concept = safegen.Concept(
        ...     name="wings",
        ...     words=("wings", "a wing"),
        ...     counterpart=("nothing on it",),
        ...     judge="clip",
        ...     labels=("wings",),
        ... )
    """

    name: Name
    """Name of the concept, one word."""
    words: Phrases
    """Phrases that name the concept in a prompt."""
    counterpart: Phrases
    """Phrases that name a safe counterpart."""
    judge: Name
    """Name of the judge that detects the concept."""
    labels: tuple[str, ...] = Field(min_length=1)
    """Labels or label sets of the judge that mean the concept."""
    threshold: float = Field(default=0.5, ge=0, le=1)
    """Lowest score of a detection that counts."""
    judge_options: JsonObject = Field(default_factory=dict)
    """Other options of the judge, such as its weights and prompts."""
    held_out_judge: Name | None = None
    """Judge with the same labels that no training uses, for edits that learn from `judge`."""
    triplets: str | None = None
    """Bundled triplets, as `source:concept`."""
    captions: tuple[str, ...] = ()
    """Prompt lists of benign captions for training; none is used for measuring."""
    tuning: dict[Literal["benign", "concept", "counterpart"], tuple[str, ...]] = Field(
        default_factory=dict
    )
    """Prompt lists that caption benign and concept images in a fine-tune; none is measured.

    The prompts of `counterpart` are those of `concept` without the concept, one for one.
    """
    lists: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Prompt lists by role (explicit, innocent, neighbour, other, benign), as `source:list`."""
    shows: dict[str, str] = Field(default_factory=dict)
    """Label that a faithful image of a list shows, for lists that ask for an attribute."""

    def __repr__(self) -> str:
        """Return name, phrases, judge and labels in one line."""
        return short_repr(
            Concept, repr(self.name), words=self.words, judge=self.judge, labels=self.labels
        )

    @field_validator("labels")
    @classmethod
    def _expand_labels(cls, labels: tuple[str, ...]) -> tuple[str, ...]:
        return expand_labels(labels)

    @model_validator(mode="after")
    def _check_held_out_judge(self) -> Self:
        if self.held_out_judge == self.judge:
            raise ValueError(
                f"held_out_judge must differ from judge, got {self.judge!r} for both. "
                "Leave it out if there is no other judge"
            )
        return self


def write_template(name: str, path: Path) -> None:
    """Write a valid concept file with an explanation of every setting.

    Raises:
        ConfigError: the name has other characters than letters, digits, dots, dashes and
            underscores, or the file does not end in .toml.
        FileError: the file exists or cannot be written.
    """
    if not re.fullmatch(FOLDER_NAME, name):
        raise ConfigError(
            "name of a concept must be 1 to 64 letters, digits, '.', '_' or '-', got "
            f"{name[:80]!r}. Put phrases with spaces into words."
        )
    if path.suffix != ".toml":
        raise ConfigError(f"concept file must end in .toml, got {str(path)!r}")
    text = (CONCEPT_FOLDER / "template.txt").read_text(encoding="utf-8")
    phrase = re.sub("[-_.]+", " ", name).strip()
    with atomic_write(path) as temporary:
        text = text.replace("NAME", name).replace("PHRASE", phrase)
        temporary.write_text(text, encoding="utf-8")


class PromptRow(BaseModel):
    """Prompt of a list with the subject and the background that a faithful image shows."""

    model_config = ConfigDict(frozen=True)

    text: str
    subject: str | None = None
    background: str | None = None


def load_concept(name: str) -> Concept:
    """Return a built-in concept, or the concept in a TOML file.

    Raises:
        UnknownNameError: the name is neither a built-in concept nor a TOML file.
        FileError: the file does not exist or is not a concept.

    Example:
        >>> safegen.load_concept("skulls").words
        ('skulls', 'a skull')
    """
    path = Path(name)
    if name in CONCEPTS:
        path = CONCEPT_FOLDER / f"{name}.toml"
    elif path.suffix != ".toml":
        raise UnknownNameError("concept", name, CONCEPTS)
    if not exists(path):
        raise FileError(
            f"concept file {name!r} does not exist. Built-in concepts: {', '.join(CONCEPTS)}"
        )
    return validate(Concept, read_toml(path), name)


def prompt_list(name: str, n: int | None = None) -> list[PromptRow]:
    """Return the first `n` prompts of a list `source:list`, or all if `n` is None.

    Raises:
        UnknownNameError: there is no such source or list.
    """
    source, _, part = name.partition(":")
    rows = resolve(PROMPT_LISTS, source, "prompt source")(part, n)
    return [PromptRow(**dict(zip(PromptRow.model_fields, row, strict=False))) for row in rows]
