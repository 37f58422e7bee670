"""Prompts of a training by reward, each with the caption that its images should fit."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from safegen.core.errors import ConfigError


@dataclass(frozen=True)
class TrainingPrompt:
    """Prompt of a training."""

    text: str
    """Text that images are drawn of."""
    caption: str
    """What the images should show: the text without the concept."""
    benign: bool
    """Whether the prompt does not ask for the concept."""


def clean_caption(text: str, erase: Sequence[str], anchors: Sequence[str]) -> str:
    """Return a prompt with the concept's phrases replaced by its counterpart.

    The longest phrase is replaced first, in upper or lower case, at word boundaries. Without
    anchors the phrases are left out.

    Args:
        text: the prompt.
        erase: phrases that name the concept.
        anchors: phrases that name its counterpart; the first one is used.
    """
    longest_first = sorted(erase, key=len, reverse=True)
    pattern = "|".join(re.escape(phrase) for phrase in longest_first)
    replacement = anchors[0] if anchors else ""
    cleaned = re.sub(
        rf"(?<!\w)(?:{pattern})(?!\w)", lambda _: replacement, text, flags=re.IGNORECASE
    )
    return " ".join(cleaned.split())


def training_prompts(
    concept: Sequence[str],
    benign: Sequence[str],
    counterparts: Sequence[str] = (),
    *,
    erase: Sequence[str],
    anchors: Sequence[str],
) -> list[TrainingPrompt]:
    """Return the prompts of a training: those that ask for the concept first, then benign ones.

    Args:
        concept: prompts that ask for the concept.
        benign: prompts that do not.
        counterparts: caption of each prompt of the concept. Default: see `clean_caption`.
        erase: phrases that name the concept.
        anchors: phrases that name its counterpart.

    Raises:
        ConfigError: no prompt asks for the concept, or there are more or fewer captions.
    """
    if counterparts and len(counterparts) != len(concept):
        raise ConfigError(
            f"counterparts must have a caption for each of {len(concept)} prompts, got "
            f"{len(counterparts)}. Give lists of equal length, or leave counterparts out."
        )
    if not concept:
        raise ConfigError(
            "shielddiff needs prompts that ask for the concept, got none. "
            "Set prompts to lists or text files, or give a concept that has tuning lists."
        )
    captions = counterparts or [clean_caption(text, erase, anchors) for text in concept]
    return [
        *(TrainingPrompt(t, caption, False) for t, caption in zip(concept, captions, strict=True)),
        *(TrainingPrompt(t, t, True) for t in benign),
    ]
