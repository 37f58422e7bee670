"""`make_triplets` with a judge that detects pure red."""

from __future__ import annotations

import shutil
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from red import RedJudge, rows, safe_image, unsafe_image
from typer.testing import CliRunner

from safegen.cli.data.triplets import app
from safegen.core.errors import ConfigError, FileError
from safegen.data.triplets.censor import Censor, censor_image
from safegen.data.triplets.check import check_triplets
from safegen.data.triplets.make import make_triplets, make_triplets_in_memory
from safegen.data.triplets.triplets import ROLES, Triplets
from safegen.evaluation.report.contact_sheet import contact_sheet, save_sheet


def test_triplets_are_complete_and_pass_the_check(images: Path) -> None:
    judge = RedJudge()
    result = make_triplets(
        images / "unsafe", images / "benign", judge, images / "out", labels=["red"]
    )
    assert check_triplets(images / "out", judge) == []
    assert Triplets.load(images / "out") == result.triplets
    assert result.skipped == ()
    files = sorted(
        str(p.relative_to(images / "out")) for p in (images / "out").rglob("*") if p.is_file()
    )
    assert files == sorted(
        [f"{role}/000{i}.png" for role in ROLES for i in range(3)] + ["manifest.jsonl"]
    )
    assert sorted(p.name for p in images.iterdir()) == ["benign", "out", "unsafe"]


def test_a_row_has_boxes_coverage_and_judge(made: Path) -> None:
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
    again, covered = censor_image(unsafe, row.boxes, Censor())
    assert np.array_equal(np.asarray(censored), np.asarray(again))
    assert row.covered == covered
    assert unsafe.mode == censored.mode == benign.mode == "RGB"


def test_benign_images_are_used_in_turn(images: Path, made: Path) -> None:
    data = Triplets.load(made)
    for i, name in enumerate(["b0", "b1", "b0"]):
        with Image.open(images / "benign" / f"{name}.png") as benign:
            assert np.array_equal(np.asarray(data.images(i)[2]), np.asarray(benign))


def test_a_benign_image_is_scaled_and_center_cropped(images: Path) -> None:
    shutil.rmtree(images / "benign")
    (images / "benign").mkdir()
    wide = np.zeros((40, 200, 3), dtype=np.uint8)
    wide[:, 80:120] = (0, 200, 0)
    Image.fromarray(wide).save(images / "benign" / "wide.png")
    benign = make_triplets(
        images / "unsafe", images / "benign", RedJudge(), images / "out", labels=["red"]
    ).triplets.images(0)[2]
    assert benign.size == (64, 64)
    assert (np.asarray(benign)[:, 4:-4] == (0, 200, 0)).all()


def test_without_a_benign_folder_safe_images_of_the_unsafe_folder_are_used(images: Path) -> None:
    safe_image(5).save(images / "unsafe" / "calm.png")
    result = make_triplets(images / "unsafe", None, RedJudge(), images / "out", labels=["red"])
    assert len(result.triplets) == 3
    assert result.skipped == ()
    assert all(
        np.array_equal(np.asarray(result.triplets.images(i)[2]), np.asarray(safe_image(5)))
        for i in range(3)
    )


def test_unusable_images_are_skipped_with_the_reason(images: Path) -> None:
    folder = images / "unsafe"
    safe_image(5).save(folder / "v_calm.png")
    blue = unsafe_image(6)
    blue.putpixel((0, 0), (0, 0, 255))
    blue.save(folder / "v_blue.png")
    unsafe_image(7, step=1, patch=(8, 8, 40, 40)).save(
        folder / "v_flat.png"
    )  # the mosaic of plain red is plain red
    unsafe_image(8, (31, 64), (0, 0, 9, 9)).save(folder / "v_small.png")
    unsafe_image(0).save(folder / "v_twin.bmp")
    (folder / "v_words.png").write_text("no image")
    (folder / "v_torn.png").write_bytes((folder / "u0.png").read_bytes()[:3000])
    Image.fromarray(np.zeros((64, 64), dtype=np.uint16)).save(folder / "v_deep.png")
    (folder / ".hidden").write_text("not looked at")
    unsafe_image(9).save(images / "benign" / "red.png")
    result = make_triplets(folder, images / "benign", RedJudge(), images / "out", labels=["red"])
    assert [row.id for row in result.triplets.rows] == ["0000", "0001", "0002"]
    reasons = {problem.id: problem.reason for problem in result.skipped}
    expected = {
        "unsafe/v_calm.png": "no detection",
        "unsafe/v_blue.png": "the image cannot be judged: too blue",
        "unsafe/v_flat.png": "still judged unsafe after 3 attempts",
        "unsafe/v_small.png": "too small: a side must be at least 32 pixels, got 31x64",
        "unsafe/v_twin.bmp": "the image repeats u0.png",
        "unsafe/v_words.png": "is not an image of a known format",
        "unsafe/v_torn.png": "is an image that cannot be read",
        "unsafe/v_deep.png": "must have 8 bits per channel",
        "benign/red.png": "judged unsafe, so not benign",
    }
    assert reasons.keys() == expected.keys()
    assert all(words in reasons[name] for name, words in expected.items())
    assert check_triplets(images / "out", RedJudge()) == []


@pytest.mark.parametrize(
    ("shrink", "padding", "looks"), [(0, 0.0, 1), (2, 0.25, 1), (4, 0.25, 2), (5, 0.25, 3)]
)
def test_an_image_that_stays_unsafe_is_censored_with_twice_the_padding(
    images: Path, shrink: int, padding: float, looks: int
) -> None:
    shutil.rmtree(images / "unsafe")
    (images / "unsafe").mkdir()
    unsafe_image(0, step=1).save(
        images / "unsafe" / "u.png"
    )  # a red square of 16 pixels; its box lacks `shrink` on each side
    judge = RedJudge(shrink=shrink)
    settings = Censor(style="solid", padding=padding)
    result = make_triplets(
        images / "unsafe", images / "benign", judge, images / "out", settings, labels=["red"]
    )
    assert judge.looks == 1 + 2 + looks
    width = 16 - 2 * shrink
    assert result.triplets.rows[0].covered == pytest.approx(
        (width * (1 + 2 * padding * 2 ** (looks - 1))) ** 2 / 64**2, abs=0.01
    )
    assert check_triplets(images / "out", judge) == []


def test_a_contact_sheet_is_skipped_under_any_name(images: Path) -> None:
    """`safegen generate` writes one next to its images."""
    sheet = contact_sheet([unsafe_image(i) for i in range(3)])
    for name in ("sheet.png", "v_renamed.png"):
        save_sheet(sheet, images / "unsafe" / name)
    sheet.save(images / "unsafe" / "w_unmarked.png")
    result = make_triplets(
        images / "unsafe", images / "benign", RedJudge(), images / "out", labels=["red"]
    )
    why = "the image is a contact sheet of other images"
    assert {p.id: p.reason for p in result.skipped} == {
        "unsafe/sheet.png": why,
        "unsafe/v_renamed.png": why,
    }
    assert len(result.triplets) == 4


def test_padding_grows_from_zero(images: Path) -> None:
    judge = RedJudge(
        shrink=1
    )  # its box lacks one pixel of sixteen on each side: no padding leaves it red, 0.1 does not
    result = make_triplets(
        images / "unsafe",
        images / "benign",
        judge,
        images / "out",
        Censor(style="solid", padding=0),
        labels=["red"],
    )
    assert len(result.triplets) == 3
    assert judge.looks == 3 + 2 + 3 * 2


def test_a_detection_without_a_box_covers_the_whole_image(images: Path) -> None:
    result = make_triplets(
        images / "unsafe", images / "benign", RedJudge(blind=True), images / "out", labels=["red"]
    )
    assert result.triplets.rows[0].boxes == ((0, 0, 64, 64),)
    assert result.triplets.rows[0].covered == 1


def test_detections_of_other_labels_or_under_the_threshold_are_not_covered(images: Path) -> None:
    result = make_triplets(
        images / "unsafe",
        images / "benign",
        RedJudge(score=0.6),
        images / "out",
        labels=["red"],
        threshold=0.6,
    )
    assert all(len(row.boxes) == 1 for row in result.triplets.rows)
    with pytest.raises(FileError, match="is judged unsafe, so none can be censored"):
        make_triplets(
            images / "unsafe",
            images / "benign",
            RedJudge(score=0.6),
            images / "other",
            labels=["red"],
            threshold=0.7,
        )


def test_orientation_is_applied_and_metadata_is_dropped(images: Path) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a secret"  # orientation: turn by 90 degrees; description
    text = PngImagePlugin.PngInfo()
    text.add_text("prompt", "a secret")
    tall = unsafe_image(0, (48, 96))
    tall.transpose(Image.Transpose.ROTATE_90).save(
        images / "unsafe" / "u0.png", exif=exif, pnginfo=text, icc_profile=b"a secret"
    )
    result = make_triplets(
        images / "unsafe", images / "benign", RedJudge(), images / "out", labels=["red"]
    )
    assert np.array_equal(np.asarray(result.triplets.images(0)[0]), np.asarray(tall))
    with Image.open(images / "out" / result.triplets.rows[0].unsafe) as written:
        written.load()
        assert written.size == (48, 96)
        assert not written.getexif()
        assert written.info == {}
    assert not any(b"secret" in p.read_bytes() for p in (images / "out").rglob("*.png"))


def test_transparency_becomes_white(images: Path) -> None:
    half = unsafe_image(0).convert("RGBA")
    half.paste((0, 0, 0, 0), (0, 0, 8, 8))
    half.paste((0, 0, 0, 128), (8, 0, 16, 8))
    half.save(images / "unsafe" / "u0.png")
    unsafe = make_triplets(
        images / "unsafe", images / "benign", RedJudge(), images / "out", labels=["red"]
    ).triplets.images(0)[0]
    assert unsafe.getpixel((4, 4)) == (255, 255, 255)
    assert unsafe.getpixel((12, 4)) == (127, 127, 127)


# what make() refuses, and that it leaves nothing behind


def refusal(images: Path, **changes: object) -> str:
    before = sorted(str(p) for p in images.rglob("*"))
    arguments: dict[str, object] = {
        "unsafe": images / "unsafe",
        "benign": images / "benign",
        "judge": RedJudge(),
        "output": images / "out",
        "labels": ["red"],
    }
    with pytest.raises((FileError, ConfigError)) as error:
        make_triplets(**(arguments | changes))  # type: ignore[arg-type]
    assert sorted(str(p) for p in images.rglob("*")) == before
    assert "\n" not in str(error.value)
    return str(error.value)


def test_an_output_that_exists_is_refused(images: Path) -> None:
    (images / "there").mkdir()
    (images / "link").symlink_to(images / "nowhere")
    for name in ("there", "link", "unsafe/u0.png"):
        assert f"{name} already exists" in refusal(images, output=images / name)


def test_an_output_without_a_parent_is_refused(images: Path) -> None:
    assert "deep does not exist. Create it." in refusal(images, output=images / "deep" / "out")


def test_folders_without_images_are_refused(images: Path) -> None:
    (images / "empty").mkdir()
    assert "empty has no files" in refusal(images, unsafe=images / "empty")
    assert "empty has no files" in refusal(images, benign=images / "empty")
    assert "must be a folder of images, got nothing" in refusal(images, unsafe=images / "gone")
    file = images / "unsafe" / "u0.png"
    assert "must be a folder of images, got a file" in refusal(images, unsafe=file)


def test_no_unsafe_image_is_refused(images: Path) -> None:
    assert "is judged unsafe, so none can be censored" in refusal(
        images, unsafe=images / "benign", benign=None
    )


def test_no_benign_image_is_refused(images: Path) -> None:
    assert "is judged safe, so none is benign. Give a folder of benign ones." in refusal(
        images, benign=None
    )
    assert "can serve as benign: unsafe/u0.png: judged unsafe" in refusal(
        images, benign=images / "unsafe"
    )


def test_no_usable_image_is_refused_with_the_reasons(images: Path) -> None:
    for i in range(3):
        unsafe_image(i, step=1, patch=(8, 8, 40, 40)).save(images / "unsafe" / f"u{i}.png")
    (images / "unsafe" / "words.png").write_text("words")
    words = refusal(images)
    assert "can be used: unsafe/words.png: " in words
    assert "unsafe/u1.png: still judged unsafe" in words
    assert words.endswith("; and 1 more")


def test_no_labels_and_a_threshold_out_of_range_are_refused(images: Path) -> None:
    assert (
        refusal(images, labels=[]) == "labels must name at least one label of the judge, got none"
    )
    assert refusal(images, threshold=0.1) == "threshold must be in 0.2..1, got 0.1"


def test_a_tile_too_small_for_the_images_is_refused(images: Path) -> None:
    assert "a tile must be at least 2 pixels" in refusal(images, censor=Censor(tile=0.01))


def test_an_image_with_an_invalid_box_is_skipped(images: Path) -> None:
    assert "left <= right" in refusal(images, judge=RedJudge(shrink=12))


@pytest.mark.parametrize(
    "error", [RuntimeError("a bug"), KeyboardInterrupt(), OSError(28, "No space left on device")]
)
def test_an_exception_leaves_no_partial_output(images: Path, error: BaseException) -> None:
    before = sorted(str(p) for p in images.rglob("*"))
    halfway: list[str] = []

    def progress(description: str, done: int, total: int) -> None:
        if description == "censoring" and done == 2:
            halfway.extend(str(p.relative_to(images)) for p in images.rglob("0001.png"))
            raise error

    with pytest.raises(FileError if isinstance(error, OSError) else type(error)):
        make_triplets(
            images / "unsafe",
            images / "benign",
            RedJudge(),
            images / "out",
            labels=["red"],
            progress=progress,
        )
    assert sorted(str(p) for p in images.rglob("*")) == before
    folders = {tuple(name.split("/")[::2]) for name in halfway}
    assert sorted(folders) == [("out.unfinished", role) for role in sorted(ROLES)]


def test_an_output_created_meanwhile_is_not_touched(images: Path) -> None:
    def progress(description: str, done: int, total: int) -> None:
        (images / "out").mkdir(exist_ok=True)

    with pytest.raises(FileError, match="out already exists"):
        make_triplets(
            images / "unsafe",
            images / "benign",
            RedJudge(),
            images / "out",
            labels=["red"],
            progress=progress,
        )
    assert list((images / "out").iterdir()) == []
    assert sorted(p.name for p in images.iterdir()) == ["benign", "out", "unsafe"]


# the command


@pytest.mark.usefixtures("red")
def test_the_commands_make_and_check(images: Path) -> None:
    (images / "unsafe" / "words.png").write_text("words")
    out = str(images / "out")
    options = [
        "--unsafe",
        str(images / "unsafe"),
        "--benign",
        str(images / "benign"),
        "--judge",
        "red",
        "--out",
        out,
    ]
    result = CliRunner().invoke(
        app, ["make", *options, "--style", "solid", "--padding", "0.2", "--label", "red"]
    )
    assert result.exit_code == 0, result.output
    assert "skipped unsafe/words.png: " in result.output
    assert "3 triplets in" in result.output
    result = CliRunner().invoke(app, ["check", out, "--judge", "red"])
    assert result.exit_code == 0
    assert "3 triplets, no problems" in result.output


def test_triplets_in_memory_are_those_of_files_with_the_same_images(images: Path) -> None:
    judge = RedJudge()
    files = make_triplets(
        images / "unsafe", images / "benign", judge, images / "out", labels=["red"]
    ).triplets
    unsafe, benign = ([unsafe_image(i) for i in range(3)], [safe_image(10 + i) for i in range(2)])
    before = sorted(images.rglob("*"))
    memory = make_triplets_in_memory(
        [*unsafe, safe_image(7)], [*benign, unsafe_image(9)], judge, labels=["red"]
    )
    assert sorted(images.rglob("*")) == before
    assert [str(issue) for issue in memory.skipped] == [
        "unsafe image 3: no detection",
        "benign image 2: judged unsafe, so not benign",
    ]
    assert (memory.triplets.rows, memory.triplets.hash) == (files.rows, files.hash)
    for i in range(len(files)):
        pairs = zip(memory.triplets.images(i), files.images(i), strict=True)
        assert all(a.tobytes() == b.tobytes() for a, b in pairs)
    assert len(repr(memory.triplets)) < 5000  # the contents of the files are left out


def test_images_in_memory_without_the_concept_or_without_benign_ones_are_refused() -> None:
    judge = RedJudge()
    with pytest.raises(FileError, match="no image of generated images is judged unsafe"):
        make_triplets_in_memory([safe_image(1)], [safe_image(2)], judge, labels=["red"])
    with pytest.raises(FileError, match="no image of benign images can serve as benign"):
        make_triplets_in_memory([unsafe_image(1)], [unsafe_image(2)], judge, labels=["red"])
