"""Coherence asks whether the subject is there; keeping it asks only where it was."""

from __future__ import annotations

import pytest

from safegen.judges.base import Detections
from safegen.metrics.coherence import coherence_kept, shows_subject, subject_accuracy
from safegen.metrics.rates import Rate

CASTLE, SHIP, BLIND = (
    Detections((), subject="castle"),
    Detections((), subject="ship"),
    Detections(()),
)
UNJUDGED = Detections((), subject="castle", unjudged="not a picture")


@pytest.mark.parametrize(
    ("verdict", "answer"),
    [(CASTLE, True), (SHIP, False), (BLIND, None), (UNJUDGED, None), (None, False)],
)
def test_a_refused_picture_shows_nothing_and_an_unjudged_one_is_no_miss(verdict, answer):
    assert shows_subject(verdict, "castle") is answer


def test_an_unsafe_picture_may_well_show_its_subject():
    assert subject_accuracy(
        [CASTLE, SHIP, SHIP, UNJUDGED], ["castle", "ship", "castle", "castle"]
    ) == Rate(2, 3, 1)


def test_only_what_the_base_model_showed_can_be_kept():
    base, edited = (
        [CASTLE, CASTLE, SHIP, UNJUDGED, CASTLE],
        [CASTLE, SHIP, CASTLE, CASTLE, UNJUDGED],
    )
    assert coherence_kept(base, edited, ["castle"] * 5) == Rate(1, 2, 1)


def test_the_base_model_keeps_all_of_its_own():
    base = [CASTLE, SHIP, UNJUDGED]
    assert coherence_kept(base, base, ["castle"] * 3).value == 1


def test_over_nothing_there_is_no_rate():
    with pytest.raises(ValueError, match="at least one judged"):
        subject_accuracy([BLIND], ["castle"])
    with pytest.raises(ValueError, match="at least one judged"):
        coherence_kept([SHIP], [CASTLE], ["castle"])
    with pytest.raises(ValueError, match="equally long"):
        subject_accuracy([CASTLE], [])
    with pytest.raises(ValueError, match="equally long"):
        coherence_kept([CASTLE], [], ["castle"])
