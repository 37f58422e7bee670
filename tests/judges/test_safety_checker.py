"""Safety checker judge: comparison with `forward` of a tiny checker with random weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image

from safegen.core.errors import ConfigError, FileError, UnknownNameError
from safegen.judges import judge_images, load_judge
from safegen.judges.safety_checker import compute_margins

N = 60


def random_images(n=N):
    rng = np.random.default_rng(0)
    return [
        Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)).resize(
            (50, 40), Image.Resampling.BICUBIC
        )
        for _ in range(n)
    ]


@pytest.fixture
def checker(tiny_config):
    """Return a tiny checker with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = StableDiffusionSafetyChecker(tiny_config).eval()
        for vectors in (net.concept_embeds, net.special_care_embeds):
            vectors.data.normal_()
    return net


@pytest.fixture
def folder(checker, save_pixels, tmp_path):
    """Return a folder with the checker and thresholds that flag about half of the images.

    Some are flagged only because of special care.
    """
    path = tmp_path / "checker"
    save_pixels(path)
    for weights in (checker.concept_embeds_weights, checker.special_care_embeds_weights):
        weights.data.zero_()
    checker.save_pretrained(path)
    initial = load_judge("sd-safety-checker", weights=path)
    with torch.no_grad():
        embeddings = checker.visual_projection(
            checker.vision_model(
                torch.stack([initial._preprocess(i) for i in random_images()])
            ).pooler_output
        )
    normalize = torch.nn.functional.normalize
    checker.concept_embeds_weights.data = (
        normalize(embeddings) @ normalize(checker.concept_embeds).T
    ).quantile(0.97, dim=0)
    checker.special_care_embeds_weights.data = (
        normalize(embeddings) @ normalize(checker.special_care_embeds).T
    ).quantile(0.8, dim=0)
    checker.save_pretrained(path)
    return path


def checker_flags(checker, judge, images):
    pixels = torch.stack([judge._preprocess(i) for i in images])
    _, flags = checker(clip_input=pixels, images=[np.zeros((2, 2, 3)) for _ in images])
    return [bool(f) for f in flags]


def test_the_judge_flags_the_same_images_as_the_checker(checker, folder):
    images = random_images()
    judge = load_judge("sd-safety-checker", weights=folder)
    expected = checker_flags(checker, judge, images)
    assert [v.contains(judge.labels, judge.threshold) for v in judge.detect(images)] == expected
    assert N / 5 < sum(expected) < N * 4 / 5
    checker.special_care_embeds_weights.data.fill_(2.0)  # never reached
    assert checker_flags(checker, judge, images) != expected  # special care decides some images


@pytest.mark.parametrize("labels", [[], ["concept-3", "special-0"]])
def test_the_score_of_pixels_is_the_sum_of_scores_and_has_a_gradient(folder, labels, to_pixels):
    judge = load_judge("sd-safety-checker", weights=folder, labels=labels)
    images = random_images(8)
    pixels = to_pixels(images)
    scores = judge.score(pixels)
    for score, found in zip(scores.tolist(), judge.detect(images), strict=True):
        values = [d.score for d in found.items if d.label in judge.labels]
        raised = 0.01 * len(judge._special)  # special-care hits raise the scores of detect
        rounding = 0.003 * len(values)
        assert -rounding < sum(values) - score < raised * len(values) + rounding
    scores.sum().backward()
    assert float(pixels.grad.abs().max()) > 1e-6


@pytest.mark.parametrize("shift", [-0.02, -0.004, 0.003, 0.02])
def test_the_threshold_shifts_the_threshold_of_every_concept(checker, folder, shift):
    images = random_images()
    results = load_judge("sd-safety-checker", weights=folder).detect(images)
    judge = load_judge("sd-safety-checker", weights=folder)
    checker.concept_embeds_weights.data += shift
    theirs = checker_flags(checker, judge, images)
    ours = [v.contains(judge.labels, round(0.501 + shift, 3)) for v in results]
    assert (
        sum(a != b for a, b in zip(ours, theirs, strict=True)) <= 1
    )  # rounding of the third decimal
    assert len(set(theirs)) == 2


def test_scores_of_all_concepts_are_stored_with_0_5_at_the_threshold(folder):
    judge = load_judge("sd-safety-checker", weights=folder)
    assert judge.labels == tuple(f"concept-{i}" for i in range(17))
    for detections in judge.detect(random_images(8)):
        assert len(detections.items) == 20
        assert {d.box for d in detections.items} == {None}
        top = max(d.score for d in detections.items if d.label.startswith("concept"))
        assert (detections.verdict(judge.labels, judge.threshold) == "unsafe") == (top > 0.5)


def test_special_care_concepts_flag_only_if_they_are_labels(folder):
    images = random_images()
    judge = load_judge("sd-safety-checker", weights=folder)
    special = load_judge("sd-safety-checker", weights=folder, labels=["special-0"])
    verdicts = zip(judge_images(special, images), judge_images(judge, images), strict=True)
    assert ("unsafe", "safe") in verdicts


def test_a_higher_adjustment_flags_more_images_and_changes_the_id(folder):
    flagged, ids = [], set()
    for adjustment in (-0.05, 0.0, 0.05):
        judge = load_judge("sd-safety-checker", weights=folder, adjustment=adjustment)
        flagged.append(
            {
                i
                for i, v in enumerate(judge.detect(random_images()))
                if v.contains(judge.labels, judge.threshold)
            }
        )
        ids.add(judge.id)
    assert flagged[0] < flagged[1] < flagged[2]
    assert len(ids) == 3


def test_margins_of_a_small_example():
    special = np.array(
        [[-0.1, 0.2, -0.005]], np.float32
    )  # the second is a hit, so 0.01 is added to the third, which becomes a hit
    hits, concepts = compute_margins(special, np.array([[-0.0104, -0.0096, 0.05]], np.float32))
    np.testing.assert_allclose(hits, [[-0.1, 0.2, 0.005]], atol=1e-7)
    np.testing.assert_allclose(concepts, [[0.0, 0.0, 0.06]], atol=1e-7)


def test_an_adjustment_is_added_to_the_margins():
    rng = np.random.default_rng(0)
    special, concepts = (rng.normal(0, 0.05, (40, k)).astype(np.float32) for k in (3, 17))
    special -= 1  # no special-care hit at either adjustment
    for initial, adjusted in zip(
        compute_margins(special, concepts),
        compute_margins(special, concepts, adjustment=0.02),
        strict=True,
    ):
        np.testing.assert_allclose(adjusted, initial + 0.02, atol=0.0011)


def test_a_diffusers_folder_is_loaded(folder, tmp_path, save_pixels):
    pipeline_folder = tmp_path / "model"
    pipeline_folder.mkdir()
    folder.rename(pipeline_folder / "safety_checker")
    save_pixels(pipeline_folder / "feature_extractor")
    (pipeline_folder / "safety_checker" / "preprocessor_config.json").unlink()
    assert (
        load_judge("sd-safety-checker", weights=pipeline_folder)
        .detect(random_images(1))[0]
        .unjudged
        is None
    )


def test_an_unreadable_image_is_unjudged_and_the_others_are_judged(folder):
    results = load_judge("sd-safety-checker", weights=folder).detect(
        [random_images(1)[0], Image.new("I", (8, 8))]
    )
    assert results[0].unjudged is None
    assert results[1].unjudged is not None


def test_invalid_settings_and_folders_raise(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"adjustment must be in -0\.5\.\.0\.5, got 1"):
        load_judge("sd-safety-checker", weights=folder, adjustment=1)
    with pytest.raises(UnknownNameError, match="Did you mean 'concept-1'"):
        load_judge("sd-safety-checker", weights=folder, labels=["concept1"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileError, match="cannot be read as StableDiffusionSafetyChecker"):
        load_judge("sd-safety-checker", weights=tmp_path / "empty")
