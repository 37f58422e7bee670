"""Both judges of the miniature world on scenes with known content."""

import numpy as np
import pytest
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


@pytest.fixture(scope="module", params=["mini", "mini-held-out"])
def judge(request):
    return load_judge(request.param)


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


def test_boxes_contain_the_marks_in_pixels_of_the_input_image():
    judge = load_judge("mini")
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


@pytest.mark.parametrize("name", ["mini", "mini-held-out"])
def test_labels_and_threshold_can_be_set(name):
    fire = load_judge(name, labels=["fire"])
    assert set(judge_images(fire, scene_images("skulls")[:8])) == {"safe"}
    with pytest.raises(UnknownNameError, match="Did you mean 'skulls'"):
        load_judge(name, labels=["skull"])
    with pytest.raises(ConfigError, match=r"got 0\.1"):
        load_judge(name, threshold=0.1)


@pytest.mark.parametrize(("name", "layer"), [("mini", "heat"), ("mini-held-out", "object")])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_network_whose_output_is_not_finite_leaves_the_image_unjudged(name, layer, value):
    judge = load_judge(name)
    getattr(judge._net, layer).bias.data.fill_(float(value))
    (raw,) = judge.detect(scene_images("skulls")[:1])
    assert "finite" in raw.unjudged
    assert raw.verdict(["skulls"], 0.5) == "unjudged"


def test_a_verdict_does_not_depend_on_the_other_images_of_a_batch(judge):
    images = [i for label in ("skulls", "fire", None) for i in scene_images(label)[:3]]
    alone = [judge.detect([image])[0] for image in images]
    for one, batched in zip(alone, judge.detect(images), strict=True):
        assert batched.subject == one.subject
        assert [d.label for d in batched.items] == [d.label for d in one.items]
        assert [d.score for d in batched.items] == pytest.approx(
            [d.score for d in one.items], abs=1e-4
        )


def test_the_held_out_judge_describes_the_whole_image_once_per_label():
    results = load_judge("mini-held-out").detect(scene_images("skulls"))
    assert {d.box for raw in results for d in raw.items} == {None}
    assert all(len({d.label for d in raw.items}) == len(raw.items) for raw in results)


def test_the_two_judges_are_normalized_differently():
    first, second = (
        {type(module).__name__ for module in load_judge(name)._net.modules()}
        for name in ("mini", "mini-held-out")
    )
    assert "BatchNorm2d" in first - second
    assert "GroupNorm" in second - first


# score


@pytest.mark.parametrize("side", [64, 128])
def test_the_score_of_pixels_is_the_sum_of_detections_and_has_a_gradient(side, to_pixels):
    judge = load_judge("mini", labels=["skulls"])
    images = [*scene_images("skulls")[:24], *scene_images(None)[:24]]
    images = [image.resize((side, side), Image.Resampling.BILINEAR) for image in images]
    pixels = to_pixels(images)
    scores = judge.score(pixels)
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


def test_the_judge_is_listed_as_differentiable():
    assert isinstance(load_judge("mini"), DifferentiableJudge)
    assert "mini" in list_differentiable_judges()
    assert "nudenet" not in list_differentiable_judges()
