"""Judge interface: raw detections per image, and the verdict under labels and a threshold."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, runtime_checkable

from pydantic import Field

from safegen.core.registry import JUDGES, expand_labels, resolve
from safegen.core.text import short_repr

if TYPE_CHECKING:
    from torch import Tensor

    from safegen.judges.images import ImageInputs

Verdict = Literal["unsafe", "safe", "unjudged"]
"""Decision on one image under labels and a threshold; `Detections.verdict` makes it."""

SCORE_FLOOR = 0.2
"""Lowest score of a stored detection, which is the lowest threshold that can be applied."""


@dataclass(frozen=True, slots=True)
class Detection:
    """One object or attribute that a judge detected in an image."""

    label: str
    """One of the judge's labels."""
    score: Annotated[float, Field(ge=0, le=1)]
    """Confidence in [0, 1]."""
    box: tuple[float, float, float, float] | None = None
    """Left, top, right and bottom in pixels of the input image; None for whole-image judges."""

    def __post_init__(self) -> None:
        """Refuse a score outside [0, 1], or NaN: below every threshold, it would count as safe."""
        if not math.isfinite(self.score):
            raise ValueError(f"judge scores must be finite, got {self.score}")
        if not 0 <= self.score <= 1:
            raise ValueError(f"judge scores must be in [0, 1], got {self.score}")


@dataclass(frozen=True, slots=True)
class Detections:
    """Raw output of a judge for one image, independent of labels and threshold."""

    items: tuple[Detection, ...]
    """Detections with a score of at least `SCORE_FLOOR`, best first; empty if unjudged."""
    subject: str | None = None
    """Main object of the image, for judges that recognize it."""
    background: str | None = None
    """Background of the image, for judges that recognize it."""
    unjudged: str | None = None
    """Why the image could not be judged; None if it was judged."""

    def __post_init__(self) -> None:
        """Store the detections as a tuple: an iterator could be read only once."""
        object.__setattr__(self, "items", tuple(self.items))

    def __repr__(self) -> str:
        """Return the best detections in one line, or why there are none."""
        found = [f"{d.label} {d.score:.2f}" for d in self.items[:4]]
        found += [f"and {len(self.items) - 4} more"] if len(self.items) > 4 else []
        return short_repr(Detections, *found, subject=self.subject, unjudged=self.unjudged)

    def contains(self, labels: Collection[str], threshold: float) -> bool | None:
        """Return whether a detection with one of `labels` reaches `threshold`; None if unjudged.

        Args:
            labels: labels of the judge or names of label sets.
            threshold: lowest score that counts.

        Raises:
            ValueError: `threshold` is below the stored scores.
        """
        if not SCORE_FLOOR <= threshold <= 1:
            raise ValueError(f"threshold must be in {SCORE_FLOOR}..1, got {threshold}")
        if self.unjudged is not None:
            return None
        if not self.items:
            return False
        expanded = expand_labels(labels)
        return any(d.label in expanded and d.score >= threshold for d in self.items)

    def verdict(self, labels: Collection[str], threshold: float) -> Verdict:
        """Return the verdict under `labels` and `threshold`; see `contains` for the arguments."""
        contained = self.contains(labels, threshold)
        return "unjudged" if contained is None else "unsafe" if contained else "safe"


class Judge(Protocol):
    """Detector of unsafe content in images, with its labels and threshold.

    Example:
        >>> judge = safegen.load_judge("mini", labels=["skulls"])
        >>> detections = judge.detect(["missing.png"])
        >>> detections[0].unjudged
        "'missing.png' does not exist"
    """

    id: str
    """Name and hash of the weights: two judges with one id make the same detections."""
    label_space: tuple[str, ...]
    """Every label that the judge can detect. It says nothing about labels outside this list."""
    labels: tuple[str, ...]
    """Labels that make an image unsafe, with label sets expanded."""
    threshold: float
    """Lowest score of a detection that makes an image unsafe."""

    def detect(self, images: ImageInputs) -> list[Detections]:
        """Return the raw detections of each image, in order.

        One image is taken as a list of one; files and numpy arrays are read (`ImageInput`).
        An image that cannot be judged carries the reason in `unjudged`; no exception is raised.
        """
        ...

    def __repr__(self) -> str:
        """Return id, labels and threshold in one line."""
        return short_repr(type(self), id=self.id, labels=self.labels, threshold=self.threshold)


@runtime_checkable
class DifferentiableJudge(Judge, Protocol):
    """Judge with a score that has a gradient with respect to the pixels."""

    def score(self, pixels: Tensor) -> Tensor:
        """Return a smooth version of the sum of scores of the labels, (n,).

        Args:
            pixels: (n, 3, h, w) in [-1, 1], on any device.
        """
        ...


def list_differentiable_judges() -> list[str]:
    """Return the names of the judges that have a differentiable score."""
    return [name for name in JUDGES if hasattr(resolve(JUDGES, name, "judge"), "score")]


def judge_images(judge: Judge, images: ImageInputs) -> list[Verdict]:
    """Return the verdict on each image under the judge's labels and threshold."""
    return [d.verdict(judge.labels, judge.threshold) for d in judge.detect(images)]


def check_judge_options(options: dict[str, Any]) -> dict[str, Any]:
    """Return a judge's options unchanged; used as a pydantic validator.

    Raises:
        ValueError: `labels` or `threshold` is among them.
    """
    for key in ("labels", "threshold"):
        if key in options:
            raise ValueError(f"{key} is no option of a judge. Write it next to the judge's name.")
    return options
