"""Judges look at images and answer verdicts; they know nothing of diffusion models."""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from typing import Any

from safegen.core.errors import BadSetting, UnknownName
from safegen.core.registry import JUDGES, expand_labels, resolve
from safegen.judges.base import KEPT, Detection, Judge, Outcome, Verdict

__all__ = ["KEPT", "Detection", "Judge", "Outcome", "Verdict", "load_judge"]


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
            docs/judges.md.

    Raises:
        UnknownName: no such judge, label or option.
        BadSetting: the threshold is outside what detections are kept for, or an option breaks its
            rule or is missing.
        BadFile: the weights cannot be used.
        MissingExtra: a library that this judge needs is not installed.
    """
    if threshold is not None and not KEPT <= threshold <= 1:
        raise BadSetting(f"the judge's threshold must be in {KEPT}..1, got {threshold}")
    made = resolve(JUDGES, name, "judge")
    known = [key for key in signature(made).parameters if key not in {"labels", "threshold"}]
    for key in options:
        if not known:
            raise BadSetting(f"the judge {name!r} takes no options, got {key!r}; leave it out")
        if key not in known:
            raise UnknownName(f"option of the judge {name!r}", key, known)
    if threshold is not None:
        options["threshold"] = threshold
    judge: Judge = made(labels=expand_labels(labels), **options)
    return judge
