"""The removal table holds the removal rate of each label and of all labels together."""

from __future__ import annotations

import json
import random

import pytest

from safegen.judges.base import Detection, Detections
from safegen.metrics.rates import Removal, removal_rate
from safegen.metrics.removal import TOTAL_LABEL, Undefined, count_detections, removal_table

LABELS = ("skulls", "fire")
UNJUDGED = Detections((), unjudged="not an image")


def detections(*items: tuple[str, float]) -> Detections:
    return Detections(tuple(Detection(label, score) for label, score in items))


def _table(base, edited, **options):
    return removal_table(base, edited, range(len(base)), LABELS, **({"threshold": 0.5} | options))


def _random(seed: int, n: int = 40):
    draw = random.Random(seed)
    return [
        detections(*((draw.choice(LABELS), draw.random()) for _ in range(draw.randrange(4))))
        for _ in range(n)
    ]


def test_units_instance_and_image_give_two_tables():
    base, edited = (
        [detections(("skulls", 0.9), ("skulls", 0.8), ("fire", 0.7))],
        [detections(("skulls", 0.6))],
    )
    parts, images = _table(base, edited), _table(base, edited, unit="image")
    assert {k: v.value for k, v in parts.items()} == {
        "skulls": 0.5,
        "fire": 1,
        TOTAL_LABEL: pytest.approx(2 / 3),
    }
    assert {k: v.value for k, v in images.items()} == {"skulls": 0, "fire": 1, TOTAL_LABEL: 0}


@pytest.mark.parametrize("seed", range(3))
def test_each_row_is_the_removal_rate_of_its_counts(seed):
    base, edited = _random(seed), _random(seed + 100)
    table = _table(base, edited, seed=7)
    for name, labels in {"skulls": ["skulls"], "fire": ["fire"], TOTAL_LABEL: LABELS}.items():
        before, after = (
            [sum(d.label in labels and d.score >= 0.5 for d in v.items) for v in side]
            for side in (base, edited)
        )
        assert table[name] == removal_rate(before, after, range(len(base)), seed=7)
    assert table[TOTAL_LABEL].before == table["skulls"].before + table["fire"].before


def test_a_score_equal_to_the_threshold_counts():
    assert [
        count_detections(detections(("fire", 0.5)), ["fire"], threshold=t) for t in (0.4, 0.5, 0.6)
    ] == [1, 1, 0]


def test_a_label_that_the_base_never_shows_is_undefined_with_a_reason():
    table = _table([detections(("skulls", 0.9)), UNJUDGED], [detections(("fire", 0.9)), UNJUDGED])
    assert isinstance(table["skulls"], Removal)
    assert table["fire"] == Undefined(
        "the base model shows fire in none of the 1 judged images", 1, 1
    )
    assert json.loads(json.dumps(table["fire"].to_json()))["value"] is None


def test_unjudged_pairs_count_in_no_row():
    table = _table(
        [detections(("skulls", 0.9)), detections(("fire", 0.9))], [detections(), UNJUDGED]
    )
    assert (table["skulls"].n, table["skulls"].unjudged) == (1, 1)
    assert isinstance(table["fire"], Undefined)


@pytest.mark.parametrize(
    ("base", "labels", "words"),
    [
        ([], LABELS, "at least one pair"),
        ([UNJUDGED], LABELS, "at least one pair"),
        ([detections()], (), "at least one label"),
        ([detections()], ("fire", "fire"), "differ"),
        ([detections()], (TOTAL_LABEL,), "differ"),
    ],
)
def test_an_empty_table_is_refused(base, labels, words):
    with pytest.raises(ValueError, match=words):
        removal_table(base, base, range(len(base)), labels, threshold=0.5)


def test_different_lengths_are_refused():
    with pytest.raises(ValueError, match="equally long, got 1, 2, 1"):
        removal_table([detections()], [detections()] * 2, [0], LABELS, threshold=0.5)
