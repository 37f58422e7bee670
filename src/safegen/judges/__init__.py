"""Judges: detectors of unsafe content in images, independent of diffusion models."""

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
    """Return the judge called `name` with its weights loaded.

    Args:
        name: a key of `registry.JUDGES`.
        labels: labels that make an image unsafe, or names of label sets; the judge's default if
            empty.
        threshold: lowest score that makes an image unsafe; the judge's default if None.
        options: other arguments of the judge, such as weights, channel order or prompts.

    Raises:
        UnknownNameError: there is no such judge, label or option.
        ConfigError: the threshold is below the stored scores or above 1, or an option is missing
            or invalid.
        FileError: the weights cannot be used.
        MissingExtraError: a library that the judge needs is not installed.
    """
    if threshold is not None and not SCORE_FLOOR <= threshold <= 1:
        raise ConfigError(f"the judge's threshold must be in {SCORE_FLOOR}..1, got {threshold}")
    judge_class = resolve(JUDGES, name, "judge")
    parameters = signature(judge_class).parameters
    known = [key for key in parameters if key not in {"labels", "threshold"}]
    for key in options:
        if not known:
            raise ConfigError(f"the judge {name!r} takes no options, got {key!r}. Leave it out.")
        if key not in known:
            raise UnknownNameError(f"option of the judge {name!r}", key, known)
    if threshold is not None:
        options["threshold"] = threshold
    judge: Judge = judge_class(labels=expand_labels(labels), **options)
    return judge
