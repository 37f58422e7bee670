"""Texts that attacks start from: what asks for the concept, and tokens that name it."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from safegen.core.concept import Concept, prompt_list
from safegen.core.documents import read_text
from safegen.core.errors import ConfigError, FileError
from safegen.data.prompts.parsing import parse_table
from safegen.evaluation.samples import EvalSample
from safegen.guards.prompt_filter import normalize
from safegen.models.text_encoder import TextEncoderView

SHORTEST = 3
"""Characters that a part of a word must have to be taken for the word."""
PAIR_COLUMNS = (("prompt", "prompt1"), ("sensitive prompt", "normal prompt"))
"""Columns of prompts with and without a concept: Ring-A-Bell's for violence, and RECE's."""


def concept_pairs(concept: Concept) -> list[tuple[str, str, str | None]]:
    """Return prompts with the concept, without it, and their subject.

    They are prompts of the concept's tuning lists for the same subject; without such lists, its
    captions with and without its phrases.

    Raises:
        ConfigError: the concept has neither.
    """
    if concept.tuning.get("concept") and concept.tuning.get("benign"):
        shown, benign = (
            [row for name in concept.tuning[side] for row in prompt_list(name)]
            for side in ("concept", "benign")
        )
        by_subject = {row.subject: row.text for row in reversed(benign)}
        pairs = [
            (r.text, by_subject[r.subject], r.subject) for r in shown if r.subject in by_subject
        ]
    else:
        captions = [row for name in concept.captions for row in prompt_list(name)]
        pairs = [
            (f"{r.text}, {word}", r.text, r.subject) for r in captions for word in concept.words
        ]
    if not pairs:
        raise ConfigError(
            f"concept {concept.name!r} must have tuning lists, or captions and words, for pairs of "
            "prompts, got neither. Add them to its TOML file."
        )
    return pairs


def read_pairs(path: Path) -> list[tuple[str, str, str | None]]:
    """Return prompts with a concept and without it from a CSV file; no subject is known.

    Raises:
        FileError: the file cannot be read, lacks the columns or a prompt, or has no pair.
    """
    known = frozenset(name for names in PAIR_COLUMNS for name in names)
    table = parse_table(read_text(path), path.name, known=known, headerless=lambda _: ())
    columns = next((pair for pair in PAIR_COLUMNS if set(pair) <= set(table.columns)), None)
    if columns is None:
        ways = " or ".join(f"{shown!r} and {benign!r}" for shown, benign in PAIR_COLUMNS)
        got = ", ".join(table.columns)
        raise FileError(f"{path.name} must have the columns {ways}, got {got}. Rename its columns.")
    if table.problems:
        raise FileError(f"{path.name} must be CSV, got {table.problems[0]}. Mend that row.")
    pairs: list[tuple[str, str, str | None]] = []
    for row in table.rows:
        shown, benign = (str(row.cells[name]).strip() for name in columns)
        if not (shown and benign):
            raise FileError(
                f"{path.name} must have two prompts in each row, got a blank one in line "
                f"{row.line}. Fill or remove it."
            )
        pairs.append((shown, benign, None))
    if not pairs:
        raise FileError(f"{path.name} must have a pair of prompts, got none. Add rows.")
    return pairs


def explicit_text(concept: Concept, sample: EvalSample) -> str:
    """Return a prompt that asks for the concept with a sample's subject.

    A prompt that already asks for it is returned as it is.

    Raises:
        ConfigError: the concept has no phrases.
    """
    if sample.role in ("explicit", "innocent"):
        return sample.prompt
    if concept.tuning.get("concept") and sample.subject:
        for text, _, subject in concept_pairs(concept):
            if subject == sample.subject:
                return text
    if not concept.words:
        raise ConfigError(f"concept {concept.name!r} has no words, which this attack needs")
    return f"{sample.prompt}, {concept.words[0]}"


def concept_names(concept: Concept) -> frozenset[str]:
    """Return the words of a concept's phrases that have `SHORTEST` characters or more."""
    phrases = (word for phrase in concept.words for word in normalize(phrase).split())
    return frozenset(word for word in phrases if len(word) >= SHORTEST)


def is_name(word: str, names: Collection[str]) -> bool:
    """Return whether a word is, contains, or is a part of a name (ours).

    Words shorter than `SHORTEST` characters are no part of a name.
    """
    text = normalize(word)
    return len(text) >= SHORTEST and any(text in name or name in text for name in names)


def names_concept(text: str, names: Collection[str]) -> bool:
    """Return whether a text has a word for which `is_name` holds."""
    return any(is_name(word, names) for word in re.findall(r"\w+", normalize(text)))


def naming_tokens(concept: Concept, view: TextEncoderView) -> list[int]:
    """Return the ids of the tokens for which `is_name` holds."""
    names = concept_names(concept)
    return sorted(
        index
        for token, index in view.tokenizer.get_vocab().items()
        if is_name(token.removesuffix("</w>"), names)
    )


def vocabulary_words(view: TextEncoderView, names: Collection[str]) -> list[str]:
    """Return the tokens of a tokenizer that are words of plain letters and no names, sorted."""
    tokens = (token for token in view.tokenizer.get_vocab() if token.endswith("</w>"))
    words = (token.removesuffix("</w>") for token in tokens)
    return sorted(
        {
            word
            for word in words
            if len(word) >= SHORTEST
            and word.isascii()
            and word.isalpha()
            and not is_name(word, names)
        }
    )
