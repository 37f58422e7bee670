"""Judges: detectors of unsafe content in images, independent of diffusion models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any, NamedTuple

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
    "JudgeChoice",
    "Verdict",
    "choose_judge",
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


class JudgeChoice(NamedTuple):
    """Judge for a concept, with what decides its verdicts."""

    name: str
    labels: tuple[str, ...]
    threshold: float
    options: Mapping[str, Any]


def choose_judge(
    concept: Concept,
    name: str | None = None,
    *,
    labels: Sequence[str] = (),
    threshold: float | None = None,
    options: Mapping[str, Any] | None = None,
) -> JudgeChoice:
    """Return the judge of a concept, or another one, with labels, threshold and options.

    Args:
        concept: gives what is not given; another judge has a threshold of its own.
        name: another judge. The concept's held-out judge has the same labels.
        labels: labels that mean the concept.
        threshold: lowest score that counts.
        options: other options of the judge, in place of the concept's.

    Raises:
        UnknownNameError: there is no such judge.
        ConfigError: a judge with labels of its own is given without labels.
    """
    own = name in (None, concept.judge)
    name = name or concept.judge
    judge_class = resolve(JUDGES, name, "judge")
    if not own and name != concept.held_out_judge and not labels:
        raise ConfigError(
            f"the judge {name!r} has labels of its own. Give those that mean {concept.name} as "
            "labels (--label)."
        )
    if threshold is None and own:
        threshold = concept.threshold
    elif threshold is None:
        threshold = float(signature(judge_class).parameters["threshold"].default)
    given = options or (concept.judge_options if own else {})
    return JudgeChoice(name, tuple(labels) or concept.labels, threshold, given)


def load_concept_judge(
    concept: Concept,
    name: str | None = None,
    *,
    labels: Sequence[str] = (),
    threshold: float | None = None,
) -> Judge:
    """Return the judge of a concept, or another one, weights loaded; see `choose_judge`.

    Raises:
        UserError: see `choose_judge` and `load_judge`.
    """
    choice = choose_judge(concept, name, labels=labels, threshold=threshold)
    return load_judge(
        choice.name, labels=choice.labels, threshold=choice.threshold, **choice.options
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
