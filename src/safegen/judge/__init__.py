"""Judges look at images and answer verdicts; they know nothing of diffusion models."""

from __future__ import annotations

from collections.abc import Sequence

from safegen.errors import BadSetting
from safegen.judge.base import KEPT, Detection, Judge, Outcome, Verdict
from safegen.tables import JUDGES, resolve

__all__ = ["KEPT", "Detection", "Judge", "Outcome", "Verdict", "load_judge"]


def load_judge(name: str, *, labels: Sequence[str] = (), threshold: float = 0.5) -> Judge:
    """Return the judge called `name`; `labels` (all its unsafe ones when empty) make an image unsafe from `threshold` on.

    Raises:
        UnknownName: no such judge or label.
        BadSetting: the threshold is outside what detections are kept for.
    """
    if not KEPT <= threshold <= 1:
        raise BadSetting(f"the judge's threshold must be in {KEPT}..1, got {threshold}")
    judge: Judge = resolve(JUDGES, name, "judge")(labels=tuple(labels), threshold=threshold)
    return judge
