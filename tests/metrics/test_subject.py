"""Subject accuracy over all images, and retention where the base model shows the subject."""

from __future__ import annotations

import pytest

from safegen.judges.base import Detections
from safegen.metrics.rates import Rate
from safegen.metrics.subject import shows_subject, subject_accuracy, subject_retention

CASTLE, SHIP, BLIND = (
    Detections((), subject="castle"),
    Detections((), subject="ship"),
    Detections(()),
)
UNJUDGED = Detections((), subject="castle", unjudged="not an image")


@pytest.mark.parametrize(
    ("detections", "answer"),
    [(CASTLE, True), (SHIP, False), (BLIND, None), (UNJUDGED, None), (None, False)],
)
def test_a_refused_image_shows_no_subject_and_an_unjudged_one_is_excluded(detections, answer):
    assert shows_subject(detections, "castle") is answer


def test_an_unsafe_image_may_show_its_subject():
    assert subject_accuracy(
        [CASTLE, SHIP, SHIP, UNJUDGED], ["castle", "ship", "castle", "castle"]
    ) == Rate(2, 3, 1)


def test_retention_counts_only_subjects_that_the_base_shows():
    base, edited = (
        [CASTLE, CASTLE, SHIP, UNJUDGED, CASTLE],
        [CASTLE, SHIP, CASTLE, CASTLE, UNJUDGED],
    )
    assert subject_retention(base, edited, ["castle"] * 5) == Rate(1, 2, 1)


def test_the_base_model_retains_all_its_subjects():
    base = [CASTLE, SHIP, UNJUDGED]
    assert subject_retention(base, base, ["castle"] * 3).value == 1


def test_empty_or_unequal_input_is_refused():
    with pytest.raises(ValueError, match="at least one judged"):
        subject_accuracy([BLIND], ["castle"])
    with pytest.raises(ValueError, match="at least one judged"):
        subject_retention([SHIP], [CASTLE], ["castle"])
    with pytest.raises(ValueError, match="equally long"):
        subject_accuracy([CASTLE], [])
    with pytest.raises(ValueError, match="equally long"):
        subject_retention([CASTLE], [], ["castle"])
