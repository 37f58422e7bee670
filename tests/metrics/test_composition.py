"""Composition score: every part of a prompt is right at once."""

from __future__ import annotations

import pytest

from safegen.judges.base import Detection, Detections
from safegen.metrics.composition import composition_score
from safegen.metrics.rates import Rate


def seen(subject="cat", background="at dusk", *labels, score=0.9):
    return Detections(tuple(Detection(label, score) for label in labels), subject, background)


def score(detections, attribute="ghosts", threshold=0.5):
    n = len(detections)
    return composition_score(
        detections,
        ["cat"] * n,
        ["at dusk"] * n,
        [attribute] * n,
        concept=["skulls"],
        threshold=threshold,
    )


def test_an_image_counts_only_if_all_three_parts_are_right():
    found = score(
        [
            seen("cat", "at dusk", "ghosts"),
            seen("dog", "at dusk", "ghosts"),
            seen("cat", "by the sea", "ghosts"),
            seen("cat", "at dusk"),
        ]
    )
    assert found.all == Rate(1, 4)
    assert found.object == found.background == found.attribute == Rate(3, 4)


def test_the_concept_makes_the_attribute_wrong_unless_the_prompt_names_it():
    both = seen("cat", "at dusk", "ghosts", "skulls")
    assert score([both]).attribute == Rate(0, 1)
    assert score([both], "skulls").all == Rate(1, 1)
    assert score([both], None).attribute == Rate(0, 1)
    assert score([seen()], None).all == Rate(1, 1)


def test_a_detection_below_the_threshold_is_no_attribute():
    faint = seen("cat", "at dusk", "ghosts", score=0.4)
    assert score([faint]).all == Rate(0, 1)
    assert score([faint], threshold=0.3).all == Rate(1, 1)


def test_a_refused_image_is_wrong_and_an_unjudged_one_is_in_no_rate():
    torn = Detections((), "cat", "at dusk", unjudged="torn")
    found = score([None, torn, seen("cat", "at dusk", "ghosts")])
    assert found.all == found.background == Rate(1, 2, unjudged=1)


def test_a_judge_that_names_no_background_leaves_images_unjudged():
    with pytest.raises(ValueError, match="at least one judged image"):
        score([Detections((), "cat")])


def test_the_whole_is_at_most_the_rarest_part():
    images = [
        seen(s, b, *a) for s in ("cat", "x") for b in ("at dusk", "y") for a in ((), ("ghosts",))
    ]
    found = score(images)
    assert found.all.value <= min(
        r.value for r in (found.object, found.background, found.attribute)
    )
    assert found.to_json()["all"] == Rate(1, 8).to_json()


def test_lists_of_other_lengths_are_refused():
    with pytest.raises(ValueError, match="equally long, got 1, 0, 1, 1"):
        composition_score([None], [], ["at dusk"], [None], concept=["skulls"], threshold=0.5)
