"""Judges as guards: unsafe images are replaced, unjudged ones and failures are withheld."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from safegen.core.concept import load_concept
from safegen.core.errors import ConfigError, FileError
from safegen.guards import make_guard
from safegen.guards.core.adapter import PipelineAdapter
from safegen.guards.judge_filter import JudgeFilterConfig, JudgeGuard, censor_whole
from safegen.judges import Detection, Detections
from safegen.judges.batching import detect_in_batches


class FixedJudge:
    """A judge with fixed detections by the brightness of the first pixel."""

    id, labels, label_space, threshold = "says", ("bad",), ("bad", "good"), 0.5

    def detect(self, images):
        if any(image.getpixel((0, 0))[0] == 200 for image in images):
            raise FileNotFoundError("weights.safetensors")
        out = {
            0: Detections((Detection("good", 0.9),)),
            100: Detections((), unjudged="torn"),
            50: Detections((Detection("bad", 0.4),)),
        }
        return [
            out.get(
                i.getpixel((0, 0))[0], Detections((Detection("bad", 0.7), Detection("bad", 0.8)))
            )
            for i in images
        ]


def grey(level, size=(32, 24)):
    out = Image.effect_noise(size, 90).convert("RGB")
    out.putpixel((0, 0), (level, level, level))
    return out


def look(images, answer="black"):
    return JudgeGuard(JudgeFilterConfig(judge="mini"), FixedJudge(), answer).check_images(
        images, [""] * len(images)
    )


def test_results_are_in_order_with_scores_and_threshold():
    safe, near, unsafe, odd = look([grey(0), grey(50), grey(255), grey(100)])
    assert (safe.action, safe.scores, safe.image) == ("none", {}, None)
    assert (near.action, near.scores, near.thresholds) == ("none", {"bad": 0.4}, {"score": 0.5})
    assert (unsafe.action, unsafe.reason, unsafe.scores) == ("black", "unsafe", {"bad": 0.8})
    assert (odd.action, odd.reason) == ("withhold", "unjudged: torn")


@pytest.mark.parametrize("answer", ["black", "blur", "mosaic", "refuse"])
def test_each_action_hides_the_image(answer):
    image = grey(255)
    outputs = censor_whole(image, answer)
    if answer == "refuse":
        assert outputs is None
        return
    assert outputs.size == image.size
    was, now = (np.asarray(i, dtype=float) for i in (image, outputs))
    assert now.std() < 0.5 * was.std()
    assert (outputs.getextrema() == ((0, 0),) * 3) == (answer == "black")


def test_a_judge_that_raises_withholds_and_the_next_call_works(tiny_model, generate, monkeypatch):
    guard = make_guard("judge-filter", concept="skulls")
    monkeypatch.setattr(JudgeFilterConfig, "load_judge", lambda self: FixedJudge())
    shown = {"level": 200}
    monkeypatch.setattr(
        JudgeGuard,
        "check_images",
        lambda self, images, prompts, own=JudgeGuard.check_images: own(
            self, [grey(shown["level"]) for _ in images], prompts
        ),
    )
    outputs = generate(tiny_model.pipeline, [guard], output_type="pil")
    assert [o.image for o in outputs] == [None, None]
    assert (
        outputs[0].trace.reason
        == "error: judge-filter: FileNotFoundError in test_output_guards.detect"
    )
    shown["level"] = 0
    assert all(
        o.image is not None for o in generate(tiny_model.pipeline, [guard], output_type="pil")
    )
    shown["level"] = 100
    assert {
        (o.image, o.trace.reason) for o in generate(tiny_model.pipeline, [guard], output_type="pil")
    } == {(None, "judge-filter: unjudged: torn")}


class ProcessJudge(FixedJudge):
    """A judge in another process, with one line per image in each direction."""

    CODE = (
        "import os, sys\n"
        "for line in sys.stdin:\n"
        "  os.kill(os.getpid(), 9) if line == 'die\\n' else print('safe', flush=True)"
    )

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-c", self.CODE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def detect(self, images):
        out = []
        for image in images:
            self.process.stdin.write("die\n" if image.getpixel((0, 0))[0] == 66 else "look\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline().strip()
            if not answer:
                raise EOFError(f"the judge's process ended with {self.process.wait()}")
            assert answer == "safe"
            out.append(Detections(()))
        return out


@pytest.mark.skipif(os.name != "posix", reason="a process that is killed ends by a signal")
def test_a_judge_with_a_killed_process_withholds_and_a_restarted_one_works(
    tiny_model, generate, monkeypatch
):
    shown = {}
    monkeypatch.setattr(
        JudgeGuard,
        "check_images",
        lambda self, images, prompts, own=JudgeGuard.check_images: own(
            self, shown.get("now", images), prompts
        ),
    )
    for levels, killed in (((0, 66), True), ((0, 0), False)):
        judge = ProcessJudge()
        with judge.process:
            monkeypatch.setattr(JudgeFilterConfig, "load_judge", lambda self, judge=judge: judge)
            shown["now"] = [grey(level) for level in levels]
            outputs = generate(
                tiny_model.pipeline,
                [make_guard("judge-filter", concept="skulls")],
                output_type="pil",
            )
            assert [o.image is None for o in outputs] == [killed] * 2
            assert {o.trace.reason for o in outputs} == {
                "error: judge-filter: EOFError in test_output_guards.detect" if killed else ""
            }


def test_out_of_memory_is_raised_for_several_images_and_unjudged_for_one(
    tiny_model, generate, monkeypatch
):
    class Large(FixedJudge):
        def detect(self, images):
            return detect_in_batches(images, lambda image: image, self.see)

        def see(self, inputs):
            raise RuntimeError(
                "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
            )

    monkeypatch.setattr(JudgeFilterConfig, "load_judge", lambda self: Large())
    guard, pipe = make_guard("judge-filter", concept="skulls"), tiny_model.pipeline
    base = generate(pipe)
    with pytest.raises(
        MemoryError, match="says could not judge 2 of 2 images: RuntimeError: DefaultCPUAllocator"
    ):
        generate(pipe, [guard], output_type="pil")
    (alone,) = generate(pipe, [guard], ["a red cube"], output_type="pil")
    assert (alone.image, alone.trace.action) == (None, "withhold")
    assert "can't allocate memory" in alone.trace.reason
    assert np.array_equal(generate(pipe), base)


def test_a_judge_with_a_missing_file_is_refused_before_generation(
    tiny_folder, tmp_path, monkeypatch
):
    from safegen.mini import bundle
    from safegen.stack import Stack
    from safegen.stack_loader import StackLoader

    shelf, stack = (
        StackLoader(),
        Stack(
            name="s",
            model=str(tiny_folder),
            guards=[{"name": "safety-checker", "weights": tmp_path / "gone"}],
        ),
    )
    with (
        pytest.raises(FileError, match=r"there is no folder .* the judge 'sd-safety-checker'"),
        shelf.open(stack),
    ):
        pass
    monkeypatch.setattr(bundle, "judge_file", lambda: tmp_path / "gone.safetensors")
    with (
        pytest.raises(FileError, match="'mini' of a guard cannot be loaded"),
        shelf.open(
            stack.model_copy(update={"guards": (make_guard("judge-filter", concept="skulls"),)})
        ),
    ):
        pass
    with shelf.open(Stack(name="s", model=str(tiny_folder))) as ready:
        assert ready.guarded is None


def test_defaults_from_a_concept_are_its_judge():
    guard, skulls = (
        make_guard("judge-filter", concept="skulls", action="mosaic"),
        load_concept("skulls"),
    )
    assert (guard.judge, guard.labels, guard.threshold, guard.action) == (
        skulls.judge,
        skulls.labels,
        skulls.threshold,
        "mosaic",
    )
    facts = guard.fingerprint()
    assert facts["judge_id"].startswith("mini:")
    assert "options" not in facts


def test_replaces_skulls_of_the_bundled_model_and_passes_castles():
    from safegen.core.generation import GenerationConfig, Sample
    from safegen.models.generation import generate
    from safegen.models.loading import load

    images = list(
        generate(
            load("mini"),
            [
                Sample(prompt="a castle covered in skulls", seed=1),
                Sample(prompt="a castle", seed=1),
            ],
            GenerationConfig(num_inference_steps=15),
        )
    )
    guard = make_guard("judge-filter", concept="skulls").build(PipelineAdapter(None))
    assert [f.action for f in guard.check_images(images, ["", ""])] == ["black", "none"]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({}, "judge is required"),
        ({"judge": "mini", "threshold": 0.1}, "greater than or equal to 0.2"),
    ],
)
def test_invalid_settings_are_refused(settings, says):
    with pytest.raises(ConfigError, match=says):
        make_guard("judge-filter", **settings)


@pytest.fixture
def checker(checker_in, tmp_path):
    """Return the folder of a random safety checker that flags every image."""
    return checker_in(tmp_path / "checker", fits=True)


def test_the_safety_checker_runs_on_sdxl_and_is_hashed_by_weights(
    checker, generate, tiny_xl, tmp_path
):
    import shutil

    guard = make_guard("safety-checker", weights=checker, action="refuse")
    outputs = generate(tiny_xl, [guard], output_type="pil")
    assert [(o.image, o.trace.reason) for o in outputs] == [(None, "safety-checker: unsafe")] * 2
    assert outputs[0].trace.guards[0].scores["concept-3"] == 1.0
    shutil.copytree(checker, tmp_path / "moved")
    assert (
        make_guard("safety-checker", weights=tmp_path / "moved", action="refuse").fingerprint()
        == guard.fingerprint()
    )
    assert (
        make_guard("safety-checker", weights=checker, adjustment=0.1, action="refuse").fingerprint()
        != guard.fingerprint()
    )


@pytest.mark.parametrize("kind", ["judge-filter", "crops"])
def test_a_threshold_in_the_judges_options_is_refused_in_one_line(kind):
    with pytest.raises(ConfigError, match="threshold is no option of a judge") as caught:
        make_guard(kind, judge="mini", options={"threshold": 0.3})
    assert "\n" not in str(caught.value)
