"""A concept: what must go, which judge sees it, and the prompts that show whether it went."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from safegen.core.errors import FileError, UnknownNameError, explain
from safegen.core.files import exists
from safegen.core.registry import CONCEPTS, PROMPT_LISTS, expand_labels, resolve


class Concept(BaseModel):
    """What must go. Read from a TOML file, or built in."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: str
    """The concept in one word."""
    words: tuple[str, ...]
    """Words that ask for it."""
    counterpart: tuple[str, ...]
    """Words for its safe counterpart."""
    judge: str
    """Name of the judge that sees it."""
    labels: tuple[str, ...] = Field(min_length=1)
    """Labels of that judge (names of label sets too) that mean the concept is in the picture."""
    threshold: float = 0.5
    """Least score of a detection that counts."""
    triplets: str | None = None
    """Bundled triplets, as `source:concept`."""
    captions: tuple[str, ...] = ()
    """Prompt lists of harmless captions that an edit may train with: none is measured, none has a word of the concept."""
    tuning: dict[Literal["benign", "concept"], tuple[str, ...]] = {}
    """Prompt lists that caption the pictures of a fine-tune by their subject, harmless ones and the concept's own; none is measured."""
    lists: dict[str, tuple[str, ...]] = {}
    """Prompt lists by role (explicit, innocent, neighbour, other, benign), as `source:list`."""
    shows: dict[str, str] = {}
    """Label that a faithful picture of a list shows, for lists that ask for something else than the concept."""

    @field_validator("labels")
    @classmethod
    def _spell_out(cls, labels: tuple[str, ...]) -> tuple[str, ...]:
        return expand_labels(labels)


class PromptRow(BaseModel):
    """One prompt of a list and the subject that a faithful picture shows."""

    model_config = ConfigDict(frozen=True)

    text: str
    subject: str | None = None


def load_concept(name: str) -> Concept:
    """Return a built-in concept, or read one from a TOML file.

    Raises:
        UnknownNameError: neither a built-in concept nor a file.
        FileError: the file is not a concept.
    """
    path = Path(name)
    if name in CONCEPTS:
        path = Path(__file__).parent / "concepts" / f"{name}.toml"
    elif path.suffix != ".toml":
        raise UnknownNameError("concept", name, CONCEPTS)
    if not exists(path, file=True):
        raise FileError(
            f"the concept file {name!r} does not exist; built-in concepts are: {', '.join(CONCEPTS)}"
        )
    try:
        return Concept.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        raise FileError(f"{name} is not a concept file: {explain(error, Concept)}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise FileError(f"{name} is not a concept file: {error}") from error


def prompt_list(name: str, n: int | None = None) -> list[PromptRow]:
    """Return the first `n` prompts of a list named `source:list`, all of them when `n` is None.

    Raises:
        UnknownNameError: no such source or list.
    """
    source, _, part = name.partition(":")
    rows = resolve(PROMPT_LISTS, source, "prompt source")(part, n)
    return [PromptRow(text=text, subject=subject) for text, subject in rows]
