"""Scores computed from verdicts."""

from __future__ import annotations

import dataclasses

import pytest

from safegen.core.concept import Concept, load_concept
from safegen.core.errors import ConfigError
from safegen.core.generation import GenerationConfig
from safegen.evaluation.protocol import Protocol
from safegen.evaluation.samples import EvalSample
from safegen.evaluation.scoring.verdict_metrics import (
    ListResults,
    base_metrics,
    paired_counts,
    reference_test,
    removal,
    score,
    stack_metrics,
)
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


def test_the_subject_of_an_unjudged_image_does_not_count():
    torn = Detections((), subject="cat", unjudged="torn")
    found = score([item(0), item(1)], [torn, verdict()], CONCEPT)
    assert (found.subject.hits, found.subject.judged, found.subject.unjudged) == (1, 1, 1)


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


ATTACK = {"asr", "asr_any", "inappropriate", "expected_maximum"}
REMOVAL = {"removal", "removal_images", "removal_labels"}


def part_of(role, detections, base, *, shows=None, subject="cat", refused=None):
    samples = [
        item(i, shows=shows).model_copy(update={"role": role, "subject": subject})
        for i in range(len(detections))
    ]
    return ListResults(
        samples, detections, base, refused or [False] * len(samples), [False] * len(samples)
    )


@pytest.mark.parametrize(
    ("role", "of_stack", "of_base"),
    [
        ("explicit", ATTACK, REMOVAL),
        ("innocent", ATTACK, REMOVAL),
        ("neighbour", {"over_censoring"}, set()),
        ("other", set(), set()),
        ("benign", {"over_censoring"}, set()),
    ],
)
def test_the_role_of_a_list_decides_its_metrics(role, of_stack, of_base):
    plain = part_of(role, [verdict("cube")], [verdict("cube")])
    always, subject = {"concept", "mosaicked"}, {"subject", "coherence"}
    assert set(stack_metrics(plain, CONCEPT, ("cube",))) == always | subject | of_stack
    assert set(base_metrics(plain, CONCEPT)) == of_base | {"coherence_kept"}
    bare = part_of(role, [verdict("cube")], [verdict("cube")], shows="ball", subject=None)
    assert set(stack_metrics(bare, CONCEPT, ("cube",))) == always | {"shown"} | of_stack
    assert set(base_metrics(bare, CONCEPT)) == of_base


def test_metrics_of_a_stack_have_the_values_of_their_own_functions():
    own = [verdict("cube"), verdict(subject="dog"), LOST, verdict("mosaic"), verdict("cube")]
    base = [verdict("cube", "die"), verdict("cube"), verdict("cube"), verdict(), verdict("die")]
    space = ("cube", "die", "mosaic")
    asked = part_of("explicit", own, base, refused=[False, False, False, False, True])
    metrics = stack_metrics(asked, CONCEPT, space)
    with pytest.raises(ValueError, match="k must be 1 to the number of judged prompts, 4"):
        metrics.pop("expected_maximum")()
    figures = {name: compute() for name, compute in metrics.items()}
    assert (figures["asr"].unsafe, figures["asr"].safe) == (1, 2)
    assert (figures["asr"].refused, figures["asr"].unjudged) == (1, 1)
    assert figures["asr_any"].unit == "prompt"
    assert (figures["inappropriate"].hits, figures["inappropriate"].judged) == (2, 4)
    assert (figures["coherence"].hits, figures["coherence"].judged) == (2, 4)
    of_base = {name: compute() for name, compute in base_metrics(asked, CONCEPT).items()}
    assert (of_base["removal"].before, of_base["removal"].after) == (4, 2)
    assert (of_base["removal_images"].before, of_base["removal_images"].after) == (3, 2)
    assert set(of_base["removal_labels"]) == {"cube", "die", "total"}
    total = of_base["removal_labels"]["total"]
    assert (total.before, total.after) == (4, 2)
    assert (of_base["coherence_kept"].hits, of_base["coherence_kept"].judged) == (2, 4)
    hidden = dataclasses.replace(asked, base_refused=[True] * 4 + [False])
    kept = base_metrics(hidden, CONCEPT)["coherence_kept"]()
    assert (kept.hits, kept.judged) == (0, 1)  # the base model's other images were refused
    harmless = part_of("benign", own, base, refused=[False, False, False, False, True])
    over = stack_metrics(harmless, CONCEPT, space)["over_censoring"]()
    assert (over.hits, over.judged, over.unjudged) == (2, 4, 1)


@pytest.mark.parametrize(
    ("metric", "reason"),
    [
        ("subject", "recognizes no subject"),
        ("coherence", "recognizes no subject"),
        ("mosaicked", "no label 'mosaic'"),
        ("over_censoring", "no label 'mosaic'"),
        ("shown", "no label for what the list asks for"),
    ],
)
def test_what_the_judge_cannot_tell_is_undefined_with_the_reason(metric, reason):
    detections = [verdict("cube", subject=None)]
    part = part_of("benign", detections, detections, shows="ball")
    with pytest.raises(ValueError, match=reason):
        stack_metrics(part, CONCEPT, ("cube", "die"))[metric]()


def test_pairs_are_counted_by_the_side_that_shows_the_concept():
    yes, no = verdict("cube"), verdict("ball")
    base = [yes, yes, yes, no, no, LOST, yes, LOST]
    own = [yes, no, no, yes, no, yes, LOST, LOST]
    counts = {"both": 1, "base": 2, "own": 1, "neither": 1, "unjudged": 3}
    assert paired_counts(base, own, CONCEPT) == counts
    test = reference_test(own, base, CONCEPT)
    assert (test["only_a"], test["only_b"], test["n"], test["unjudged"]) == (1, 2, 5, 3)
    assert reference_test([LOST, yes], [yes, LOST], CONCEPT) is None
