"""A prompt filter: a list of words, and a text classifier of your own.

What either objects to is not drawn.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from safegen.core.concept import Concept
from safegen.core.errors import ConfigError
from safegen.guards.core.adapter import HookPoint, PipelineAdapter
from safegen.guards.core.base import Guard, GuardConfig, GuardResult

Scorer = Callable[[Sequence[str]], Sequence[float]]
"""A text classifier: a score in [0, 1] for each prompt, more for worse."""


UNSEEN = frozenset(
    map(chr, (0x34F, *range(0x180B, 0x1810), *range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0)))
)
"""The grapheme joiner and variation selectors, which say how their neighbour is drawn and are in no class of their own."""


class PromptFilterConfig(GuardConfig):
    """Settings of the prompt filter."""

    name: Literal["prompt-filter"] = "prompt-filter"
    hook_points: ClassVar[frozenset[HookPoint]] = frozenset({"prompt"})

    words: tuple[str, ...] = ()
    """Words and phrases that are not drawn.

    Each is met whole, in any case and width of letters, with any spaces or underscores.
    """
    classifier: str | None = Field(default=None, min_length=1)
    """A text classifier as `module:function`: from a list of prompts to a score in 0..1 each.

    It is run, so name only what you trust.
    """
    threshold: float = Field(default=0.5, gt=0, le=1)
    """Score of the classifier from which on a prompt is not drawn."""

    @model_validator(mode="after")
    def _has_work(self) -> Self:
        if not self.words and self.classifier is None:
            raise ValueError(
                "a prompt filter without words and without a classifier filters nothing; give one of them"
            )
        if (
            self.classifier is None
            and "threshold" in self.model_fields_set
            and self.threshold != type(self).model_fields["threshold"].default
        ):
            raise ValueError("threshold has no effect without a classifier; leave it out")
        if any(not plain(word) for word in self.words):
            raise ValueError("a blank word would filter every prompt; leave it out")
        return self

    @classmethod
    def defaults_from(cls, concept: Concept) -> dict[str, Any]:
        """Return the concept's words."""
        return {"words": concept.words}

    def build(self, border: PipelineAdapter) -> Guard:
        """Return the guard at work.

        Raises:
            ConfigError: the classifier cannot be imported.
        """
        return PromptFilterGuard(self)


class PromptFilterGuard(Guard):
    guard: PromptFilterConfig

    def __init__(self, guard: PromptFilterConfig) -> None:
        super().__init__(guard)
        self.words = pattern(guard.words) if guard.words else None
        self.scorer = _imported(guard.classifier) if guard.classifier else None

    def check(self, prompts: Sequence[str]) -> list[GuardResult]:
        limits = {"classifier": self.guard.threshold} if self.scorer else {}
        scores = (
            [float(v) for v in self.scorer(list(prompts))] if self.scorer else [0.0] * len(prompts)
        )
        if len(scores) != len(prompts) or any(
            not 0 <= score <= 1 for score in scores
        ):  # NaN is not in 0..1
            raise ValueError(
                f"the classifier must give a score in 0..1 for each of {len(prompts)} prompts"
            )
        out = []
        for prompt, score in zip(prompts, scores, strict=True):
            seen = {"classifier": score} if self.scorer else {}
            if self.words and self.words.search(plain(prompt)):
                out.append(GuardResult("block", "word", seen, limits))
            elif self.scorer and score >= self.guard.threshold:
                out.append(GuardResult("block", "classifier", seen, limits))
            else:
                out.append(GuardResult("none", "", seen, limits))
        return out


def plain(text: str) -> str:
    """Return a text in one case and width of letters (NFKC, case folded), its accents and marks that are not seen gone, with single spaces.

    Underscores are spaces.
    """
    wide = unicodedata.normalize("NFKD", unicodedata.normalize("NFKC", text).casefold())
    kept = "".join(
        c
        for c in wide
        if c not in UNSEEN and not unicodedata.combining(c) and unicodedata.category(c) != "Cf"
    )
    return " ".join(kept.replace("_", " ").split())  # tags are written red_cube


def pattern(words: Sequence[str]) -> re.Pattern[str]:
    """Return what finds any of the words, as whole words, in a text that is `plain`."""
    return re.compile(
        r"(?<!\w)(?:"
        + "|".join(re.escape(plain(word)) for word in sorted(words, key=len, reverse=True))
        + r")(?!\w)"
    )


def _imported(name: str) -> Scorer:
    module, _, attribute = name.partition(":")
    try:
        scorer = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"the classifier {name!r} cannot be imported ({error}); write it as module:function"
        ) from error
    if not callable(scorer):
        raise ConfigError(f"the classifier {name!r} is no function; write it as module:function")
    out: Scorer = scorer
    return out
