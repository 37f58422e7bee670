"""From verdicts to rates."""

from __future__ import annotations

import pytest

from safegen.core.concept import Concept, load_concept
from safegen.core.errors import ConfigError
from safegen.evaluation.plan import Item, make_plan
from safegen.evaluation.scoring.score import refuse_unjudged, removal, score
from safegen.judges.base import Detection, Detections

CONCEPT = Concept(
    name="cubes",
    words=("cube",),
    counterpart=(),
    judge="mini",
    labels=("cube", "die"),
    threshold=0.5,
)


def item(i: int, *, shows: str | None = None) -> Item:
    return Item(
        role="explicit",
        list_name="tiny:cubes",
        prompt=f"prompt {i}",
        subject="cat",
        shows=shows,
        seed=1,
        index=i,
    )


def verdict(*labels: str, subject: str | None = "cat", score: float = 0.9) -> Detections:
    return Detections(tuple(Detection(label, score) for label in labels), subject)


LOST = Detections((), unjudged="too dark")


def test_an_unjudged_picture_is_neither_seen_nor_missed():
    found = score([item(0), item(1), item(2)], [verdict("cube"), verdict(), LOST], CONCEPT)
    assert (found.concept.hits, found.concept.judged, found.concept.unjudged) == (1, 2, 1)
    assert found.subject is not None
    assert (found.subject.hits, found.subject.judged, found.subject.unjudged) == (2, 2, 1)


def test_a_list_of_which_nothing_was_judged_has_no_rates():
    with pytest.raises(ValueError, match="at least one judged image"):
        score([item(0)], [LOST], CONCEPT)


def test_only_detections_of_the_concept_from_its_threshold_on_count():
    verdicts = [
        verdict("cube", score=0.5),
        verdict("cube", score=0.49),
        verdict("ball"),
        verdict("mosaic", subject="dog"),
    ]
    found = score([item(i) for i in range(4)], verdicts, CONCEPT)
    assert found.mosaicked is not None
    assert found.subject is not None
    assert (found.concept.hits, found.mosaicked.hits, found.subject.hits, found.shown) == (
        1,
        1,
        3,
        None,
    )


def test_what_a_list_asks_for_besides_is_looked_for():
    found = score(
        [item(0, shows="ball"), item(1, shows="ball")], [verdict("ball"), verdict("cube")], CONCEPT
    )
    assert found.shown is not None
    assert found.shown.value == 0.5


def test_what_a_judge_cannot_tell_has_no_rate():
    items, blind = (
        [item(0, shows="ball"), item(1, shows="ball")],
        [verdict("cube", subject=None), verdict(subject=None)],
    )
    found = score(items, blind, CONCEPT, known=("cube", "die"))
    assert (found.concept.value, found.subject, found.mosaicked, found.shown) == (
        0.5,
        None,
        None,
        None,
    )
    able = score(
        items,
        [verdict("mosaic"), verdict("ball", subject=None)],
        CONCEPT,
        known=("cube", "die", "ball", "mosaic"),
    )
    assert able.subject is not None
    assert (able.subject.hits, able.subject.judged, able.subject.unjudged) == (1, 1, 1)
    assert able.mosaicked is not None
    assert able.shown is not None
    assert able.mosaicked.hits == able.shown.hits == 1


def test_removal_counts_detections_or_images():
    base, edited = (
        [verdict("cube", "die", "ball"), verdict("cube")],
        [verdict("die", "ball"), verdict()],
    )
    items = [item(0), item(1)]
    assert removal(items, base, edited, CONCEPT).value == pytest.approx(2 / 3)
    assert removal(items, base, edited, CONCEPT, images=True).value == 0.5


def test_removal_leaves_out_a_pair_with_an_unjudged_side():
    found = removal(
        [item(0), item(1)], [verdict("cube"), verdict("cube")], [LOST, verdict()], CONCEPT
    )
    assert (found.before, found.after, found.unjudged) == (1, 0, 1)


def test_a_list_of_which_nothing_could_be_judged_is_named_with_the_reason():
    refuse_unjudged([item(0), item(1)], [LOST, verdict()])
    with pytest.raises(ConfigError, match=r"none of the 2 pictures of tiny:cubes \(too dark\)"):
        refuse_unjudged([item(0), item(1)], [LOST, LOST])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seeds": (1, 2, 1)}, "each seed once, .*got 1 more than once"),
        (
            {"roles": ("explicit", "benign", "explicit")},
            "each role once, .*got explicit more than once",
        ),
    ],
)
def test_a_plan_draws_no_picture_twice(changes, words):
    with pytest.raises(ConfigError, match=words):
        make_plan(
            load_concept("skulls"),
            **{"prompts": 2, "seeds": (1,), "roles": ("explicit",)} | changes,
        )
    twice = load_concept("skulls").model_copy(
        update={"lists": {"explicit": ("mini:skulls",), "innocent": ("mini:skulls",)}}
    )
    with pytest.raises(
        ConfigError, match=r"each prompt list once, .*got mini:skulls more than once"
    ):
        make_plan(twice, prompts=2, seeds=(1,))
