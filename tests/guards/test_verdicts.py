"""Judges that contradict their scores, replacements that hide nothing, and messages in traces."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pytest
from PIL import Image

from safegen.guards import GuardConfig, GuardResult, make_guard
from safegen.guards.core.base import Guard
from safegen.guards.core.pipeline import GuardedPipeline
from safegen.guards.judge_filter import JudgeBackedConfig, censor_whole
from safegen.guards.safety_checker import SafetyCheckerConfig
from safegen.judges import Detection, Detections

NAN = float("nan")
PICTURES = ("a castle on a hill", "a ship in a storm")
WITH_JUDGE = ["crops", "judge-filter", "pno", "safety-checker"]


class ContradictoryDetections(Detections):
    """Detections that call an image safe under every threshold."""

    def contains(self, labels, threshold):
        return False


class FixedJudge:
    """A judge with the same detections of every image."""

    id, labels, label_space, threshold = "fixed", ("bad",), ("bad", "good"), 0.5

    def __init__(self, detections):
        self.detections = detections

    def detect(self, images):
        return [self.detections() for _ in images]


@pytest.fixture
def judged(tiny_model, generate, passing_settings, monkeypatch):
    """Return a function that generates with a guard and a judge with fixed detections."""

    def go(name, detections):
        for config in (JudgeBackedConfig, SafetyCheckerConfig):
            monkeypatch.setattr(config, "load_judge", lambda self: FixedJudge(detections))
        guard = make_guard(name, **passing_settings[name])
        return generate(tiny_model.pipeline, [guard], output_type="pil")

    return go


@pytest.mark.parametrize("name", WITH_JUDGE)
@pytest.mark.parametrize(
    "detections",
    [
        pytest.param(lambda: ContradictoryDetections((Detection("bad", 0.9),)), id="contradictory"),
        pytest.param(lambda: Detections((Detection("bad", NAN),)), id="nan"),
        pytest.param(lambda: Detections((Detection("bad", NAN), Detection("bad", 0.3))), id="both"),
        pytest.param(lambda: "safe", id="text"),
        pytest.param(lambda: Detections(({"label": "bad", "score": 0.9},)), id="item"),
        pytest.param(lambda: Detections((Detection("bad", -1.0),)), id="negative"),
        pytest.param(lambda: Detections((Detection("bad", 1.5),)), id="above one"),
        pytest.param(lambda: Detections((Detection("BAD", 0.9),)), id="unknown label"),
    ],
)
def test_detections_that_contradict_themselves_withhold(judged, name, detections):
    outputs = judged(name, detections)
    assert [o.image for o in outputs] == [None, None]
    assert {o.trace.action for o in outputs} == {"withhold"}


@pytest.mark.parametrize("name", WITH_JUDGE)
def test_plain_detections_are_read_by_labels_and_threshold(judged, name):
    fine = judged(name, lambda: Detections((Detection("bad", 0.4), Detection("good", 0.9))))
    assert {o.trace.action for o in fine} == {"none"}
    bad = judged(name, lambda: Detections((Detection("bad", 0.6),)))
    assert {o.trace.action for o in bad} == {"block" if name == "crops" else "black"}


@pytest.mark.parametrize("name", WITH_JUDGE)
def test_a_judge_without_labels_withholds(judged, name, monkeypatch):
    monkeypatch.setattr(FixedJudge, "labels", ())
    outputs = judged(name, lambda: Detections((Detection("bad", 0.9),)))
    reason = f"error: {name}: the judge has no labels, and would call every image safe"
    assert [(o.image, o.trace.reason) for o in outputs] == [(None, reason)] * 2


@pytest.mark.parametrize("name", WITH_JUDGE)
def test_labels_outside_the_label_space_of_a_judge_withhold(judged, name, monkeypatch):
    monkeypatch.setattr(FixedJudge, "labels", ("bda",))
    outputs = judged(name, lambda: Detections((Detection("bad", 0.9),)))
    reason = f"error: {name}: the judge's labels must be in its label_space"
    assert [(o.image, o.trace.reason) for o in outputs] == [(None, reason)] * 2


@pytest.mark.parametrize("make", [iter, list, lambda items: (item for item in items)])
@pytest.mark.parametrize("name", WITH_JUDGE)
def test_detections_are_kept_whatever_holds_them(judged, name, make):
    outputs = judged(name, lambda: Detections(make((Detection("bad", 0.9),))))
    assert {o.trace.action for o in outputs} == {"block" if name == "crops" else "black"}


class ReplacingConfig(GuardConfig):
    """Settings of a guard that replaces images."""

    name: str = "replacing"
    how: str
    hook_points = frozenset({"image"})

    def build(self, adapter):
        return ReplacingGuard(self)


class ReplacingGuard(Guard):
    """A guard that returns the image itself, a copy, or another one."""

    def check_images(self, images, prompts):
        made = {
            "same": lambda image: image,
            "copy": lambda image: image.copy(),
            "rgba": lambda image: image.convert("RGBA"),
            "larger": lambda image: image.resize((2 * image.width, 3 * image.height)),
            "cropped": lambda image: image.crop((1, 1, *image.size)),
            "palette": lambda image: image.quantize(256),
            "dithered": lambda image: image.convert("P"),
            "brighter": lambda image: image.point(lambda value: min(value + 2, 255)),
            "another": lambda image: images[image is images[0]].copy(),
            "in place": lambda image: image.paste(image.resize((2, 2)).resize(image.size)) or image,
            "black": lambda image: Image.new("RGB", image.size),
            "blur": lambda image: censor_whole(image, "blur"),
            "mosaic": lambda image: censor_whole(image, "mosaic"),
        }[self.config.how]
        return [GuardResult("mosaic", "seen", image=made(image)) for image in images]


@pytest.fixture(scope="module")
def bundled():
    """Return the pipeline of the bundled model, whose images are not noise."""
    from safegen.models.loading import load

    return load("mini").pipeline


TWINS = ["same", "copy", "rgba", "larger", "cropped", "palette", "dithered", "brighter", "another"]


@pytest.mark.parametrize("how", TWINS)
def test_an_image_replaced_by_one_that_shows_it_withholds(bundled, generate, how):
    guards = [ReplacingConfig(how=how)]
    outputs = generate(bundled, guards, PICTURES, output_type="pil")
    assert [o.image for o in outputs] == [None, None]
    reason = "error: replacing: the replacement shows a generated image"
    assert {o.trace.reason for o in outputs} == {reason}


@pytest.mark.parametrize("how", ["black", "blur", "mosaic"])
def test_each_cover_of_the_package_is_shown(bundled, generate, how):
    guards = [ReplacingConfig(how=how)]
    outputs = generate(bundled, guards, PICTURES, output_type="pil")
    assert [(o.image is None, o.trace.action) for o in outputs] == [(False, "mosaic")] * 2


class UndoingConfig(GuardConfig):
    """Settings of two guards of one hand: the first covers the images, the second shows them."""

    name: str = "undoing"
    how: str
    hook_points = frozenset({"image"})

    def build(self, adapter):
        return UndoingGuard(self)


class UndoingGuard(Guard):
    """A guard that keeps the images and covers them, or undoes the cover without an action."""

    kept: ClassVar[list[Image.Image]] = []

    def check_images(self, images, prompts):
        if self.config.how == "cover":
            self.kept[:] = [image.copy() for image in images]
            return [GuardResult("black", image=Image.new("RGB", i.size)) for i in images]
        if self.config.how == "in place":
            for image, kept in zip(images, self.kept, strict=True):
                image.paste(kept)
            return [GuardResult() for _ in images]
        return [GuardResult(self.config.how, "seen", image=kept) for kept in self.kept]


@pytest.mark.parametrize("how", ["none", "edit", "black", "in place"])
def test_a_later_guard_cannot_undo_a_cover(tiny_model, generate, how):
    guards = [UndoingConfig(how="cover"), UndoingConfig(how=how)]
    outputs = generate(tiny_model.pipeline, guards, output_type="pil")
    assert [(o.image, o.trace.action) for o in outputs] == [(None, "withhold")] * 2


@pytest.mark.parametrize("image", ["black.png", None])
def test_a_cover_that_is_no_image_withholds(tiny_model, generate, monkeypatch, image):
    result = GuardResult("black", "seen", image=image)
    monkeypatch.setattr(UndoingGuard, "check_images", lambda self, images, _: [result] * 2)
    outputs = generate(tiny_model.pipeline, [UndoingConfig(how="")], output_type="pil")
    reason = "error: undoing: the action 'black' needs an image to show"
    assert [(o.image, o.trace.reason) for o in outputs] == [(None, reason)] * 2


def test_an_image_may_be_covered_in_place(tiny_model, generate):
    outputs = generate(tiny_model.pipeline, [ReplacingConfig(how="in place")], output_type="pil")
    assert [(o.image is None, o.trace.action) for o in outputs] == [(False, "mosaic")] * 2


def test_a_second_guard_may_replace_a_replacement_by_its_equal(tiny_model, generate):
    guards = [ReplacingConfig(how="black")] * 2
    outputs = generate(tiny_model.pipeline, guards, output_type="pil")
    assert [np.asarray(o.image).max() for o in outputs] == [0, 0]


class QuotingConfig(GuardConfig):
    """Settings of a guard that fails and quotes the prompt."""

    name: str = "quoting"
    how: str
    hook_points = frozenset({"prompt"})

    def build(self, adapter):
        return QuotingGuard(self)


class QuotingGuard(Guard):
    """A guard with the prompt in its exception, or in a reason of many lines."""

    def check_prompts(self, prompts):
        if self.config.how == "exception":
            raise KeyError(f"no entry for {prompts[0]}")
        return [GuardResult("block", f"found\n\x1b[31m {'x' * 500}") for _ in prompts]


def test_an_exception_reaches_the_trace_without_its_message(tiny_model, generate):
    prompts = ["a secret cube", "a secret ball"]
    outputs = generate(tiny_model.pipeline, [QuotingConfig(how="exception")], prompts)
    assert [o.image for o in outputs] == [None, None]
    assert {o.trace.reason for o in outputs} == {
        "error: quoting: KeyError in test_verdicts.check_prompts"
    }
    assert "secret" not in str(outputs[0].trace.to_json())


def test_an_exception_of_a_guard_is_logged_with_its_message(tiny_model, generate, caplog):
    with caplog.at_level("DEBUG", logger="safegen"):
        generate(tiny_model.pipeline, [QuotingConfig(how="exception")], ["a secret cube"])
    assert "no entry for a secret cube" in caplog.text


def test_a_reason_in_the_trace_is_one_short_printable_line(tiny_model, generate):
    (output, *_) = generate(tiny_model.pipeline, [QuotingConfig(how="reason")])
    reason = output.trace.guards[0].reason
    assert output.trace.withheld
    assert reason.isprintable()
    assert len(reason) <= 100


def test_the_engine_names_the_rule_that_a_result_breaks(tiny_model, generate):
    class MissingConfig(ReplacingConfig):
        def build(self, adapter):
            guard = Guard(self)
            guard.check_images = lambda images, prompts: []
            return guard

    engine = GuardedPipeline(tiny_model.pipeline, [MissingConfig(how="same")])
    outputs = generate(tiny_model.pipeline, engine=engine, output_type="pil")
    assert outputs[0].trace.reason == "error: replacing: 0 results for 2 images"
