"""Task of inspect_ai on the bundled model, with the real package (extra `inspect`)."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("inspect_ai", reason="needs the extra `inspect`")

from inspect_ai import eval as run_eval
from inspect_ai.model import ContentImage, ModelOutput, ModelUsage, get_model
from PIL import Image

from safegen.core.concept import load_concept
from safegen.core.errors import ConfigError
from safegen.integrations import inspect_ai as plug_in
from safegen.integrations.inspect_ai import _find_image, _to_data_uri, text_to_image
from safegen.judges import load_judge
from safegen.metrics.rates import wilson_interval

pytestmark = pytest.mark.filterwarnings("default")  # those of inspect_ai's own imports


def run(task, model, tmp_path, **options):
    (log,) = run_eval(task, model=model, log_dir=str(tmp_path), display="none", **options)
    return log


def metrics(log):
    return {
        (score.name, metric.name): metric.value
        for score in log.results.scores
        for metric in score.metrics.values()
    }


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    model = get_model("safegen/mini", device="cpu", num_inference_steps=8, memoize=False)
    return run(text_to_image(n=4, seed=3), model, tmp_path_factory.mktemp("log"))


def test_the_rates_are_those_of_our_judge_on_the_images_of_the_log(log):
    assert log.status == "success", log.error
    concept = load_concept("skulls")
    judge = load_judge(concept.judge, labels=concept.labels)
    images = []
    for sample in log.samples:
        (part,) = [p for p in sample.output.message.content if isinstance(p, ContentImage)]
        images.append(_find_image_of(part))
        assert sample.output.metadata["guards"]["action"] == "none"
    seen = [d.contains(judge.labels, 0.5) for d in judge.detect(images)]
    found = metrics(log)
    assert found["detected", "rate"] == pytest.approx(sum(seen) / 4)
    low, high = wilson_interval(sum(seen), 4)
    assert (found["detected", "low"], found["detected", "high"]) == pytest.approx((low, high))
    assert found["refused", "rate"] == 0
    assert {score.scored_samples for score in log.results.scores} == {4}


def _find_image_of(part):
    class State:
        output = ModelOutput.from_content("m", [part])

    return _find_image(State())


def test_another_run_gives_the_same_images_and_another_epoch_others(log, tmp_path):
    model = get_model("safegen/mini", device="cpu", num_inference_steps=8, memoize=False)
    again = run(text_to_image(n=1, seed=3, epochs=2), model, tmp_path)
    first, second = (np.asarray(_find_image_of(s.output.message.content[0])) for s in again.samples)
    own = np.asarray(_find_image_of(log.samples[0].output.message.content[0]))
    assert (first == own).all()
    assert (first != second).any()
    assert {score.scored_samples for score in again.results.scores} == {1}


def test_a_blocked_prompt_is_refused_and_not_detected(tmp_path):
    model = get_model(
        "safegen/mini", device="cpu", guards="prompt-filter", concept="skulls", memoize=False
    )
    log = run(text_to_image(n=2), model, tmp_path)
    found = metrics(log)
    assert (found["detected", "rate"], found["refused", "rate"]) == (0, 1)
    assert log.samples[0].output.stop_reason == "content_filter"
    assert "prompt-filter" in log.samples[0].output.error


def test_an_unjudged_image_is_unscored_and_in_no_rate(tmp_path, monkeypatch):
    from safegen.judges.base import Detection, Detections

    skull = Detections((Detection("skulls", 0.9),))

    def detect(judge, images):
        detect.calls += 1
        return [skull if detect.calls % 2 else Detections((), unjudged="too dark")]

    detect.calls = 0
    monkeypatch.setattr("safegen.judges.mini.MiniJudge.detect", detect)
    model = get_model("safegen/mini", device="cpu", num_inference_steps=1, memoize=False)
    log = run(text_to_image(n=4), model, tmp_path)
    assert metrics(log)["detected", "rate"] == 1
    (counts,) = {(s.scored_samples, s.unscored_samples) for s in log.results.scores}
    assert counts == (2, 2)
    reasons = {s.scores["concept_detection"].reason for s in log.samples}
    assert reasons == {None, "unjudged"}


def test_a_failed_guard_is_an_error_and_no_score(tmp_path, monkeypatch):
    model = get_model(
        "safegen/mini", device="cpu", guards=["judge-filter"], concept="skulls",
        num_inference_steps=1, memoize=False,
    )  # fmt: skip
    monkeypatch.setattr("safegen.judges.mini.MiniJudge.detect", lambda *_: 1 / 0)
    log = run(text_to_image(n=1), model, tmp_path)
    assert log.status == "error"
    assert "a guard must run to measure it" in log.error.message


def test_images_of_another_provider_are_judged_and_texts_are_unscored(tmp_path):
    from tools.mini.drawing import draw, sample_scene

    scenes = [
        Image.fromarray(draw(sample_scene(np.random.default_rng(i), attribute=attribute)))
        for i, attribute in enumerate(("skulls", None))
    ]
    outputs = [
        ModelOutput.from_content("m", [ContentImage(image=_to_data_uri(image))]) for image in scenes
    ]
    outputs.append(ModelOutput.from_content("m", "I only write."))
    for output in outputs:
        output.usage = ModelUsage()  # inspect_ai would download a tokenizer to count
    model = get_model("mockllm/model", custom_outputs=outputs)
    log = run(text_to_image(n=3), model, tmp_path, max_samples=1)
    assert metrics(log)["detected", "rate"] == 0.5
    (counts,) = {(s.scored_samples, s.unscored_samples) for s in log.results.scores}
    assert counts == (2, 1)


def test_names_are_checked_before_the_run():
    with pytest.raises(ConfigError, match="has no prompts"):
        text_to_image("nudity")
    with pytest.raises(ConfigError, match="has labels of its own"):
        plug_in.concept_detection("skulls", judge="nudenet")
