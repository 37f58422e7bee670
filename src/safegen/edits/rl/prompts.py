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
    concept: Sequence[str], benign: Sequence[str], *, erase: Sequence[str], anchors: Sequence[str]
) -> list[TrainingPrompt]:
    """Return the prompts of a training: those that ask for the concept first, then benign ones.

    Raises:
        ConfigError: no prompt asks for the concept.
    """
    if not concept:
        raise ConfigError(
            "shielddiff needs prompts that ask for the concept, got none. "
            "Set prompts to lists or text files, or give a concept that has tuning lists."
        )
    return [
        *(TrainingPrompt(t, clean_caption(t, erase, anchors), False) for t in concept),
        *(TrainingPrompt(t, t, True) for t in benign),
    ]
