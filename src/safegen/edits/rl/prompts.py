"""Prompts of a training by reward, each with the caption that its images should fit."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from safegen.core.errors import ConfigError, FileError, SafegenWarning
from safegen.core.settings import MAX_NUMBER
from safegen.data.prompts.prompt import Prompt
from safegen.data.prompts.prompts import FORMS, read_prompts
from safegen.edits.training.samples import read_captions

KINDS = {"unsafe": False, "benign": True}
"""Values of the column `kind`, and whether such a prompt is benign."""


MAX_PROMPTS = 10_000
"""Most prompts of a training; their embeddings are in memory."""


class UncleanCaptionWarning(SafegenWarning):
    """Prompts of the concept that contain none of its phrases."""


@dataclass(frozen=True)
class TrainingPrompt:
    """Prompt of a training."""

    text: str
    """Text that images are drawn of."""
    caption: str
    """What the images should show: the text without the concept."""
    benign: bool
    """Whether the prompt does not ask for the concept."""
    weight: float = 1.0
    """Share of the rollouts relative to the other prompts of its kind, > 0."""


def clean_caption(text: str, erase: Sequence[str], anchors: Sequence[str]) -> str:
    """Return a prompt with the concept's phrases replaced by its counterpart.

    The longest phrase is replaced first, in upper or lower case, at word boundaries. A prompt
    that is nothing but a phrase becomes the counterpart. Without anchors the phrases are left out,
    with the punctuation that separated them; the result may be the empty text, which
    stands for no content in particular.

    Args:
        text: the prompt.
        erase: phrases that name the concept.
        anchors: phrases that name its counterpart; the first one is used.
    """
    text = " ".join(text.split())
    phrases = sorted((" ".join(phrase.split()) for phrase in erase), key=len, reverse=True)
    pattern = "|".join(re.escape(phrase) for phrase in phrases)
    if not pattern:
        return text
    replacement = anchors[0] if anchors else ""
    cleaned, found = re.subn(
        rf"(?<!\w)(?:{pattern})(?!\w)", lambda _: replacement, text, flags=re.IGNORECASE
    )
    if replacement or not found:
        return cleaned
    cleaned = re.sub(r"\s+(?=[,;:.!?])", "", cleaned)
    cleaned = re.sub(r"[,;:]+(?=[,;:.!?])", "", cleaned)
    return " ".join(cleaned.split()).strip(" ,;:")


def read_training_prompts(
    prompts: Sequence[str],
    captions: Sequence[str],
    counterparts: Sequence[str] = (),
    *,
    erase: Sequence[str],
    anchors: Sequence[str],
    allow_no_benign: bool = False,
) -> list[TrainingPrompt]:
    """Return the prompts of a training: those that ask for the concept first, then benign ones.

    Args:
        prompts: prompt lists and text files with prompts of the concept; tables (`is_table`) with
            prompts of both kinds.
        captions: prompt lists and text files with benign prompts.
        counterparts: prompt lists and text files with the caption of each prompt of the concept
            that is not in a table. Default: see `clean_caption`.
        erase: phrases that name the concept.
        anchors: phrases that name its counterpart.
        allow_no_benign: whether there may be no benign prompts.

    Raises:
        ConfigError: there are no prompts of a kind, more than `MAX_PROMPTS`, or not one counterpart
            for each prompt.
        FileError: a file cannot be read, or a row is wrong; the message names its line.

    Warns:
        UncleanCaptionWarning: prompts of the concept do not contain a phrase of it.
    """
    texts = read_captions([name for name in prompts if not is_table(name)])
    cleaned = read_captions(counterparts)
    if cleaned and len(cleaned) != len(texts):
        raise ConfigError(
            f"counterparts must have a caption for each of {len(texts)} prompts, got "
            f"{len(cleaned)}. Give lists of equal length, or leave counterparts out."
        )
    if not cleaned:
        cleaned = [clean_caption(text, erase, anchors) for text in texts]
    rows = [TrainingPrompt(*pair, False) for pair in zip(texts, cleaned, strict=True)]
    for name in filter(is_table, prompts):
        rows += _read_table(name, erase, anchors)
    rows += [TrainingPrompt(text, text, True) for text in read_captions(captions)]
    concept, benign = [row for row in rows if not row.benign], [row for row in rows if row.benign]
    if not concept:
        raise ConfigError(
            "prompts must ask for the concept, got none that do. "
            "Set prompts to lists or files, or give a concept that has tuning lists."
        )
    if len(rows) > MAX_PROMPTS:
        raise ConfigError(
            f"prompts and captions must be at most {MAX_PROMPTS:,}, got {len(rows):,}. "
            "Keep a random sample of them."
        )
    if not benign and not allow_no_benign:
        raise ConfigError(
            "captions must have benign prompts, got none; other content is lost without them. "
            "Set captions, add rows of kind benign to a table, or set allow_few_benign."
        )
    unclean = sum(row.caption == row.text for row in concept)
    if unclean:
        warnings.warn(
            f"{unclean} of {len(concept)} prompts of the concept contain no phrase of erase, and "
            "their images are rewarded for fitting them as they are. Add phrases, or a prompt file "
            "with a column anchor.",
            UncleanCaptionWarning,
            stacklevel=2,
        )
    return concept + benign


def is_table(name: str) -> bool:
    """Return whether a name is that of a file with columns: CSV, TSV or JSON."""
    return Path(name).suffix.lower() in FORMS


def _read_table(
    name: str, erase: Sequence[str], anchors: Sequence[str]
) -> Iterator[TrainingPrompt]:
    """Yield the prompts of a file with the columns prompt, kind, anchor and weight.

    `kind` is unsafe or benign; in a file without it, all prompts are unsafe. `anchor` is the
    caption. Default: `clean_caption`, and the prompt itself for benign ones.
    """
    found = read_prompts(name)
    if found.problems:
        raise FileError(f"{name} {found.problems[0]}. Correct the row, or remove it.")
    has_kinds = any("kind" in row.extra for row in found.rows)
    for row in found.rows:
        place = f"{name} {'record' if name.lower().endswith('.json') else 'line'} {row.line}"
        kind = row.extra.get("kind", "" if has_kinds else "unsafe").strip().lower()
        if kind not in KINDS:
            raise FileError(f"{place}: kind must be unsafe or benign, got {kind!r}. Correct it.")
        benign, text = KINDS[kind], row.prompt
        default = text if benign else clean_caption(text, erase, anchors)
        caption = row.extra.get("anchor", default).strip()
        yield TrainingPrompt(text, caption, benign, _read_weight(row, place))


def _read_weight(row: Prompt, place: str) -> float:
    text = row.extra.get("weight", "1")
    try:
        weight = float(text)
    except ValueError:
        weight = 0.0
    if not 1 / MAX_NUMBER <= weight <= MAX_NUMBER:
        raise FileError(
            f"{place}: weight must be a number above 0, at most {MAX_NUMBER:g}, got {text!r}. "
            "Correct it."
        )
    return weight


def draw_prompts(weights: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Return the indices of `size` prompts, drawn in proportion to their weights.

    A prompt is drawn as often as its share of `size` says, rounded down; the others are drawn at
    random by what is left of the shares, each at most one time more. So no prompt is repeated
    before all of equal weight are drawn.

    Args:
        weights: weight of each prompt, > 0, (n,).
        size: number of draws.
        generator: source of draws.
    """
    share = size * weights.double() / weights.double().sum()
    whole = (share + 1e-9).floor()
    chosen = torch.arange(len(weights)).repeat_interleave(whole.long())
    rest = size - len(chosen)
    if not rest:
        return chosen
    part = (share - whole).clamp(min=0)
    return torch.cat([chosen, torch.multinomial(part, rest, generator=generator)])
