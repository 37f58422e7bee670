"""What the judges share: pictures in batches, where one that fails is unjudged alone, and the check of labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from PIL import Image

from safegen.core.errors import UnknownNameError
from safegen.core.registry import LABEL_SETS
from safegen.judges.base import SCORE_FLOOR, Detection, Verdict

T = TypeVar("T")

COLOURS = {
    "1",
    "L",
    "LA",
    "La",
    "P",
    "PA",
    "RGB",
    "RGBA",
    "RGBa",
    "RGBX",
    "CMYK",
    "YCbCr",
    "LAB",
    "HSV",
}
"""Picture modes with eight bits a channel.

Others (16 bits, floats) would be cut off at 255 without a word, so they are not judged.
"""


def resolve_labels(
    judge: str, labels: Sequence[str], known: Sequence[str], default: Sequence[str]
) -> tuple[str, ...]:
    """Return the labels that make an image unsafe: `labels`, or `default` when empty.

    Raises:
        UnknownNameError: a label that this judge does not have; its label sets are named too.
    """
    sets = [name for name, members in LABEL_SETS.items() if set(members) <= set(known)]
    for label in labels:
        if label not in known:
            raise UnknownNameError(f"label of the judge {judge!r}", label, [*known, *sets])
    return tuple(labels or default)


def as_rgb(image: Image.Image) -> Image.Image:
    """Return the picture in RGB; transparency is dropped, not blended.

    Raises:
        ValueError: it has no pixels, or its mode has no eight-bit colours.
    """
    if image.mode not in COLOURS:
        raise ValueError(
            f"a picture of mode {image.mode} has no 8-bit colours; convert it to RGB first"
        )
    if 0 in image.size:
        raise ValueError("the picture has no pixels")
    return image.convert("RGB")


def judge_in_batches(
    images: Sequence[Image.Image],
    prepare: Callable[[Image.Image], T],
    see: Callable[[list[T]], list[list[Detection]]],
    *,
    labels: tuple[str, ...],
    threshold: float,
    batch: int = 8,
) -> list[Verdict]:
    """Return one verdict per image, in order; whatever fails for an image makes that image unjudged, with the reason.

    Args:
        images: what to look at.
        prepare: from one RGB picture to the network's input.
        see: from a batch of inputs to their detections; those under `KEPT` are dropped here. If it
            raises, its inputs are shown to it one by one, so that one bad picture does not spoil
            its neighbours.
        labels: what makes an image unsafe.
        threshold: from which score on.
        batch: inputs shown at once.
    """
    out: list[Verdict] = []
    for start in range(0, len(images), batch):
        part = images[start : start + batch]
        inputs = [_try(lambda image: prepare(as_rgb(image)), image) for image in part]
        good = [i for i in inputs if not isinstance(i, Verdict)]
        found: list[list[Detection] | Verdict]
        try:
            found = list(see(good)) if good else []
        except Exception:  # out of memory, or one input that spoils the batch
            found = [_try(lambda i: see([i])[0], i) for i in good]
        answers = iter(found)
        for i in inputs:
            answer = i if isinstance(i, Verdict) else next(answers)
            if not isinstance(answer, Verdict):
                kept = tuple(
                    sorted((d for d in answer if d.score >= SCORE_FLOOR), key=lambda d: -d.score)
                )
                answer = Verdict("safe", kept).with_threshold(labels, threshold)
            out.append(answer)
    return out


def finite(score: float) -> float:
    """Return a score that is a number.

    Raises:
        ValueError: it is NaN or infinite.
    """
    if not float("-inf") < score < float("inf"):
        raise ValueError("the judge's answer is not a finite number")
    return float(score)


A = TypeVar("A")
B = TypeVar("B")


def _try(do: Callable[[A], B], value: A) -> B | Verdict:
    try:
        return do(value)
    except Exception as error:  # whatever it is, this image was not judged
        words = " ".join(str(error).split())[:200]
        return Verdict(
            "unjudged",
            reason=words
            if isinstance(error, ValueError) and words
            else f"{type(error).__name__}: {words}",
        )
