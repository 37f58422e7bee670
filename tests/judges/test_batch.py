"""What fails for one picture is unjudged with the reason, and for that picture alone."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from safegen.core.errors import UnknownNameError
from safegen.judges.base import Detection, Detections
from safegen.judges.batching import as_rgb, detect_in_batches, finite, resolve_labels

GREY = Image.new("RGB", (4, 4), (128, 128, 128))
DARK = Image.new("RGB", (4, 4))


def brightness(image):
    return float(np.asarray(image).mean()) / 255


def see(scores):
    return [[Detection("bright", finite(s)), Detection("dim", 0.1)] for s in scores]


def detect(images, prepare=brightness, see=see, batch=3):
    return detect_in_batches(images, prepare, see, batch_size=batch)


def verdicts(results):
    return [d.verdict(("bright",), 0.5) for d in results]


def test_every_picture_gets_its_own_verdict_in_order_whatever_the_batch():
    images = [GREY, DARK, GREY, GREY, DARK]
    found = [detect(images, batch=n) for n in (1, 2, 3, 16)]
    assert verdicts(found[0]) == ["unsafe", "safe", "unsafe", "unsafe", "safe"]
    assert all(f == found[0] for f in found)
    assert detect([]) == []


def test_what_is_under_the_floor_is_not_kept():
    (raw,) = detect([GREY])
    assert raw.items == (Detection("bright", 128 / 255),)


def test_the_best_detection_comes_first():
    (raw,) = detect(
        [GREY], see=lambda scores: [[Detection("a", 0.3), Detection("b", 0.9), Detection("c", 0.6)]]
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
def test_a_picture_that_cannot_be_read_is_unjudged_and_its_neighbours_are_judged(bad):
    found = detect([GREY, bad, DARK])
    assert verdicts(found) == ["unsafe", "unjudged", "safe"]
    assert found[1].unjudged
    assert found[1].items == ()
    assert [d.contains(("bright",), 0.5) for d in found] == [True, None, False]


def test_a_truncated_file_is_unjudged(tmp_path):
    path = tmp_path / "half.png"
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[:800])
    with Image.open(path) as image:
        (raw,) = detect([image])
    assert "truncated" in raw.unjudged


def test_a_batch_that_fails_is_looked_at_one_by_one():
    sizes = []

    def small_memory(scores):
        sizes.append(len(scores))
        if len(scores) > 1:
            raise MemoryError("too many")
        return see(scores)

    assert verdicts(detect([GREY, DARK, GREY], see=small_memory)) == ["unsafe", "safe", "unsafe"]
    assert sizes == [3, 1, 1, 1]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_score_that_is_no_number_leaves_its_picture_unjudged_alone(value):
    found = detect(
        [GREY, DARK], prepare=lambda image: value if brightness(image) == 0 else brightness(image)
    )
    assert verdicts(found) == ["unsafe", "unjudged"]
    assert found[1].unjudged == f"judge scores must be finite, got {value}"


def test_an_error_of_the_network_is_the_reason():
    def broken(scores):
        raise RuntimeError("the device is gone\nand more")

    assert detect([GREY], see=broken) == [
        Detections((), unjudged="RuntimeError: the device is gone and more")
    ]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_common_modes_are_read(mode):
    assert as_rgb(GREY.convert(mode)).mode == "RGB"


def test_an_unknown_label_comes_with_the_known_ones_and_their_sets():
    assert resolve_labels("some", (), ("a", "b"), ("a",)) == ("a",)
    with pytest.raises(
        UnknownNameError, match=r"no label of the judge 'some' named 'c'.*Known: a, b\."
    ):
        resolve_labels("some", ("c",), ("a", "b"), ("a",))
