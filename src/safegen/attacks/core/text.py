"""Texts that attacks start from: what asks for the concept, and tokens that name it."""

from __future__ import annotations

from pathlib import Path

from safegen.core.concept import Concept, prompt_list
from safegen.core.documents import read_text
from safegen.core.errors import ConfigError, FileError
from safegen.data.prompts.parsing import parse_table
from safegen.evaluation.samples import EvalSample
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


def naming_tokens(concept: Concept, view: TextEncoderView) -> list[int]:
    """Return the tokens that name a concept: a word of a phrase, or a part of one.

    A token counts if its text, of `SHORTEST` characters or more, is inside a word of a phrase of
    as many characters, or the other way around (ours).
    """
    words = {
        word.casefold()
        for phrase in concept.words
        for word in phrase.split()
        if len(word) >= SHORTEST
    }
    tokens = []
    for token, index in view.tokenizer.get_vocab().items():
        text = token.removesuffix("</w>").casefold()
        if len(text) >= SHORTEST and any(text in word or word in text for word in words):
            tokens.append(index)
    return sorted(tokens)
