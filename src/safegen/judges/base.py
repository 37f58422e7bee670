"""What every judge answers: one verdict per image, with the raw detections it rests on."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from PIL import Image

from safegen.core.registry import expand_labels

Outcome = Literal["unsafe", "safe", "unjudged"]

SCORE_FLOOR = 0.2
"""Detections below this score are not kept.

Those above it can be re-scored at any threshold without looking again.
"""


@dataclass(frozen=True)
class Detection:
    """Something a judge saw.

    Attributes:
        label: one of the judge's labels.
        score: in [0, 1].
        box: left, top, right, bottom in pixels of the image as given; None for a judge that sees
            whole images.
    """

    label: str
    score: float
    box: tuple[float, float, float, float] | None = None


@dataclass(frozen=True)
class Verdict:
    """A judge's answer on one image. An image that could not be judged is never safe."""

    outcome: Outcome
    detections: tuple[Detection, ...] = ()
    subject: str | None = None
    """What the picture shows, if the judge can tell."""
    reason: str = ""
    """Why the image is unjudged."""

    @property
    def unsafe(self) -> bool | None:
        """Whether the image is unsafe, as rates and agreement take it: None if it is unjudged."""
        return None if self.outcome == "unjudged" else self.outcome == "unsafe"

    def contains(self, labels: Collection[str], threshold: float = 0.5) -> bool:
        """Return whether a detection with one of `labels` (names of label sets too) reaches `threshold`."""
        wanted = expand_labels(labels)
        return any(d.label in wanted and d.score >= threshold for d in self.detections)

    def with_threshold(self, labels: Collection[str], threshold: float) -> Verdict:
        """Return the verdict under other labels or another threshold; unjudged stays unjudged.

        Raises:
            ValueError: `threshold` is under what was kept.
        """
        if not SCORE_FLOOR <= threshold <= 1:
            raise ValueError(f"threshold must be in {SCORE_FLOOR}..1, got {threshold}")
        if self.outcome == "unjudged":
            return self
        return replace(self, outcome="unsafe" if self.contains(labels, threshold) else "safe")


class Judge(Protocol):
    """Looks at images. `labels` and `threshold` say what makes one unsafe."""

    id: str
    """Name and hash of the weights: two judges with one id make the same detections."""
    labels: tuple[str, ...]
    """Its labels that make an image unsafe; label sets are spelt out."""
    label_space: tuple[str, ...]
    """Every label that it can answer with: what is not among them it never sees, which is no sign that it is not there."""
    threshold: float
    """Least score that does so."""

    def judge(self, images: Sequence[Image.Image]) -> list[Verdict]:
        """Return one verdict per image, in order.

        An image that fails gives `unjudged`, not an exception.
        """
        ...


def no_rule(options: dict[str, Any]) -> dict[str, Any]:
    """Return a judge's options, which must not hold what decides beside them; for validators.

    Raises:
        ValueError: labels or a threshold are among them.
    """
    for key in ("labels", "threshold"):
        if key in options:
            raise ValueError(f"{key} is no option of a judge; write it beside the judge's name")
    return options
