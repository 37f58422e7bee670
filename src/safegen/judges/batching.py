"""Batched detection with per-image failures, and label checks shared by all judges."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from PIL import Image

from safegen.core.errors import UnknownNameError
from safegen.core.registry import LABEL_SETS
from safegen.judges.base import SCORE_FLOOR, Detection, Detections
from safegen.judges.images import ImageInputs, as_rgb, list_images

A = TypeVar("A")
B = TypeVar("B")


def resolve_labels(
    judge: str, labels: Sequence[str], known: Sequence[str], default: Sequence[str]
) -> tuple[str, ...]:
    """Return the labels that make an image unsafe: `labels`, or `default` if empty.

    Raises:
        UnknownNameError: the judge has no such label; the message also lists its label sets.
    """
    sets = [name for name, members in LABEL_SETS.items() if set(members) <= set(known)]
    for label in labels:
        if label not in known:
            raise UnknownNameError(f"label of the judge {judge!r}", label, [*known, *sets])
    return tuple(labels or default)


def detect_in_batches(
    images: ImageInputs,
    prepare: Callable[[Image.Image], A],
    detect: Callable[[list[A]], Sequence[Sequence[Detection] | Detections]],
    *,
    batch_size: int = 8,
) -> list[Detections]:
    """Return the detections of each image, in order; an image that fails is unjudged.

    Args:
        images: one image to judge or several: Pillow images, files or arrays.
        prepare: turns one RGB image into the network's input.
        detect: turns a batch of inputs into their detections; those below `SCORE_FLOOR` are
            dropped. If it raises, it is called again on each input separately, so one bad image
            does not affect its batch.
        batch_size: inputs per call of `detect`.
    """
    results: list[Detections] = []
    images = list_images(images)
    for start in range(0, len(images), batch_size):
        prepared = [
            _attempt(lambda image: prepare(as_rgb(image)), image)
            for image in images[start : start + batch_size]
        ]
        inputs = [value for value in prepared if not isinstance(value, Detections)]
        outputs: Sequence[Sequence[Detection] | Detections]
        try:
            outputs = detect(inputs) if inputs else []
        except Exception:  # out of memory, or one bad input
            outputs = [_attempt(lambda value: detect([value])[0], value) for value in inputs]
        remaining = iter(outputs)
        for value in prepared:
            output = value if isinstance(value, Detections) else next(remaining)
            results.append(output if isinstance(output, Detections) else filter_by_floor(output))
    return results


def filter_by_floor(
    detections: Sequence[Detection], subject: str | None = None, background: str | None = None
) -> Detections:
    """Return the detections with a score of at least `SCORE_FLOOR`, best first."""
    stored = (d for d in detections if d.score >= SCORE_FLOOR)
    return Detections(tuple(sorted(stored, key=lambda d: -d.score)), subject, background)


def check_finite(score: float) -> float:
    """Return `score` if it is finite.

    Raises:
        ValueError: `score` is NaN or infinite.
    """
    if not float("-inf") < score < float("inf"):
        raise ValueError(f"judge scores must be finite, got {score}")
    return float(score)


def _attempt(function: Callable[[A], B], value: A) -> B | Detections:
    """Return `function(value)`, or unjudged detections with the reason if it raises."""
    try:
        return function(value)
    except Exception as error:  # any failure leaves the image unjudged
        message = " ".join(str(error).split())[:200]
        if not isinstance(error, ValueError) or not message:
            message = f"{type(error).__name__}: {message}"
        return Detections((), unjudged=message)
