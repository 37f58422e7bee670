"""Scores computed from verdicts."""

from __future__ import annotations

import pytest

from safegen.core.concept import Concept, load_concept
from safegen.core.errors import ConfigError
from safegen.core.generation import GenerationConfig
from safegen.evaluation.protocol import Protocol
from safegen.evaluation.samples import EvalSample
from safegen.evaluation.scoring.verdict_metrics import removal, score
from safegen.judges.base import Detection, Detections

CONCEPT = Concept(
    name="cubes",
    words=("cube",),
    counterpart=(),
    judge="mini",
    labels=("cube", "die"),
    threshold=0.5,
)


def item(i: int, *, shows: str | None = None) -> EvalSample:
    return EvalSample(
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


def test_an_unjudged_image_counts_neither_as_detected_nor_as_clean():
    found = score([item(0), item(1), item(2)], [verdict("cube"), verdict(), LOST], CONCEPT)
    assert (found.concept.hits, found.concept.judged, found.concept.unjudged) == (1, 2, 1)
    assert found.subject is not None
    assert (found.subject.hits, found.subject.judged, found.subject.unjudged) == (2, 2, 1)


def test_a_list_without_judged_images_has_no_rates():
    with pytest.raises(ValueError, match="at least one judged image"):
        score([item(0)], [LOST], CONCEPT)


def test_only_detections_of_the_concept_at_or_above_the_threshold_count():
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


def test_other_labels_of_a_list_are_detected():
    found = score(
        [item(0, shows="ball"), item(1, shows="ball")], [verdict("ball"), verdict("cube")], CONCEPT
    )
    assert found.shown is not None
    assert found.shown.value == 0.5


def test_a_label_that_the_judge_lacks_has_no_rate():
    items, blind = (
        [item(0, shows="ball"), item(1, shows="ball")],
        [verdict("cube", subject=None), verdict(subject=None)],
    )
    found = score(items, blind, CONCEPT, label_space=("cube", "die"))
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
        label_space=("cube", "die", "ball", "mosaic"),
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


def test_a_protocol_of_a_concept_generates_every_image_one_time():
    concept = load_concept("skulls")
    protocol = Protocol.from_concept(
        concept, prompts=2, seeds=(1, 3), generation=GenerationConfig(), roles=("explicit",)
    )
    assert [(i.seed, i.index) for i in protocol.samples()] == [(1, 0), (1, 1), (3, 0), (3, 1)]
    assert protocol.id == protocol.model_copy(update={"about": "else"}).id
    twice = concept.model_copy(
        update={"lists": {"explicit": ("mini:skulls",), "innocent": ("mini:skulls",)}}
    )
    for changes in ({"seeds": (1, 2, 1)}, {"concept": twice}):
        with pytest.raises(ConfigError, match="must be named once each"):
            Protocol.from_concept(
                **{
                    "concept": concept,
                    "prompts": 2,
                    "seeds": (1,),
                    "generation": GenerationConfig(),
                }
                | changes
            )
    with pytest.raises(ConfigError, match="lists"):
        Protocol.from_concept(
            load_concept("nudity"), prompts=2, seeds=(1,), generation=GenerationConfig()
        )
    with pytest.raises(ConfigError, match="prompts, got 100000"):
        Protocol.from_concept(concept, prompts=100_000, seeds=(1,), generation=GenerationConfig())
