"""Making, reading and checking triplets, with a judge that sees pure red."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from typer.testing import CliRunner

from safegen.cli.triplets import app
from safegen.data import triplets
from safegen.data.censor import Box, Censor, censor
from safegen.data.triplets import Problem, Triplets, check, make
from safegen.errors import BadFile, BadSetting
from safegen.judge.base import Detection, Verdict

T = TypeVar("T")
PATCH = (20, 24, 36, 40)
"""Where `unsafe_picture` is red, unless told."""


class RedJudge:
    """Sees pure red. `shrink` makes its boxes too small, `blind` has no boxes; a picture with a pure blue corner is beyond it."""

    def __init__(self, *, shrink: int = 0, blind: bool = False, score: float = 0.9) -> None:
        self.id, self.labels, self.threshold, self.looks = "red:0", ("red",), 0.5, 0
        self._shrink, self._blind, self._score = shrink, blind, score

    def judge(self, images: Sequence[Image.Image]) -> list[Verdict]:
        self.looks += len(images)
        return [self._look(np.asarray(image)) for image in images]

    def _look(self, pixels: np.ndarray) -> Verdict:
        if (pixels[0, 0] == (0, 0, 255)).all():
            return Verdict("unjudged", reason="too blue")
        ys, xs = (pixels == (255, 0, 0)).all(axis=-1).nonzero()
        if not len(ys):
            return Verdict("safe", (Detection("face", 0.9, (0.0, 0.0, 9.0, 9.0)),))
        s = self._shrink
        box = (float(xs.min() + s), float(ys.min() + s), float(xs.max() + 1 - s), float(ys.max() + 1 - s))
        return Verdict(
            "unsafe", (Detection("red", self._score, None if self._blind else box), Detection("face", 0.9, (0.0, 0.0, 9.0, 9.0)))
        )


def safe_picture(seed: int, size: tuple[int, int] = (64, 64)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(1, 255, (size[1], size[0], 3), dtype=np.uint8))


def unsafe_picture(seed: int, size: tuple[int, int] = (64, 64), patch: tuple[int, int, int, int] = PATCH, *, step: int = 2) -> Image.Image:
    """Noise with red dots, `step` pixels apart, in a patch."""
    pixels = np.array(safe_picture(seed, size))
    pixels[patch[1] : patch[3] : step, patch[0] : patch[2] : step] = (255, 0, 0)
    return Image.fromarray(pixels)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Three unsafe and two benign pictures."""
    for name in ("unsafe", "benign"):
        (tmp_path / name).mkdir()
    for i in range(3):
        unsafe_picture(i).save(tmp_path / "unsafe" / f"u{i}.png")
    for i in range(2):
        safe_picture(10 + i).save(tmp_path / "benign" / f"b{i}.png")
    return tmp_path


@pytest.fixture
def made(pictures: Path) -> Path:
    """A folder of three good triplets."""
    make(pictures / "unsafe", pictures / "benign", RedJudge(), pictures / "out", labels=["red"])
    return pictures / "out"


def left_out(report: triplets.Report) -> list[str]:
    return [str(problem) for problem in report.left_out]


def rows(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


# making and reading


def test_what_is_made_is_whole_and_checks_clean(pictures: Path) -> None:
    judge = RedJudge()
    report = make(pictures / "unsafe", pictures / "benign", judge, pictures / "out", labels=["red"])
    assert check(pictures / "out", judge) == []
    assert Triplets.load(pictures / "out") == report.triplets
    assert report.left_out == ()
    files = sorted(str(p.relative_to(pictures / "out")) for p in (pictures / "out").rglob("*") if p.is_file())
    assert files == sorted([f"{role}/000{i}.png" for role in triplets.ROLES for i in range(3)] + ["manifest.jsonl"])
    assert sorted(p.name for p in pictures.iterdir()) == ["benign", "out", "unsafe"]


def test_a_row_says_what_was_covered_and_who_found_it(made: Path) -> None:
    row = Triplets.load(made).rows[1]
    assert list(rows(made)[1]) == ["id", "unsafe", "censored", "benign", "sha256", "boxes", "covered", "judge"]
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
    benign = make(pictures / "unsafe", pictures / "benign", RedJudge(), pictures / "out", labels=["red"]).triplets.images(0)[2]
    assert benign.size == (64, 64)
    assert (np.asarray(benign)[:, 4:-4] == (0, 200, 0)).all()


def test_without_a_benign_folder_the_safe_pictures_of_the_unsafe_one_serve(pictures: Path) -> None:
    safe_picture(5).save(pictures / "unsafe" / "calm.png")
    report = make(pictures / "unsafe", None, RedJudge(), pictures / "out", labels=["red"])
    assert len(report.triplets) == 3
    assert report.left_out == ()
    assert all(np.array_equal(np.asarray(report.triplets.images(i)[2]), np.asarray(safe_picture(5))) for i in range(3))


def test_pictures_that_cannot_be_used_are_left_out_with_the_reason(pictures: Path) -> None:
    folder = pictures / "unsafe"
    safe_picture(5).save(folder / "v_calm.png")
    blue = unsafe_picture(6)
    blue.putpixel((0, 0), (0, 0, 255))
    blue.save(folder / "v_blue.png")
    unsafe_picture(7, step=1, patch=(8, 8, 40, 40)).save(folder / "v_flat.png")  # the mosaic of plain red is plain red
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


@pytest.mark.parametrize(("shrink", "padding", "looks"), [(0, 0.0, 1), (2, 0.25, 1), (4, 0.25, 2), (5, 0.25, 3)])
def test_a_picture_that_stays_unsafe_is_censored_again_with_twice_the_padding(
    pictures: Path, shrink: int, padding: float, looks: int
) -> None:
    shutil.rmtree(pictures / "unsafe")
    (pictures / "unsafe").mkdir()
    unsafe_picture(0, step=1).save(pictures / "unsafe" / "u.png")  # a red square of 16 pixels; its box lacks `shrink` on each side
    judge = RedJudge(shrink=shrink)
    settings = Censor(style="solid", padding=padding)
    report = make(pictures / "unsafe", pictures / "benign", judge, pictures / "out", settings, labels=["red"])
    assert judge.looks == 1 + 2 + looks
    width = 16 - 2 * shrink
    assert report.triplets.rows[0].covered == pytest.approx((width * (1 + 2 * padding * 2 ** (looks - 1))) ** 2 / 64**2, abs=0.01)
    assert check(pictures / "out", judge) == []


def test_padding_grows_from_nothing_too(pictures: Path) -> None:
    judge = RedJudge(shrink=1)  # its box lacks one pixel of sixteen on each side: no padding leaves it red, 0.1 does not
    report = make(pictures / "unsafe", pictures / "benign", judge, pictures / "out", Censor(style="solid", padding=0), labels=["red"])
    assert len(report.triplets) == 3
    assert judge.looks == 3 + 2 + 3 * 2


def test_a_detection_without_a_box_covers_the_whole_picture(pictures: Path) -> None:
    report = make(pictures / "unsafe", pictures / "benign", RedJudge(blind=True), pictures / "out", labels=["red"])
    assert report.triplets.rows[0].boxes == ((0, 0, 64, 64),)
    assert report.triplets.rows[0].covered == 1


def test_detections_of_other_labels_or_under_the_threshold_are_not_covered(pictures: Path) -> None:
    report = make(pictures / "unsafe", pictures / "benign", RedJudge(score=0.6), pictures / "out", labels=["red"], threshold=0.6)
    assert all(len(row.boxes) == 1 for row in report.triplets.rows)
    with pytest.raises(BadFile, match="is judged unsafe, so there is nothing to censor"):
        make(pictures / "unsafe", pictures / "benign", RedJudge(score=0.6), pictures / "other", labels=["red"], threshold=0.7)


def test_orientation_is_applied_and_all_metadata_dropped(pictures: Path) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a secret"  # orientation: turn by 90 degrees; description
    text = PngImagePlugin.PngInfo()
    text.add_text("prompt", "a secret")
    tall = unsafe_picture(0, (48, 96))
    tall.transpose(Image.Transpose.ROTATE_90).save(pictures / "unsafe" / "u0.png", exif=exif, pnginfo=text, icc_profile=b"a secret")
    report = make(pictures / "unsafe", pictures / "benign", RedJudge(), pictures / "out", labels=["red"])
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
    unsafe = make(pictures / "unsafe", pictures / "benign", RedJudge(), pictures / "out", labels=["red"]).triplets.images(0)[0]
    assert unsafe.getpixel((4, 4)) == (255, 255, 255)
    assert unsafe.getpixel((12, 4)) == (127, 127, 127)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "PA", "1", "CMYK", "YCbCr"])
def test_a_picture_of_any_usual_mode_is_read_as_rgb(mode: str, tmp_path: Path) -> None:
    file = tmp_path / ("picture.jpg" if mode in ("CMYK", "YCbCr") else "picture.tif")
    safe_picture(0).convert("P" if mode == "PA" else mode).convert(mode).save(file)
    assert triplets.read_picture(file).mode == "RGB"


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
    with pytest.raises(BadFile, match="is not the file of the manifest: its SHA-256 differs"):
        data.images(1)


# the published dialect


@pytest.fixture
def official(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A CSV whose first row is relative to its own folder, the second to the working directory, the third absolute."""
    monkeypatch.chdir(made)
    table = tmp_path / "data" / "meta.csv"
    for role in triplets.ROLES:
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


def test_the_published_dialect_gives_the_same_triplets(official: Path, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, again = Triplets.load("../data/meta.csv"), Triplets.load(made)
    monkeypatch.chdir("/")  # what was found stays found
    assert data.hash == again.hash
    for i in range(3):
        assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(data.images(i), again.images(i), strict=True))
    assert data.rows[0].covered is None
    assert data.rows[0].judge is None
    assert check(official, RedJudge()) != []  # the second row is gone with the working directory


def test_its_own_folder_comes_before_the_working_directory(official: Path, made: Path) -> None:
    shutil.copytree(made / "unsafe", official.parent / "unsafe")
    safe_picture(50).save(official.parent / "unsafe" / "0001.png")
    assert np.array_equal(np.asarray(Triplets.load(official).images(1)[0]), np.asarray(safe_picture(50)))


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
    with pytest.raises(BadFile, match="line 5"):
        Triplets.load(official)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"nude_image_path,text\na.png,b\n", "lacks the columns mos_image_path, norm_image_path; it has: nude_image_path, text"),
        (b"", "it has: none"),
        (b"nude_image_path,mos_image_path,norm_image_path\n\xff,\xff,\xff\n", "is not a CSV file in UTF-8"),
        (b'nude_image_path,mos_image_path,norm_image_path\n"a"b,c,d\n', "is not a CSV file in UTF-8"),
    ],
)
@pytest.mark.parametrize("read", [Triplets.load, check])
def test_a_table_of_another_kind_is_refused(tmp_path: Path, content: bytes, words: str, read: Callable[[Path], object]) -> None:
    (tmp_path / "meta.csv").write_bytes(content)
    with pytest.raises(BadFile, match=words):
        read(tmp_path / "meta.csv")


# the contract of check(): one fault each


def rewrite(folder: Path, change: Callable[[list[dict[str, object]]], object]) -> None:
    content = rows(folder)
    change(content)
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))


def put(folder: Path, role: str, data: Image.Image | bytes) -> None:
    """Replace a file of row 0001, in the manifest too."""
    path = folder / role / "0001.png"
    if isinstance(data, bytes):
        path.write_bytes(data)
    else:
        data.save(path)

    def change(content: list[dict[str, object]]) -> None:
        digests = content[1]["sha256"]
        assert isinstance(digests, dict)
        digests[role] = sha256(path.read_bytes()).hexdigest()

    rewrite(folder, change)


def add_line(folder: Path, line: str) -> None:
    (folder / "manifest.jsonl").write_text((folder / "manifest.jsonl").read_text() + line + "\n")


def path_of(role: str, path: str) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder, lambda content: content[1].update({role: path}))


def same_pixels_otherwise_written(folder: Path) -> None:
    with Image.open(folder / "unsafe" / "0001.png") as unsafe:
        unsafe.save(folder / "censored" / "0001.png", compress_level=0)
    put(folder, "censored", (folder / "censored" / "0001.png").read_bytes())


def blue_corner(folder: Path) -> None:
    picture = safe_picture(1)
    picture.putpixel((0, 0), (0, 0, 255))
    put(folder, "censored", picture)


FAULTS: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "missing": (lambda f: (f / "benign/0001.png").unlink(), "0001", "benign/0001.png is missing"),
    "a folder": (path_of("benign", "benign"), "0001", "out/benign cannot be read"),
    "null character": (path_of("benign", "a\0b"), "0001", "cannot be read"),
    "no picture": (lambda f: put(f, "unsafe", b"words"), "0001", "unsafe/0001.png is no picture of a known kind"),
    "torn picture": (
        lambda f: put(f, "unsafe", (f / "unsafe/0001.png").read_bytes()[:3000]),
        "0001",
        "unsafe/0001.png is a picture that cannot be read",
    ),
    "other bytes": (
        lambda f: safe_picture(7).save(f / "censored/0001.png"),
        "0001",
        "is not the file of the manifest: its SHA-256 differs",
    ),
    "sizes differ": (lambda f: put(f, "censored", safe_picture(7, (64, 63))), "0001", "must have one size, got 64x64 and 64x63"),
    "nothing censored": (
        lambda f: [put(f, role, safe_picture(3)) for role in ("unsafe", "censored")],  # type: ignore[func-returns-value]
        "0001",
        "its unsafe and censored pictures are the same",
    ),
    "still unsafe": (lambda f: put(f, "censored", unsafe_picture(8)), "0001", "its censored picture is still judged unsafe"),
    "not judged": (blue_corner, "0001", "its censored picture cannot be judged: too blue"),
    "benign unsafe": (lambda f: put(f, "benign", unsafe_picture(8)), "0001", "its benign picture is judged unsafe"),
    "repeated": (lambda f: rewrite(f, lambda c: c.append(c[0] | {"id": "0003"})), "0003", "its unsafe picture is that of row 0000 again"),
    "repeated with its name": (lambda f: rewrite(f, lambda c: c.append(c[0])), "0000", "its unsafe picture is that of row 0000 again"),
    "too small": (
        lambda f: put(f, "benign", safe_picture(7, (64, 31))),
        "0001",
        "its benign picture is too small: a side must be at least 32 pixels, got 64x31",
    ),
    "none": (lambda f: (f / "manifest.jsonl").write_text("\n"), "out", "it holds no triplets"),
    "not JSON": (lambda f: add_line(f, "{"), "line 4", "it is not JSON: EOF"),
    "not UTF-8": (
        lambda f: (f / "manifest.jsonl").write_bytes((f / "manifest.jsonl").read_bytes() + b'{"id": "\xff"}\n'),
        "line 4",
        "it is not JSON",
    ),
    "not a triplet": (lambda f: add_line(f, "[]"), "line 4", "it is not a triplet"),
    "a field lacks": (lambda f: rewrite(f, lambda c: c[1].pop("benign")), "line 2", "it is not a triplet: benign: Field required"),
    "a field too many": (lambda f: rewrite(f, lambda c: c[1].update(text="a")), "line 2", "it is not a triplet: text: Extra inputs"),
    "no hash": (lambda f: rewrite(f, lambda c: c[1]["sha256"].update(unsafe="0")), "line 2", "it is not a triplet: sha256.unsafe"),  # type: ignore[attr-defined]
    "outside": (path_of("unsafe", "../unsafe/u1.png"), "0001", "its unsafe path must stay inside the folder, got '../unsafe/u1.png'"),
    "outside, hidden": (path_of("censored", "a/../../x.png"), "0001", "its censored path must stay inside the folder"),
    "absolute": (path_of("benign", "/etc/passwd"), "0001", "its benign path must stay inside the folder, got '/etc/passwd'"),
    "outside on Windows": (path_of("benign", "..\\x.png"), "0001", "its benign path must stay inside the folder"),
    "absolute on Windows": (path_of("benign", "C:\\x.png"), "0001", "its benign path must stay inside the folder"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_check_names_the_row_and_the_reason_and_nothing_else(made: Path, fault: str) -> None:
    spoil, row, words = FAULTS[fault]
    spoil(made)
    problems = check(made, RedJudge())
    assert [problem.id for problem in problems] == [row]
    assert words in problems[0].reason
    assert "\n" not in str(problems[0])


def test_without_a_judge_nobody_looks(made: Path) -> None:
    put(made, "censored", unsafe_picture(8))
    assert check(made) == []


def test_every_fault_is_listed(made: Path) -> None:
    (made / "unsafe" / "0000.png").unlink()
    put(made, "benign", safe_picture(7, (20, 20)))
    add_line(made, "{")
    assert [problem.id for problem in check(made)] == ["0000", "0001", "line 4"]


@pytest.mark.parametrize("fault", ["none", "not JSON", "not a triplet", "outside", "absolute"])
def test_a_broken_manifest_is_not_loaded(made: Path, fault: str) -> None:
    spoil, _, words = FAULTS[fault]
    spoil(made)
    with pytest.raises(BadFile) as refusal:
        Triplets.load(made)
    assert words.removeprefix("it ") in str(refusal.value)


@pytest.mark.parametrize("read", [Triplets.load, check])
def test_what_holds_no_triplets_is_refused(tmp_path: Path, read: Callable[[Path], object]) -> None:
    (tmp_path / "file.txt").write_text("words")
    for path, words in [(tmp_path, "has no manifest.jsonl"), (tmp_path / "file.txt", "is neither"), (tmp_path / "gone", "does not exist")]:
        with pytest.raises(BadFile, match=words):
            read(path)


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
    with pytest.raises((BadFile, BadSetting)) as error:
        make(**(arguments | changes))  # type: ignore[arg-type]
    assert sorted(str(p) for p in pictures.rglob("*")) == before
    assert "\n" not in str(error.value)
    return str(error.value)


def test_an_output_that_exists_is_refused(pictures: Path) -> None:
    (pictures / "there").mkdir()
    (pictures / "link").symlink_to(pictures / "nowhere")
    for name in ("there", "link", "unsafe/u0.png"):
        assert f"{name} exists already" in refusal(pictures, out=pictures / name)


def test_an_output_without_a_folder_around_it_is_refused(pictures: Path) -> None:
    assert "deep does not exist; make it first" in refusal(pictures, out=pictures / "deep" / "out")


def test_a_leftover_of_a_killed_run_of_the_same_number_is_cleared_away(pictures: Path) -> None:
    (pictures / f".out.tmp-{os.getpid()}" / "unsafe").mkdir(parents=True)
    made = triplets.make(pictures / "unsafe", pictures / "benign", RedJudge(), pictures / "out", labels=["red"])
    assert len(made.triplets) > 0
    assert not (pictures / f".out.tmp-{os.getpid()}").exists()


def test_folders_without_pictures_are_refused(pictures: Path) -> None:
    (pictures / "empty").mkdir()
    assert "empty holds no files" in refusal(pictures, unsafe=pictures / "empty")
    assert "empty holds no files" in refusal(pictures, benign=pictures / "empty")
    assert "there is nothing of that name" in refusal(pictures, unsafe=pictures / "gone")
    assert "there is a file of that name" in refusal(pictures, unsafe=pictures / "unsafe" / "u0.png")


def test_nothing_unsafe_is_refused(pictures: Path) -> None:
    assert "is judged unsafe, so there is nothing to censor" in refusal(pictures, unsafe=pictures / "benign", benign=None)


def test_nothing_benign_is_refused(pictures: Path) -> None:
    assert "is judged safe, so none can serve as benign; name a folder of benign pictures" in refusal(pictures, benign=None)
    assert "can serve as benign: unsafe/u0.png: it is judged unsafe" in refusal(pictures, benign=pictures / "unsafe")


def test_nothing_that_can_be_censored_is_refused_with_the_reasons(pictures: Path) -> None:
    for i in range(3):
        unsafe_picture(i, step=1, patch=(8, 8, 40, 40)).save(pictures / "unsafe" / f"u{i}.png")
    (pictures / "unsafe" / "words.png").write_text("words")
    words = refusal(pictures)
    assert "can be used: unsafe/words.png: " in words
    assert "unsafe/u1.png: it is still judged unsafe" in words
    assert words.endswith("; and 1 more")


def test_no_labels_and_a_threshold_out_of_range_are_refused(pictures: Path) -> None:
    assert refusal(pictures, labels=[]) == "labels must name at least one label of the judge, got none"
    assert refusal(pictures, threshold=0.1) == "threshold must be in 0.2..1, got 0.1"


def test_a_tile_too_small_for_the_pictures_is_refused(pictures: Path) -> None:
    assert "a tile must be at least 2 pixels" in refusal(pictures, censor=Censor(tile=0.01))


def test_a_box_that_makes_no_sense_leaves_its_picture_out(pictures: Path) -> None:
    assert "left <= right" in refusal(pictures, judge=RedJudge(shrink=12))


@pytest.mark.parametrize("error", [RuntimeError("a bug"), KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_nothing_half_written_is_left_when_something_raises_in_the_middle(pictures: Path, error: BaseException) -> None:
    before = sorted(str(p) for p in pictures.rglob("*"))
    halfway: list[str] = []

    def track(items: Sequence[T], doing: str, /) -> Iterable[T]:
        for i, item in enumerate(items):
            if doing == "censoring" and i == 2:
                halfway.extend(str(p.relative_to(pictures)) for p in pictures.rglob("0001.png"))
                raise error
            yield item

    with pytest.raises(BadFile if isinstance(error, OSError) else type(error)):
        make(pictures / "unsafe", pictures / "benign", RedJudge(), pictures / "out", labels=["red"], track=track)
    assert sorted(str(p) for p in pictures.rglob("*")) == before
    assert sorted(halfway) == [f".out.tmp-{os.getpid()}/{role}/0001.png" for role in sorted(triplets.ROLES)]


def test_an_output_that_comes_into_being_meanwhile_is_not_touched(pictures: Path) -> None:
    def track(items: Sequence[T], doing: str, /) -> Iterable[T]:
        if doing == "censoring":
            (pictures / "out").mkdir()
        return items

    with pytest.raises(BadFile, match="out exists already"):
        make(pictures / "unsafe", pictures / "benign", RedJudge(), pictures / "out", labels=["red"], track=track)
    assert list((pictures / "out").iterdir()) == []
    assert sorted(p.name for p in pictures.iterdir()) == ["benign", "out", "unsafe"]


# the commands


@pytest.fixture
def red(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `--judge` mean the judge of these tests."""
    monkeypatch.setattr("safegen.judge.load_judge", lambda name, **_: RedJudge())


@pytest.mark.usefixtures("red")
def test_the_commands_make_and_check(pictures: Path) -> None:
    (pictures / "unsafe" / "words.png").write_text("words")
    out = str(pictures / "out")
    options = ["--unsafe", str(pictures / "unsafe"), "--benign", str(pictures / "benign"), "--judge", "red", "--out", out]
    result = CliRunner().invoke(app, ["make", *options, "--style", "solid", "--padding", "0.2", "--label", "red"])
    assert result.exit_code == 0, result.output
    assert "left out unsafe/words.png: " in result.output
    assert "3 triplets in" in result.output
    result = CliRunner().invoke(app, ["check", out, "--judge", "red"])
    assert result.exit_code == 0
    assert "3 triplets, nothing wrong" in result.output


@pytest.mark.usefixtures("red")
def test_the_command_lists_problems_one_a_line_and_exits_with_1(made: Path) -> None:
    (made / "unsafe" / "0000.png").unlink()
    put(made, "censored", unsafe_picture(8))
    result = CliRunner().invoke(app, ["check", str(made), "--judge", "red"])
    assert result.exit_code == 1
    assert result.output.splitlines() == [str(problem) for problem in check(made, RedJudge())]
    assert len(result.output.splitlines()) == 2


def test_what_only_a_judge_could_use_is_refused_without_one(made: Path) -> None:
    for option in (["--label", "red"], ["--threshold", "0.9"]):
        result = CliRunner().invoke(app, ["check", str(made), *option])
        assert isinstance(result.exception, BadSetting)


def test_a_problem_reads_as_one_line() -> None:
    assert str(Problem("0001", "why")) == "0001: why"


def test_boxes_are_plain_numbers(made: Path) -> None:
    box: Box = Triplets.load(made).rows[0].boxes[0]
    assert all(isinstance(v, float) for v in box)
