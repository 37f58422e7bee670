"""Loading of triplets: images, manifests, and the published CSV."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from red import RedJudge, safe_image

from safegen.core.errors import FileError
from safegen.data.images import read_image
from safegen.data.triplets.censor import Box
from safegen.data.triplets.check import check_triplets
from safegen.data.triplets.triplets import ROLES, Triplets
from safegen.mini.bundle import triplets_folder


@pytest.mark.parametrize("mode", ["L", "LA", "P", "PA", "1", "CMYK", "YCbCr"])
def test_an_image_of_any_common_mode_is_read_as_rgb(mode: str, tmp_path: Path) -> None:
    file = tmp_path / ("image.jpg" if mode in ("CMYK", "YCbCr") else "image.tif")
    safe_image(0).convert("P" if mode == "PA" else mode).convert(mode).save(file)
    assert read_image(file).mode == "RGB"


def test_the_hash_depends_on_contents_only(made: Path, tmp_path: Path) -> None:
    before = Triplets.load(made).hash
    shutil.copytree(made, tmp_path / "moved")
    assert Triplets.load(tmp_path / "moved").hash == before
    lines = (made / "manifest.jsonl").read_text().splitlines()
    (made / "manifest.jsonl").write_text("\n".join(reversed(lines)))
    assert Triplets.load(made).hash != before


def test_a_changed_image_is_refused(made: Path) -> None:
    data = Triplets.load(made)
    safe_image(99).save(made / "censored" / "0001.png")
    data.images(0)
    with pytest.raises(FileError, match="is not the file of the manifest: its SHA-256 differs"):
        data.images(1)


def test_boxes_are_plain_numbers(made: Path) -> None:
    box: Box = Triplets.load(made).rows[0].boxes[0]
    assert all(isinstance(v, float) for v in box)


# the published dialect


@pytest.fixture
def official(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a CSV with paths relative to its folder, to the working directory, and absolute."""
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


def test_bundled_triplets_are_loaded_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = Triplets.load("mini:skulls")
    assert (
        data.hash
        == Triplets.load(triplets_folder("skulls")).hash
        != Triplets.load("mini:fire").hash
    )
    assert not check_triplets("mini:skulls")
    with pytest.raises(FileError, match="mini:skulls"):
        Triplets.load("nini:skulls")


def test_the_published_csv_gives_the_same_triplets(
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
    assert (
        check_triplets(official, RedJudge()) != []
    )  # the second row is gone with the working directory


def test_the_csvs_folder_precedes_the_working_directory(official: Path, made: Path) -> None:
    shutil.copytree(made / "unsafe", official.parent / "unsafe")
    safe_image(50).save(official.parent / "unsafe" / "0001.png")
    assert np.array_equal(
        np.asarray(Triplets.load(official).images(1)[0]), np.asarray(safe_image(50))
    )


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (",near/censored.png,near/benign.png,", "line 5: the cell nude_image_path is empty"),
        ("near/unsafe.png", "line 5: the cell mos_image_path is empty"),
        ("gone.png,near/censored.png,near/benign.png,", "gone.png is missing (searched in"),
    ],
)
def test_an_invalid_csv_row_is_named(official: Path, line: str, words: str) -> None:
    official.write_text(official.read_text(encoding="utf-8") + line + "\n", encoding="utf-8")
    problems = [str(problem) for problem in check_triplets(official)]
    assert len(problems) == 1
    assert words in problems[0]
    with pytest.raises(FileError, match="line 5"):
        Triplets.load(official)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            b"nude_image_path,text\na.png,b\n",
            "lacks the columns mos_image_path, norm_image_path. It has: nude_image_path, text",
        ),
        (b"", "It has: none"),
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
@pytest.mark.parametrize("read", [Triplets.load, check_triplets])
def test_another_csv_is_refused(
    tmp_path: Path, content: bytes, words: str, read: Callable[[Path], object]
) -> None:
    (tmp_path / "meta.csv").write_bytes(content)
    with pytest.raises(FileError, match=words):
        read(tmp_path / "meta.csv")
