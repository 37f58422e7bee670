"""Prompt filter: stops prompts by a list of words, by a text classifier, or both."""

from __future__ import annotations

import html
import re
import unicodedata
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from safegen.core.concept import Concept
from safegen.core.errors import ConfigError, UnusedSettingWarning
from safegen.guards.core.adapter import HookPoint, PipelineAdapter
from safegen.guards.core.base import Guard, GuardConfig
from safegen.guards.core.result import GuardResult, InvalidResultError

Classifier = Callable[[Sequence[str]], Sequence[float]]
"""Text classifier: returns one score in [0, 1] per prompt, higher for worse."""
INVISIBLE = frozenset(
    map(chr, (0x34F, *range(0x180B, 0x1810), *range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0)))
)
"""Grapheme joiner and variation selectors, which no Unicode category covers."""


class PromptFilterConfig(GuardConfig):
    """Settings of the prompt filter."""

    name: Literal["prompt-filter"] = "prompt-filter"
    hook_points: ClassVar[frozenset[HookPoint]] = frozenset({"prompt"})

    words: tuple[str, ...] = ()
    """Words and phrases that stop a prompt. Whole words match, in any case, width and spacing."""
    classifier: str | None = Field(default=None, min_length=1)
    """Text classifier as `module:function`, called with a list of prompts. Its code is executed."""
    threshold: float = Field(default=0.5, gt=0, le=1)
    """Score of the classifier from which on a prompt is stopped."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.words and self.classifier is None:
            raise ValueError("words or classifier must be given. Without both it filters nothing.")
        if any(not normalize(word) for word in self.words):
            raise ValueError("words must not be blank. A blank word would stop every prompt.")
        default = type(self).model_fields["threshold"].default
        if self.classifier is None and self.threshold != default:
            warnings.warn(
                "prompt-filter: threshold has no effect without a classifier",
                UnusedSettingWarning,
                stacklevel=2,
            )
        return self

    @classmethod
    def defaults_from(cls, concept: Concept) -> dict[str, Any]:
        """Return the concept's phrases as words."""
        return {"words": concept.words}

    def build(self, adapter: PipelineAdapter) -> Guard:
        """Return the guard.

        Raises:
            ConfigError: the classifier cannot be imported.
        """
        return PromptFilterGuard(self)


class PromptFilterGuard(Guard):
    """Guard that stops prompts."""

    config: PromptFilterConfig

    def __init__(self, config: PromptFilterConfig) -> None:
        super().__init__(config)
        self.pattern = compile_pattern(config.words) if config.words else None
        self.classifier = _import_classifier(config.classifier) if config.classifier else None

    def check_prompts(self, prompts: Sequence[str]) -> list[GuardResult]:
        """Return one result per prompt, by its words and the classifier's score."""
        if self.classifier is None:
            return [self._result(prompt, None) for prompt in prompts]
        scores = [float(v) for v in self.classifier(list(prompts))]
        if len(scores) != len(prompts) or any(not 0 <= v <= 1 for v in scores):  # NaN fails too
            raise InvalidResultError(
                f"the classifier must return a score in [0, 1] for each of {len(prompts)} prompts"
            )
        return [self._result(p, score) for p, score in zip(prompts, scores, strict=True)]

    def _result(self, prompt: str, score: float | None) -> GuardResult:
        threshold = self.config.threshold
        reason = ""
        if self.pattern and any(map(self.pattern.search, readings(prompt))):
            reason = "word"
        elif score is not None and score >= threshold:
            reason = "classifier"
        action: Literal["block", "none"] = "block" if reason else "none"
        if score is None:
            return GuardResult(action, reason)
        return GuardResult(action, reason, {"classifier": score}, {"classifier": threshold})


def readings(text: str) -> set[str]:
    """Return a normalized text in the ways in which pipelines and tokenizers read it.

    Some leave out control characters and other invisible ones, some split words there. Some
    resolve HTML's character references, twice.
    """
    texts = {text, html.unescape(html.unescape(text))}
    return {normalize(each, gap=gap) for each in texts for gap in ("", " ")}


def normalize(text: str, *, gap: str = "") -> str:
    """Return a text in NFKC, case-folded, without accents and invisible marks, with single spaces.

    Underscores become spaces, since tags are written red_cube.

    Args:
        text: the text.
        gap: what takes the place of an invisible character.
    """
    decomposed = unicodedata.normalize("NFKD", unicodedata.normalize("NFKC", text).casefold())
    visible = "".join(
        gap if is_invisible(c) else c for c in decomposed if not unicodedata.combining(c)
    )
    return " ".join(visible.replace("_", " ").split())


def is_invisible(char: str) -> bool:
    """Return whether a character is a control, format, private or unassigned one, no line break."""
    return char in INVISIBLE or (unicodedata.category(char)[0] == "C" and char not in "\t\n\r")


def compile_pattern(words: Sequence[str]) -> re.Pattern[str]:
    """Return a pattern that finds any of the words, as whole words, in a normalized text.

    Digits end a word of letters, since CLIP's tokenizers split them off.
    """
    longest_first = sorted(map(normalize, words), key=len, reverse=True)
    alternatives = "|".join(
        rf"(?<!{_inner(word[0])}){re.escape(word)}(?!{_inner(word[-1])})" for word in longest_first
    )
    return re.compile(alternatives)


def _inner(end: str) -> str:
    """Return a pattern of the characters that go on with a word which ends here."""
    return r"[^\W\d]" if end.isalpha() else r"\w"


def _import_classifier(name: str) -> Classifier:
    module, _, attribute = name.partition(":")
    try:
        classifier = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"classifier must be module:function, got {name!r}. Import failed: {error}"
        ) from error
    if not callable(classifier):
        raise ConfigError(f"classifier must be module:function, got {name!r}. It is no function.")
    function: Classifier = classifier
    return function
