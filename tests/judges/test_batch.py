"""Batched detection: an image that fails is unjudged with the reason, the others are judged."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from safegen.core.errors import UnknownNameError
from safegen.judges.base import Detection, Detections
from safegen.judges.batching import check_finite, detect_in_batches, resolve_labels
from safegen.judges.images import as_rgb

GREY = Image.new("RGB", (4, 4), (128, 128, 128))
DARK = Image.new("RGB", (4, 4))


def brightness(image):
    return float(np.asarray(image).mean()) / 255


def score_brightness(scores):
    return [[Detection("bright", check_finite(s)), Detection("dim", 0.1)] for s in scores]


def detect(images, prepare=brightness, score=score_brightness, batch_size=3):
    return detect_in_batches(images, prepare, score, batch_size=batch_size)


def verdicts(results):
    return [d.verdict(("bright",), 0.5) for d in results]


def test_verdicts_are_in_order_for_every_batch_size():
    images = [GREY, DARK, GREY, GREY, DARK]
    results = [detect(images, batch_size=n) for n in (1, 2, 3, 16)]
    assert verdicts(results[0]) == ["unsafe", "safe", "unsafe", "unsafe", "safe"]
    assert all(result == results[0] for result in results)
    assert detect([]) == []


def test_detections_below_the_score_floor_are_dropped():
    (raw,) = detect([GREY])
    assert raw.items == (Detection("bright", 128 / 255),)


def test_detections_are_sorted_by_score():
    (raw,) = detect(
        [GREY],
        score=lambda scores: [[Detection("a", 0.3), Detection("b", 0.9), Detection("c", 0.6)]],
    )
    assert [d.label for d in raw.items] == ["b", "c", "a"]


@pytest.mark.parametrize(
    "bad",
    [
        Image.new("I;16", (4, 4)),
        Image.new("F", (4, 4)),
        Image.new("I", (4, 4)),
        Image.new("RGB", (0, 4)),
        None,
    ],
)
def test_an_unreadable_image_is_unjudged_and_the_others_are_judged(bad):
    results = detect([GREY, bad, DARK])
    assert verdicts(results) == ["unsafe", "unjudged", "safe"]
    assert results[1].unjudged
    assert results[1].items == ()
    assert [d.contains(("bright",), 0.5) for d in results] == [True, None, False]


def test_a_truncated_file_is_unjudged(tmp_path):
    path = tmp_path / "half.png"
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[:800])
    with Image.open(path) as image:
        (raw,) = detect([image])
    assert "truncated" in raw.unjudged


def test_a_failing_batch_is_repeated_image_by_image():
    sizes = []

    def fail_on_batches(scores):
        sizes.append(len(scores))
        if len(scores) > 1:
            raise MemoryError("too many")
        return score_brightness(scores)

    assert verdicts(detect([GREY, DARK, GREY], score=fail_on_batches)) == [
        "unsafe",
        "safe",
        "unsafe",
    ]
    assert sizes == [3, 1, 1, 1]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_score_that_is_not_finite_leaves_only_its_image_unjudged(value):
    results = detect(
        [GREY, DARK], prepare=lambda image: value if brightness(image) == 0 else brightness(image)
    )
    assert verdicts(results) == ["unsafe", "unjudged"]
    assert results[1].unjudged == f"judge scores must be finite, got {value}"


def test_an_error_of_the_network_becomes_the_reason():
    def fail(scores):
        raise RuntimeError("the device is gone\nand more")

    assert detect([GREY], score=fail) == [
        Detections((), unjudged="RuntimeError: the device is gone and more")
    ]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_common_image_modes_are_converted_to_rgb(mode):
    assert as_rgb(GREY.convert(mode)).mode == "RGB"


def test_an_unknown_label_raises_with_the_known_labels():
    assert resolve_labels("some", (), ("a", "b"), ("a",)) == ("a",)
    with pytest.raises(
        UnknownNameError, match=r"no label of the judge 'some' named 'c'.*Known: a, b\."
    ):
        resolve_labels("some", ("c",), ("a", "b"), ("a",))
