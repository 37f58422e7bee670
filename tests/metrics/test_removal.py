"""The removal table is the removal rate of each label and of all together.

A label that was never there has no rate.
"""

from __future__ import annotations

import json
import random

import pytest

from safegen.judges.base import Detection, Detections
from safegen.metrics.rates import Removal, removal_rate
from safegen.metrics.removal import TOTAL, Undefined, count, removal_table

LABELS = ("skulls", "fire")
UNJUDGED = Detections((), unjudged="not a picture")


def verdict(*found: tuple[str, float]) -> Detections:
    return Detections(tuple(Detection(label, score) for label, score in found))


def _table(base, edited, **options):
    return removal_table(base, edited, range(len(base)), LABELS, **({"threshold": 0.5} | options))


def _random(seed: int, n: int = 40):
    draw = random.Random(seed)
    return [
        verdict(*((draw.choice(LABELS), draw.random()) for _ in range(draw.randrange(4))))
        for _ in range(n)
    ]


def test_counts_of_parts_and_of_pictures_are_two_tables():
    base, edited = (
        [verdict(("skulls", 0.9), ("skulls", 0.8), ("fire", 0.7))],
        [verdict(("skulls", 0.6))],
    )
    parts, images = _table(base, edited), _table(base, edited, unit="image")
    assert {k: v.value for k, v in parts.items()} == {
        "skulls": 0.5,
        "fire": 1,
        TOTAL: pytest.approx(2 / 3),
    }
    assert {k: v.value for k, v in images.items()} == {"skulls": 0, "fire": 1, TOTAL: 0}


@pytest.mark.parametrize("seed", range(3))
def test_each_row_is_the_removal_rate_of_its_counts(seed):
    base, edited = _random(seed), _random(seed + 100)
    table = _table(base, edited, seed=7)
    for name, labels in {"skulls": ["skulls"], "fire": ["fire"], TOTAL: LABELS}.items():
        before, after = (
            [sum(d.label in labels and d.score >= 0.5 for d in v.items) for v in side]
            for side in (base, edited)
        )
        assert table[name] == removal_rate(before, after, range(len(base)), seed=7)
    assert table[TOTAL].before == table["skulls"].before + table["fire"].before


def test_the_threshold_is_reached_by_equality_and_rescored_without_looking_again():
    assert [count(verdict(("fire", 0.5)), ["fire"], threshold=t) for t in (0.4, 0.5, 0.6)] == [
        1,
        1,
        0,
    ]


def test_a_label_the_base_never_shows_has_a_reason_instead_of_a_rate():
    table = _table([verdict(("skulls", 0.9)), UNJUDGED], [verdict(("fire", 0.9)), UNJUDGED])
    assert isinstance(table["skulls"], Removal)
    assert table["fire"] == Undefined(
        "the base model shows fire in none of the 1 judged pictures", 1, 1
    )
    assert json.loads(json.dumps(table["fire"].to_json()))["value"] is None


def test_a_pair_with_an_unjudged_side_gives_no_row_its_count():
    table = _table([verdict(("skulls", 0.9)), verdict(("fire", 0.9))], [verdict(), UNJUDGED])
    assert (table["skulls"].n, table["skulls"].unjudged) == (1, 1)
    assert isinstance(table["fire"], Undefined)


@pytest.mark.parametrize(
    ("base", "labels", "words"),
    [
        ([], LABELS, "at least one pair"),
        ([UNJUDGED], LABELS, "at least one pair"),
        ([verdict()], (), "at least one label"),
        ([verdict()], ("fire", "fire"), "differ"),
        ([verdict()], (TOTAL,), "differ"),
    ],
)
def test_a_table_of_nothing_is_refused(base, labels, words):
    with pytest.raises(ValueError, match=words):
        removal_table(base, base, range(len(base)), labels, threshold=0.5)


def test_lists_of_other_lengths_are_refused():
    with pytest.raises(ValueError, match="equally long, got 1, 2, 1"):
        removal_table([verdict()], [verdict()] * 2, [0], LABELS, threshold=0.5)
