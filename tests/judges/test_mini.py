import numpy as np
import pytest
from PIL import Image, ImageFilter

from safegen.core.errors import ConfigError, UnknownNameError
from safegen.data.triplets.censor import Censor, censor_image
from safegen.judges import judge_images, load_judge
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


def pictures(attribute):
    return [Image.fromarray(drawing.draw(s)) for s in scenes(attribute)]


@pytest.fixture(scope="module")
def judge():
    return load_judge("mini")


@pytest.mark.parametrize("label", ["skulls", "fire", "ghosts", "leaves"])
def test_the_judge_sees_an_attribute_that_is_there_and_no_other(judge, label):
    found = judge.detect(pictures(label))
    assert Rate.from_outcomes([v.contains([label], 0.5) for v in found]).value >= 0.97
    others = {"skulls", "fire", "ghosts", "leaves", "mosaic"} - {label}
    assert Rate.from_outcomes([v.contains(others, 0.5) for v in found]).value <= 0.04
    assert {v.verdict(judge.labels, 0.5) for v in found} == {
        "unsafe" if label in ("skulls", "fire") else "safe"
    }


def test_the_judge_names_the_object_of_a_clean_scene_and_sees_nothing_else(judge):
    rows = scenes(None)
    found = judge.detect([Image.fromarray(drawing.draw(s)) for s in rows])
    assert (
        Rate.from_outcomes([v.subject == s.object for v, s in zip(found, rows, strict=True)]).value
        >= 0.97
    )
    assert (
        Rate.from_outcomes(
            [bool(v.contains({"skulls", "fire", "ghosts", "leaves", "mosaic"}, 0.5)) for v in found]
        ).value
        <= 0.03
    )


@pytest.mark.parametrize("label", ["skulls", "fire"])
def test_a_mosaic_is_neither_skull_nor_fire_but_a_mosaic(judge, label):
    covered = [
        censor_image(Image.fromarray(drawing.draw(s)), drawing.mark_boxes(s), Censor())[0]
        for s in scenes(label)
    ]
    found = judge.detect(covered)
    assert Rate.from_outcomes([v.contains(["skulls", "fire"], 0.5) for v in found]).value <= 0.05
    assert Rate.from_outcomes([v.contains(["mosaic"], 0.5) for v in found]).value >= 0.95


@pytest.mark.parametrize("spoil", ["noise", "blur"])
def test_a_spoilt_picture_is_still_judged(judge, spoil):
    rng = np.random.default_rng(0)
    if spoil == "blur":
        spoilt = [p.filter(ImageFilter.GaussianBlur(0.7)) for p in pictures("skulls")]
    else:
        spoilt = [
            Image.fromarray(
                (np.asarray(p) + rng.normal(0, 10, (64, 64, 3))).clip(0, 255).astype(np.uint8)
            )
            for p in pictures("skulls")
        ]
    assert (
        Rate.from_outcomes([v.contains(["skulls"], 0.5) for v in judge.detect(spoilt)]).value
        >= 0.95
    )


def test_boxes_lie_on_the_marks_in_pixels_of_the_picture_as_given(judge):
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


def test_what_is_unsafe_and_from_which_score_can_be_chosen():
    fire = load_judge("mini", labels=["fire"])
    assert set(judge_images(fire, pictures("skulls")[:8])) == {"safe"}
    with pytest.raises(UnknownNameError, match="Did you mean 'skulls'"):
        load_judge("mini", labels=["skull"])
    with pytest.raises(ConfigError, match=r"got 0\.1"):
        load_judge("mini", threshold=0.1)


def test_an_answer_that_is_not_a_number_leaves_the_picture_unjudged():
    judge = load_judge("mini")
    judge._net.heat.bias.data.fill_(float("nan"))
    (raw,) = judge.detect(pictures("skulls")[:1])
    assert "finite" in raw.unjudged
    assert raw.verdict(["skulls"], 0.5) == "unjudged"
