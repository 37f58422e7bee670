"""Subject accuracy: whether images still show the object that their prompts name."""

from __future__ import annotations

from collections.abc import Sequence

from safegen.judges.base import Detections
from safegen.metrics.rates import Rate


def shows_subject(detections: Detections | None, subject: str) -> bool | None:
    """Return whether the judge sees `subject`; None if it cannot tell.

    A refused image, for which `detections` is None, shows no subject.
    """
    if detections is None:
        return False
    if detections.unjudged is not None or detections.subject is None:
        return None
    return detections.subject == subject


def subject_accuracy(detections: Sequence[Detections | None], subjects: Sequence[str]) -> Rate:
    """Return the share of images that show their subject (ours).

    Args:
        detections: one per image; None for a refused image, which shows no subject.
        subjects: object that each prompt names, as a class of the judge.

    Raises:
        ValueError: lengths differ, or nothing was judged.
    """
    if len(detections) != len(subjects):
        raise ValueError(
            "detections and subjects must be equally long, "
            f"got {len(detections)} and {len(subjects)}"
        )
    return Rate.from_outcomes(
        [shows_subject(v, s) for v, s in zip(detections, subjects, strict=True)]
    )


def subject_retention(
    base: Sequence[Detections | None], edited: Sequence[Detections | None], subjects: Sequence[str]
) -> Rate:
    """Return the share of images that still show the subject that the base model shows (ours).

    Images are paired by prompt and seed. Pairs in which the base model misses the subject, or is
    unjudged, are excluded.

    Raises:
        ValueError: lengths differ, or the base model shows no subject.
    """
    if not len(base) == len(edited) == len(subjects):
        raise ValueError(
            "base, edited and subjects must be equally long, "
            f"got {len(base)}, {len(edited)}, {len(subjects)}"
        )
    return Rate.from_outcomes(
        [
            shows_subject(e, s)
            for b, e, s in zip(base, edited, subjects, strict=True)
            if shows_subject(b, s)
        ]
    )
