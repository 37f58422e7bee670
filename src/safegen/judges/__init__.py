"""Judges look at images and answer verdicts; they know nothing of diffusion models."""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from typing import Any

from safegen.core.errors import ConfigError, UnknownNameError
from safegen.core.registry import JUDGES, expand_labels, resolve
from safegen.judges.base import SCORE_FLOOR, Detection, Detections, Judge, Verdict, judge_images

__all__ = [
    "SCORE_FLOOR",
    "Detection",
    "Detections",
    "Judge",
    "Verdict",
    "judge_images",
    "load_judge",
]


def load_judge(
    name: str, *, labels: Sequence[str] = (), threshold: float | None = None, **options: Any
) -> Judge:
    """Return the judge called `name`, ready to look.

    Args:
        name: a key of `tables.JUDGES`.
        labels: what makes an image unsafe, labels of the judge or names of label sets; all its
            unsafe ones when empty.
        threshold: from which score on; the judge's own when not given.
        options: what this judge takes besides (its weights, channel order, prompts ...); see
            docs/reference/judges.inc.

    Raises:
        UnknownNameError: no such judge, label or option.
        ConfigError: the threshold is outside what detections are kept for, or an option breaks its
            rule or is missing.
        FileError: the weights cannot be used.
        MissingExtraError: a library that this judge needs is not installed.
    """
    if threshold is not None and not SCORE_FLOOR <= threshold <= 1:
        raise ConfigError(f"the judge's threshold must be in {SCORE_FLOOR}..1, got {threshold}")
    made = resolve(JUDGES, name, "judge")
    known = [key for key in signature(made).parameters if key not in {"labels", "threshold"}]
    for key in options:
        if not known:
            raise ConfigError(f"the judge {name!r} takes no options, got {key!r}; leave it out")
        if key not in known:
            raise UnknownNameError(f"option of the judge {name!r}", key, known)
    if threshold is not None:
        options["threshold"] = threshold
    judge: Judge = made(labels=expand_labels(labels), **options)
    return judge
