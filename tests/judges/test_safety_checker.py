"""The checker's scores against its own `forward`, on the real class at tiny size with random weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image

from safegen.core.errors import ConfigError, FileError, UnknownNameError
from safegen.judges import judge_images, load_judge
from safegen.judges.safety_checker import margins

N = 60


def pictures(n=N):
    rng = np.random.default_rng(0)
    return [
        Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)).resize(
            (50, 40), Image.Resampling.BICUBIC
        )
        for _ in range(n)
    ]


@pytest.fixture
def checker(tiny_config):
    """Return a checker whose thresholds lie among the cosines of our pictures."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = StableDiffusionSafetyChecker(tiny_config).eval()
        for vectors in (net.concept_embeds, net.special_care_embeds):
            vectors.data.normal_()
    return net


@pytest.fixture
def folder(checker, save_pixels, tmp_path):
    """Return the checker in a folder, its thresholds moved to where about half of the pictures are flagged, some by special care alone."""
    path = tmp_path / "checker"
    save_pixels(path)
    for weights in (checker.concept_embeds_weights, checker.special_care_embeds_weights):
        weights.data.zero_()
    checker.save_pretrained(path)
    plain = load_judge("sd-safety-checker", weights=path)
    with torch.no_grad():
        seen = checker.visual_projection(
            checker.vision_model(
                torch.stack([plain._preprocess(i) for i in pictures()])
            ).pooler_output
        )
    unit = torch.nn.functional.normalize
    checker.concept_embeds_weights.data = (unit(seen) @ unit(checker.concept_embeds).T).quantile(
        0.97, dim=0
    )
    checker.special_care_embeds_weights.data = (
        unit(seen) @ unit(checker.special_care_embeds).T
    ).quantile(0.8, dim=0)
    checker.save_pretrained(path)
    return path


def own_answer(checker, judge, images):
    pixels = torch.stack([judge._preprocess(i) for i in images])
    _, flags = checker(clip_input=pixels, images=[np.zeros((2, 2, 3)) for _ in images])
    return [bool(f) for f in flags]


def test_it_flags_what_the_checkers_own_forward_flags(checker, folder):
    images = pictures()
    judge = load_judge("sd-safety-checker", weights=folder)
    own = own_answer(checker, judge, images)
    assert [v.contains(judge.labels, judge.threshold) for v in judge.detect(images)] == own
    assert N / 5 < sum(own) < N * 4 / 5
    checker.special_care_embeds_weights.data.fill_(2.0)  # never reached
    assert own_answer(checker, judge, images) != own  # so special care decided some of them


@pytest.mark.parametrize("shift", [-0.02, -0.004, 0.003, 0.02])
def test_moving_the_threshold_moves_every_concepts_threshold(checker, folder, shift):
    images = pictures()
    found = load_judge("sd-safety-checker", weights=folder).detect(images)
    judge = load_judge("sd-safety-checker", weights=folder)
    checker.concept_embeds_weights.data += shift
    theirs = own_answer(checker, judge, images)
    ours = [v.contains(judge.labels, round(0.501 + shift, 3)) for v in found]
    assert (
        sum(a != b for a, b in zip(ours, theirs, strict=True)) <= 1
    )  # a margin on the edge of the third decimal may fall either way
    assert len(set(theirs)) == 2


def test_every_concepts_score_is_kept_with_0_5_at_its_threshold(folder):
    judge = load_judge("sd-safety-checker", weights=folder)
    assert judge.labels == tuple(f"concept-{i}" for i in range(17))
    for verdict in judge.detect(pictures(8)):
        assert len(verdict.items) == 20
        assert {d.box for d in verdict.items} == {None}
        top = max(d.score for d in verdict.items if d.label.startswith("concept"))
        assert (verdict.verdict(judge.labels, judge.threshold) == "unsafe") == (top > 0.5)


def test_a_special_care_hit_does_not_flag_by_itself_but_can_be_asked_for(folder):
    images = pictures()
    judge = load_judge("sd-safety-checker", weights=folder)
    special = load_judge("sd-safety-checker", weights=folder, labels=["special-0"])
    verdicts = zip(judge_images(special, images), judge_images(judge, images), strict=True)
    assert ("unsafe", "safe") in verdicts


def test_a_stricter_adjustment_flags_more_and_is_another_judge(folder):
    flagged, ids = [], set()
    for adjustment in (-0.05, 0.0, 0.05):
        judge = load_judge("sd-safety-checker", weights=folder, adjustment=adjustment)
        flagged.append(
            {
                i
                for i, v in enumerate(judge.detect(pictures()))
                if v.contains(judge.labels, judge.threshold)
            }
        )
        ids.add(judge.id)
    assert flagged[0] < flagged[1] < flagged[2]
    assert len(ids) == 3


def test_margins_by_hand():
    special = np.array(
        [[-0.1, 0.2, -0.005]], np.float32
    )  # the second hits, so the third has 0.01 more and hits too
    hits, concepts = margins(special, np.array([[-0.0104, -0.0096, 0.05]], np.float32))
    np.testing.assert_allclose(hits, [[-0.1, 0.2, 0.005]], atol=1e-7)
    np.testing.assert_allclose(concepts, [[0.0, 0.0, 0.06]], atol=1e-7)


def test_an_adjustment_shifts_margins_by_itself():
    rng = np.random.default_rng(0)
    special, concepts = (rng.normal(0, 0.05, (40, k)).astype(np.float32) for k in (3, 17))
    special -= 1  # no special-care hit at either adjustment
    for plain, moved in zip(
        margins(special, concepts), margins(special, concepts, adjustment=0.02), strict=True
    ):
        np.testing.assert_allclose(moved, plain + 0.02, atol=0.0011)


def test_a_diffusers_folder_is_read_by_its_parts(folder, tmp_path, save_pixels):
    whole = tmp_path / "model"
    whole.mkdir()
    folder.rename(whole / "safety_checker")
    save_pixels(whole / "feature_extractor")
    (whole / "safety_checker" / "preprocessor_config.json").unlink()
    assert load_judge("sd-safety-checker", weights=whole).detect(pictures(1))[0].unjudged is None


def test_a_picture_that_cannot_be_read_is_unjudged_among_others(folder):
    found = load_judge("sd-safety-checker", weights=folder).detect(
        [pictures(1)[0], Image.new("I", (8, 8))]
    )
    assert found[0].unjudged is None
    assert found[1].unjudged is not None


def test_what_cannot_be_used_is_refused_in_one_line(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"adjustment must be in -0\.5\.\.0\.5 .*got 1"):
        load_judge("sd-safety-checker", weights=folder, adjustment=1)
    with pytest.raises(UnknownNameError, match="Did you mean 'concept-1'"):
        load_judge("sd-safety-checker", weights=folder, labels=["concept1"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileError, match="cannot be read as StableDiffusionSafetyChecker"):
        load_judge("sd-safety-checker", weights=tmp_path / "empty")
