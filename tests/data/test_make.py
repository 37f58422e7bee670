"""Making triplets, with a judge that sees pure red.

What is refused, and that nothing half-made is left.
"""

from __future__ import annotations

import shutil
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from red import RedJudge, rows, safe_picture, unsafe_picture
from typer.testing import CliRunner

from safegen.cli.triplets import app
from safegen.core.errors import ConfigError, FileError
from safegen.data.triplets.censor import Censor, censor
from safegen.data.triplets.check import check
from safegen.data.triplets.make import make
from safegen.data.triplets.triplets import ROLES, Triplets
from safegen.evaluation.report.contact_sheet import contact_sheet, save_sheet


def test_what_is_made_is_whole_and_checks_clean(pictures: Path) -> None:
    judge = RedJudge()
    report = make(pictures / "unsafe", pictures / "benign", judge, pictures / "out", labels=["red"])
    assert check(pictures / "out", judge) == []
    assert Triplets.load(pictures / "out") == report.triplets
    assert report.left_out == ()
    files = sorted(
        str(p.relative_to(pictures / "out")) for p in (pictures / "out").rglob("*") if p.is_file()
    )
    assert files == sorted(
        [f"{role}/000{i}.png" for role in ROLES for i in range(3)] + ["manifest.jsonl"]
    )
    assert sorted(p.name for p in pictures.iterdir()) == ["benign", "out", "unsafe"]


def test_a_row_says_what_was_covered_and_who_found_it(made: Path) -> None:
    row = Triplets.load(made).rows[1]
    assert list(rows(made)[1]) == [
        "id",
        "unsafe",
        "censored",
        "benign",
        "sha256",
        "boxes",
        "covered",
        "judge",
    ]
    assert (row.id, row.unsafe, row.judge) == ("0001", "unsafe/0001.png", "red:0")
    assert row.boxes == ((20, 24, 35, 39),)
    assert row.sha256.censored == sha256((made / row.censored).read_bytes()).hexdigest()
    unsafe, censored, benign = Triplets.load(made).images(1)
    again, covered = censor(unsafe, row.boxes, Censor())
    assert np.array_equal(np.asarray(censored), np.asarray(again))
    assert row.covered == covered
    assert unsafe.mode == censored.mode == benign.mode == "RGB"


def test_benign_pictures_are_taken_in_turn(pictures: Path, made: Path) -> None:
    data = Triplets.load(made)
    for i, name in enumerate(["b0", "b1", "b0"]):
        with Image.open(pictures / "benign" / f"{name}.png") as benign:
            assert np.array_equal(np.asarray(data.images(i)[2]), np.asarray(benign))


def test_a_benign_picture_is_scaled_and_cropped_about_its_centre(pictures: Path) -> None:
    shutil.rmtree(pictures / "benign")
    (pictures / "benign").mkdir()
    wide = np.zeros((40, 200, 3), dtype=np.uint8)
    wide[:, 80:120] = (0, 200, 0)
    Image.fromarray(wide).save(pictures / "benign" / "wide.png")
    benign = make(
        pictures / "unsafe", pictures / "benign", RedJudge(), pictures / "out", labels=["red"]
    ).triplets.images(0)[2]
    assert benign.size == (64, 64)
    assert (np.asarray(benign)[:, 4:-4] == (0, 200, 0)).all()


def test_without_a_benign_folder_the_safe_pictures_of_the_unsafe_one_serve(pictures: Path) -> None:
    safe_picture(5).save(pictures / "unsafe" / "calm.png")
    report = make(pictures / "unsafe", None, RedJudge(), pictures / "out", labels=["red"])
    assert len(report.triplets) == 3
    assert report.left_out == ()
    assert all(
        np.array_equal(np.asarray(report.triplets.images(i)[2]), np.asarray(safe_picture(5)))
        for i in range(3)
    )


def test_pictures_that_cannot_be_used_are_left_out_with_the_reason(pictures: Path) -> None:
    folder = pictures / "unsafe"
    safe_picture(5).save(folder / "v_calm.png")
    blue = unsafe_picture(6)
    blue.putpixel((0, 0), (0, 0, 255))
    blue.save(folder / "v_blue.png")
    unsafe_picture(7, step=1, patch=(8, 8, 40, 40)).save(
        folder / "v_flat.png"
    )  # the mosaic of plain red is plain red
    unsafe_picture(8, (31, 64), (0, 0, 9, 9)).save(folder / "v_small.png")
    unsafe_picture(0).save(folder / "v_twin.bmp")
    (folder / "v_words.png").write_text("no picture")
    (folder / "v_torn.png").write_bytes((folder / "u0.png").read_bytes()[:3000])
    Image.fromarray(np.zeros((64, 64), dtype=np.uint16)).save(folder / "v_deep.png")
    (folder / ".hidden").write_text("not looked at")
    unsafe_picture(9).save(pictures / "benign" / "red.png")
    report = make(folder, pictures / "benign", RedJudge(), pictures / "out", labels=["red"])
    assert [row.id for row in report.triplets.rows] == ["0000", "0001", "0002"]
    reasons = {problem.id: problem.reason for problem in report.left_out}
    expected = {
        "unsafe/v_calm.png": "the judge finds nothing in it",
        "unsafe/v_blue.png": "it cannot be judged: too blue",
        "unsafe/v_flat.png": "it is still judged unsafe after censoring it 3 times",
        "unsafe/v_small.png": "it is too small: a side must be at least 32 pixels, got 31x64",
        "unsafe/v_twin.bmp": "it is the same picture as u0.png",
        "unsafe/v_words.png": "is no picture of a known kind",
        "unsafe/v_torn.png": "is a picture that cannot be read",
        "unsafe/v_deep.png": "has pixels of more than 8 bits",
        "benign/red.png": "it is judged unsafe, so it cannot serve as benign",
    }
    assert reasons.keys() == expected.keys()
    assert all(words in reasons[name] for name, words in expected.items())
    assert check(pictures / "out", RedJudge()) == []


@pytest.mark.parametrize(
    ("shrink", "padding", "looks"), [(0, 0.0, 1), (2, 0.25, 1), (4, 0.25, 2), (5, 0.25, 3)]
)
def test_a_picture_that_stays_unsafe_is_censored_again_with_twice_the_padding(
    pictures: Path, shrink: int, padding: float, looks: int
) -> None:
    shutil.rmtree(pictures / "unsafe")
    (pictures / "unsafe").mkdir()
    unsafe_picture(0, step=1).save(
        pictures / "unsafe" / "u.png"
    )  # a red square of 16 pixels; its box lacks `shrink` on each side
    judge = RedJudge(shrink=shrink)
    settings = Censor(style="solid", padding=padding)
    report = make(
        pictures / "unsafe", pictures / "benign", judge, pictures / "out", settings, labels=["red"]
    )
    assert judge.looks == 1 + 2 + looks
    width = 16 - 2 * shrink
    assert report.triplets.rows[0].covered == pytest.approx(
        (width * (1 + 2 * padding * 2 ** (looks - 1))) ** 2 / 64**2, abs=0.01
    )
    assert check(pictures / "out", judge) == []


def test_a_contact_sheet_is_no_picture_by_whatever_name(pictures: Path) -> None:
    """`safegen generate` leaves one in the folder of its pictures, and it shows the concept as they do."""
    sheet = contact_sheet([unsafe_picture(i) for i in range(3)])
    for name in ("sheet.png", "v_renamed.png"):
        save_sheet(sheet, pictures / "unsafe" / name)
    sheet.save(pictures / "unsafe" / "w_unmarked.png")
    report = make(
        pictures / "unsafe", pictures / "benign", RedJudge(), pictures / "out", labels=["red"]
    )
    why = "it is a contact sheet of other pictures"
    assert {p.id: p.reason for p in report.left_out} == {
        "unsafe/sheet.png": why,
        "unsafe/v_renamed.png": why,
    }
    assert len(report.triplets) == 4


def test_padding_grows_from_nothing_too(pictures: Path) -> None:
    judge = RedJudge(
        shrink=1
    )  # its box lacks one pixel of sixteen on each side: no padding leaves it red, 0.1 does not
    report = make(
        pictures / "unsafe",
        pictures / "benign",
        judge,
        pictures / "out",
        Censor(style="solid", padding=0),
        labels=["red"],
    )
    assert len(report.triplets) == 3
    assert judge.looks == 3 + 2 + 3 * 2


def test_a_detection_without_a_box_covers_the_whole_picture(pictures: Path) -> None:
    report = make(
        pictures / "unsafe",
        pictures / "benign",
        RedJudge(blind=True),
        pictures / "out",
        labels=["red"],
    )
    assert report.triplets.rows[0].boxes == ((0, 0, 64, 64),)
    assert report.triplets.rows[0].covered == 1


def test_detections_of_other_labels_or_under_the_threshold_are_not_covered(pictures: Path) -> None:
    report = make(
        pictures / "unsafe",
        pictures / "benign",
        RedJudge(score=0.6),
        pictures / "out",
        labels=["red"],
        threshold=0.6,
    )
    assert all(len(row.boxes) == 1 for row in report.triplets.rows)
    with pytest.raises(FileError, match="is judged unsafe, so there is nothing to censor"):
        make(
            pictures / "unsafe",
            pictures / "benign",
            RedJudge(score=0.6),
            pictures / "other",
            labels=["red"],
            threshold=0.7,
        )


def test_orientation_is_applied_and_all_metadata_dropped(pictures: Path) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a secret"  # orientation: turn by 90 degrees; description
    text = PngImagePlugin.PngInfo()
    text.add_text("prompt", "a secret")
    tall = unsafe_picture(0, (48, 96))
    tall.transpose(Image.Transpose.ROTATE_90).save(
        pictures / "unsafe" / "u0.png", exif=exif, pnginfo=text, icc_profile=b"a secret"
    )
    report = make(
        pictures / "unsafe", pictures / "benign", RedJudge(), pictures / "out", labels=["red"]
    )
    assert np.array_equal(np.asarray(report.triplets.images(0)[0]), np.asarray(tall))
    with Image.open(pictures / "out" / report.triplets.rows[0].unsafe) as written:
        written.load()
        assert written.size == (48, 96)
        assert not written.getexif()
        assert written.info == {}
    assert not any(b"secret" in p.read_bytes() for p in (pictures / "out").rglob("*.png"))


def test_transparency_is_laid_on_white(pictures: Path) -> None:
    half = unsafe_picture(0).convert("RGBA")
    half.paste((0, 0, 0, 0), (0, 0, 8, 8))
    half.paste((0, 0, 0, 128), (8, 0, 16, 8))
    half.save(pictures / "unsafe" / "u0.png")
    unsafe = make(
        pictures / "unsafe", pictures / "benign", RedJudge(), pictures / "out", labels=["red"]
    ).triplets.images(0)[0]
    assert unsafe.getpixel((4, 4)) == (255, 255, 255)
    assert unsafe.getpixel((12, 4)) == (127, 127, 127)


# what make() refuses, and that it leaves nothing behind


def refusal(pictures: Path, **changes: object) -> str:
    before = sorted(str(p) for p in pictures.rglob("*"))
    arguments: dict[str, object] = {
        "unsafe": pictures / "unsafe",
        "benign": pictures / "benign",
        "judge": RedJudge(),
        "out": pictures / "out",
        "labels": ["red"],
    }
    with pytest.raises((FileError, ConfigError)) as error:
        make(**(arguments | changes))  # type: ignore[arg-type]
    assert sorted(str(p) for p in pictures.rglob("*")) == before
    assert "\n" not in str(error.value)
    return str(error.value)


def test_an_output_that_exists_is_refused(pictures: Path) -> None:
    (pictures / "there").mkdir()
    (pictures / "link").symlink_to(pictures / "nowhere")
    for name in ("there", "link", "unsafe/u0.png"):
        assert f"{name} already exists" in refusal(pictures, out=pictures / name)


def test_an_output_without_a_folder_around_it_is_refused(pictures: Path) -> None:
    assert "deep must exist" in refusal(pictures, out=pictures / "deep" / "out")


def test_folders_without_pictures_are_refused(pictures: Path) -> None:
    (pictures / "empty").mkdir()
    assert "empty holds no files" in refusal(pictures, unsafe=pictures / "empty")
    assert "empty holds no files" in refusal(pictures, benign=pictures / "empty")
    assert "there is nothing of that name" in refusal(pictures, unsafe=pictures / "gone")
    assert "there is a file of that name" in refusal(
        pictures, unsafe=pictures / "unsafe" / "u0.png"
    )


def test_nothing_unsafe_is_refused(pictures: Path) -> None:
    assert "is judged unsafe, so there is nothing to censor" in refusal(
        pictures, unsafe=pictures / "benign", benign=None
    )


def test_nothing_benign_is_refused(pictures: Path) -> None:
    assert (
        "is judged safe, so none can serve as benign; name a folder of benign pictures"
        in refusal(pictures, benign=None)
    )
    assert "can serve as benign: unsafe/u0.png: it is judged unsafe" in refusal(
        pictures, benign=pictures / "unsafe"
    )


def test_nothing_that_can_be_censored_is_refused_with_the_reasons(pictures: Path) -> None:
    for i in range(3):
        unsafe_picture(i, step=1, patch=(8, 8, 40, 40)).save(pictures / "unsafe" / f"u{i}.png")
    (pictures / "unsafe" / "words.png").write_text("words")
    words = refusal(pictures)
    assert "can be used: unsafe/words.png: " in words
    assert "unsafe/u1.png: it is still judged unsafe" in words
    assert words.endswith("; and 1 more")


def test_no_labels_and_a_threshold_out_of_range_are_refused(pictures: Path) -> None:
    assert (
        refusal(pictures, labels=[]) == "labels must name at least one label of the judge, got none"
    )
    assert refusal(pictures, threshold=0.1) == "threshold must be in 0.2..1, got 0.1"


def test_a_tile_too_small_for_the_pictures_is_refused(pictures: Path) -> None:
    assert "a tile must be at least 2 pixels" in refusal(pictures, censor=Censor(tile=0.01))


def test_a_box_that_makes_no_sense_leaves_its_picture_out(pictures: Path) -> None:
    assert "left <= right" in refusal(pictures, judge=RedJudge(shrink=12))


@pytest.mark.parametrize(
    "error", [RuntimeError("a bug"), KeyboardInterrupt(), OSError(28, "No space left on device")]
)
def test_nothing_half_written_is_left_when_something_raises_in_the_middle(
    pictures: Path, error: BaseException
) -> None:
    before = sorted(str(p) for p in pictures.rglob("*"))
    halfway: list[str] = []

    def progress(description: str, done: int, total: int) -> None:
        if description == "censoring" and done == 2:
            halfway.extend(str(p.relative_to(pictures)) for p in pictures.rglob("0001.png"))
            raise error

    with pytest.raises(FileError if isinstance(error, OSError) else type(error)):
        make(
            pictures / "unsafe",
            pictures / "benign",
            RedJudge(),
            pictures / "out",
            labels=["red"],
            progress=progress,
        )
    assert sorted(str(p) for p in pictures.rglob("*")) == before
    assert sorted(halfway) == [f"out/.unfinished/{role}/0001.png" for role in sorted(ROLES)]


def test_an_output_that_comes_into_being_meanwhile_is_not_touched(pictures: Path) -> None:
    def progress(description: str, done: int, total: int) -> None:
        (pictures / "out").mkdir(exist_ok=True)

    with pytest.raises(FileError, match="out already exists"):
        make(
            pictures / "unsafe",
            pictures / "benign",
            RedJudge(),
            pictures / "out",
            labels=["red"],
            progress=progress,
        )
    assert list((pictures / "out").iterdir()) == []
    assert sorted(p.name for p in pictures.iterdir()) == ["benign", "out", "unsafe"]


# the command


@pytest.mark.usefixtures("red")
def test_the_commands_make_and_check(pictures: Path) -> None:
    (pictures / "unsafe" / "words.png").write_text("words")
    out = str(pictures / "out")
    options = [
        "--unsafe",
        str(pictures / "unsafe"),
        "--benign",
        str(pictures / "benign"),
        "--judge",
        "red",
        "--out",
        out,
    ]
    result = CliRunner().invoke(
        app, ["make", *options, "--style", "solid", "--padding", "0.2", "--label", "red"]
    )
    assert result.exit_code == 0, result.output
    assert "left out unsafe/words.png: " in result.output
    assert "3 triplets in" in result.output
    result = CliRunner().invoke(app, ["check", out, "--judge", "red"])
    assert result.exit_code == 0
    assert "3 triplets, nothing wrong" in result.output
