"""Judge of the miniature world on scenes with known content."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from safegen.core.errors import ConfigError, UnknownNameError
from safegen.data.triplets.censor import Censor, censor_image
from safegen.judges import judge_images, load_judge
from safegen.judges.base import DifferentiableJudge, list_differentiable_judges
from safegen.metrics.rates import Rate
from safegen.mini import world
from tools.mini import drawing

N = 96


def scenes(attribute, seed=77):
    names = list(world.OBJECTS)
    return [
        drawing.sample_scene(
            np.random.default_rng((seed, i)), attribute=attribute, objects=[names[i % 32]]
        )
        for i in range(N)
    ]


def scene_images(attribute):
    return [Image.fromarray(drawing.draw(s)) for s in scenes(attribute)]


@pytest.fixture(scope="module")
def judge():
    return load_judge("mini")


@pytest.mark.parametrize("label", ["skulls", "fire", "ghosts", "leaves"])
def test_the_judge_detects_the_attribute_of_a_scene_and_no_other(judge, label):
    results = judge.detect(scene_images(label))
    assert Rate.from_outcomes([v.contains([label], 0.5) for v in results]).value >= 0.97
    others = {"skulls", "fire", "ghosts", "leaves", "mosaic"} - {label}
    assert Rate.from_outcomes([v.contains(others, 0.5) for v in results]).value <= 0.04
    assert {v.verdict(judge.labels, 0.5) for v in results} == {
        "unsafe" if label in ("skulls", "fire") else "safe"
    }


def test_the_judge_recognizes_the_object_of_a_clean_scene_and_detects_nothing(judge):
    rows = scenes(None)
    results = judge.detect([Image.fromarray(drawing.draw(s)) for s in rows])
    assert (
        Rate.from_outcomes(
            [v.subject == s.object for v, s in zip(results, rows, strict=True)]
        ).value
        >= 0.97
    )
    assert (
        Rate.from_outcomes(
            [
                bool(v.contains({"skulls", "fire", "ghosts", "leaves", "mosaic"}, 0.5))
                for v in results
            ]
        ).value
        <= 0.03
    )


@pytest.mark.parametrize("label", ["skulls", "fire"])
def test_a_censored_attribute_is_detected_as_a_mosaic_only(judge, label):
    censored = [
        censor_image(Image.fromarray(drawing.draw(s)), drawing.mark_boxes(s), Censor())[0]
        for s in scenes(label)
    ]
    results = judge.detect(censored)
    assert Rate.from_outcomes([v.contains(["skulls", "fire"], 0.5) for v in results]).value <= 0.05
    assert Rate.from_outcomes([v.contains(["mosaic"], 0.5) for v in results]).value >= 0.95


@pytest.mark.parametrize("distortion", ["noise", "blur"])
def test_skulls_are_detected_in_noisy_and_blurred_images(judge, distortion):
    rng = np.random.default_rng(0)
    if distortion == "blur":
        distorted = [p.filter(ImageFilter.GaussianBlur(0.7)) for p in scene_images("skulls")]
    else:
        distorted = [
            Image.fromarray(
                (np.asarray(p) + rng.normal(0, 10, (64, 64, 3))).clip(0, 255).astype(np.uint8)
            )
            for p in scene_images("skulls")
        ]
    assert (
        Rate.from_outcomes([v.contains(["skulls"], 0.5) for v in judge.detect(distorted)]).value
        >= 0.95
    )


def test_boxes_contain_the_marks_in_pixels_of_the_input_image(judge):
    rows = scenes("skulls")[:32]
    big = [
        Image.fromarray(drawing.draw(s)).resize((192, 192), Image.Resampling.NEAREST) for s in rows
    ]
    hits = total = 0
    for scene, raw in zip(rows, judge.detect(big), strict=True):
        for left, top, right, bottom in drawing.mark_boxes(scene):
            x, y = (left + right) / 2 * 3, (top + bottom) / 2 * 3
            total += 1
            hits += any(
                d.box[0] < x < d.box[2] and d.box[1] < y < d.box[3]
                for d in raw.items
                if d.label == "skulls"
            )
    assert hits / total > 0.9


def test_labels_and_threshold_can_be_set():
    fire = load_judge("mini", labels=["fire"])
    assert set(judge_images(fire, scene_images("skulls")[:8])) == {"safe"}
    with pytest.raises(UnknownNameError, match="Did you mean 'skulls'"):
        load_judge("mini", labels=["skull"])
    with pytest.raises(ConfigError, match=r"got 0\.1"):
        load_judge("mini", threshold=0.1)


def test_a_network_that_returns_nan_leaves_the_image_unjudged():
    judge = load_judge("mini")
    judge._net.heat.bias.data.fill_(float("nan"))
    (raw,) = judge.detect(scene_images("skulls")[:1])
    assert "finite" in raw.unjudged
    assert raw.verdict(["skulls"], 0.5) == "unjudged"


# score


@pytest.mark.parametrize("side", [64, 128])
def test_the_score_of_pixels_is_the_sum_of_detections_and_has_a_gradient(judge, side):
    images = [*scene_images("skulls")[:24], *scene_images(None)[:24]]
    images = [image.resize((side, side), Image.Resampling.BILINEAR) for image in images]
    pixels = torch.stack([torch.from_numpy(np.array(i, np.float32)) for i in images])
    pixels = (pixels.permute(0, 3, 1, 2) / 127.5 - 1).requires_grad_()
    scores = load_judge("mini", labels=["skulls"]).score(pixels)
    found = scores.detach().numpy()
    sums = np.array(
        [sum(d.score for d in x.items if d.label == "skulls") for x in judge.detect(images)]
    )
    assert np.all(found > sums - 0.05)
    assert np.abs(found - sums).max() < 0.8  # peaks below the floor of stored scores
    differ = sums[:, None] - sums > 0.3
    assert (found[:, None] - found)[differ].min() > 0  # the same order
    scores.sum().backward()
    assert float(pixels.grad.flatten(1).abs().max(1).values.min()) > 1e-5


def test_the_judge_is_listed_as_differentiable(judge):
    assert isinstance(judge, DifferentiableJudge)
    assert "mini" in list_differentiable_judges()
    assert "nudenet" not in list_differentiable_judges()
