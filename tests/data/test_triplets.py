"""Reading triplets: pictures, the manifest's rows, and the CSV of the published code."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from red import RedJudge, safe_picture

from safegen.core.errors import FileError
from safegen.data.triplets.censor import Box
from safegen.data.triplets.check import check
from safegen.data.triplets.triplets import ROLES, Triplets, read_picture
from safegen.mini.bundle import triplets_folder


@pytest.mark.parametrize("mode", ["L", "LA", "P", "PA", "1", "CMYK", "YCbCr"])
def test_a_picture_of_any_usual_mode_is_read_as_rgb(mode: str, tmp_path: Path) -> None:
    file = tmp_path / ("picture.jpg" if mode in ("CMYK", "YCbCr") else "picture.tif")
    safe_picture(0).convert("P" if mode == "PA" else mode).convert(mode).save(file)
    assert read_picture(file).mode == "RGB"


def test_the_hash_is_of_the_contents_wherever_they_lie(made: Path, tmp_path: Path) -> None:
    before = Triplets.load(made).hash
    shutil.copytree(made, tmp_path / "moved")
    assert Triplets.load(tmp_path / "moved").hash == before
    lines = (made / "manifest.jsonl").read_text().splitlines()
    (made / "manifest.jsonl").write_text("\n".join(reversed(lines)))
    assert Triplets.load(made).hash != before


def test_a_picture_changed_behind_the_manifest_is_not_handed_out(made: Path) -> None:
    data = Triplets.load(made)
    safe_picture(99).save(made / "censored" / "0001.png")
    data.images(0)
    with pytest.raises(FileError, match="is not the file of the manifest: its SHA-256 differs"):
        data.images(1)


def test_boxes_are_plain_numbers(made: Path) -> None:
    box: Box = Triplets.load(made).rows[0].boxes[0]
    assert all(isinstance(v, float) for v in box)


# the published dialect


@pytest.fixture
def official(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A CSV whose first row is relative to its own folder, the second to the working directory, the third absolute."""
    monkeypatch.chdir(made)
    table = tmp_path / "data" / "meta.csv"
    for role in ROLES:
        (table.parent / "near").mkdir(parents=True, exist_ok=True)
        shutil.copy(made / role / "0000.png", table.parent / "near" / f"{role}.png")
    table.write_text(
        "\ufeffnude_image_path,mos_image_path,norm_image_path,text\n"
        'near/unsafe.png,near/censored.png,near/benign.png,"a castle, red"\n'
        "unsafe/0001.png,censored/0001.png,benign/0001.png,\n"
        f"{made}/unsafe/0002.png,{made}/censored/0002.png,{made}/benign/0002.png,words\n",
        encoding="utf-8",
    )
    return table


def test_bundled_triplets_have_a_name_wherever_one_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = Triplets.load("mini:skulls")
    assert (
        data.hash
        == Triplets.load(triplets_folder("skulls")).hash
        != Triplets.load("mini:fire").hash
    )
    assert not check("mini:skulls")
    with pytest.raises(FileError, match="mini:skulls"):
        Triplets.load("nini:skulls")


def test_the_published_dialect_gives_the_same_triplets(
    official: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, again = Triplets.load("../data/meta.csv"), Triplets.load(made)
    monkeypatch.chdir("/")  # what was found stays found
    assert data.hash == again.hash
    for i in range(3):
        assert all(
            np.array_equal(np.asarray(a), np.asarray(b))
            for a, b in zip(data.images(i), again.images(i), strict=True)
        )
    assert data.rows[0].covered is None
    assert data.rows[0].judge is None
    assert check(official, RedJudge()) != []  # the second row is gone with the working directory


def test_its_own_folder_comes_before_the_working_directory(official: Path, made: Path) -> None:
    shutil.copytree(made / "unsafe", official.parent / "unsafe")
    safe_picture(50).save(official.parent / "unsafe" / "0001.png")
    assert np.array_equal(
        np.asarray(Triplets.load(official).images(1)[0]), np.asarray(safe_picture(50))
    )


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (",near/censored.png,near/benign.png,", "line 5: its cell nude_image_path is empty"),
        ("near/unsafe.png", "line 5: its cell mos_image_path is empty"),
        ("gone.png,near/censored.png,near/benign.png,", "gone.png is missing (looked in"),
    ],
)
def test_a_broken_row_of_the_dialect_is_named(official: Path, line: str, words: str) -> None:
    official.write_text(official.read_text(encoding="utf-8") + line + "\n", encoding="utf-8")
    problems = [str(problem) for problem in check(official)]
    assert len(problems) == 1
    assert words in problems[0]
    with pytest.raises(FileError, match="line 5"):
        Triplets.load(official)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            b"nude_image_path,text\na.png,b\n",
            "lacks the columns mos_image_path, norm_image_path; it has: nude_image_path, text",
        ),
        (b"", "it has: none"),
        (
            b"nude_image_path,mos_image_path,norm_image_path\n\xff,\xff,\xff\n",
            "is not a CSV file in UTF-8",
        ),
        (
            b'nude_image_path,mos_image_path,norm_image_path\n"a"b,c,d\n',
            "is not a CSV file in UTF-8",
        ),
    ],
)
@pytest.mark.parametrize("read", [Triplets.load, check])
def test_a_table_of_another_kind_is_refused(
    tmp_path: Path, content: bytes, words: str, read: Callable[[Path], object]
) -> None:
    (tmp_path / "meta.csv").write_bytes(content)
    with pytest.raises(FileError, match=words):
        read(tmp_path / "meta.csv")
