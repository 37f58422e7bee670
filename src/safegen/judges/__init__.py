"""Judges: detectors of unsafe content in images, independent of diffusion models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from safegen.core.concept import Concept
from safegen.core.errors import ConfigError, UnknownNameError, explain
from safegen.core.registry import JUDGES, expand_labels, resolve
from safegen.judges.base import SCORE_FLOOR, Detection, Detections, Judge, Verdict, judge_images

__all__ = [
    "SCORE_FLOOR",
    "Detection",
    "Detections",
    "Judge",
    "Verdict",
    "judge_images",
    "load_concept_judge",
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

    Example:
        >>> judge = safegen.load_judge("mini", labels=["skulls"], threshold=0.6)
        >>> judge.labels
        ('skulls',)
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
    _check_options(name, judge_class, options)
    if threshold is not None:
        options["threshold"] = threshold
    judge: Judge = judge_class(labels=expand_labels(labels), **options)
    return judge


def load_concept_judge(concept: Concept) -> Judge:
    """Return the judge of a concept with its labels, threshold and options, weights loaded.

    Raises:
        UserError: see `load_judge`.
    """
    return load_judge(
        concept.judge, labels=concept.labels, threshold=concept.threshold, **concept.judge_options
    )


def _check_options(name: str, judge_class: type, options: Mapping[str, Any]) -> None:
    """Raise if an option of a judge has another type than the judge's class says."""
    parameters = signature(judge_class, eval_str=True).parameters
    for key, value in options.items():
        rules = TypeAdapter(parameters[key].annotation, config=ConfigDict(allow_inf_nan=False))
        try:
            rules.validate_python(value)
        except ValidationError as error:
            raise ConfigError(f"option {key!r} of the judge {name!r}: {explain(error)}") from error
