"""`check_triplets` reports every fault of a folder with its row, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest
from PIL import Image
from red import RedJudge, rows, safe_image, unsafe_image
from typer.testing import CliRunner

from safegen.cli.data.triplets import app
from safegen.core.errors import FileError, UnusedSettingWarning
from safegen.data.triplets.check import check_triplets
from safegen.data.triplets.triplets import TripletIssue, Triplets


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


def save_equal_pixels_in_other_bytes(folder: Path) -> None:
    put(folder, "unsafe", safe_image(3))
    safe_image(3).save(folder / "censored" / "0001.png", compress_level=0)
    put(folder, "censored", (folder / "censored" / "0001.png").read_bytes())


def blue_corner(folder: Path) -> None:
    image = safe_image(1)
    image.putpixel((0, 0), (0, 0, 255))
    put(folder, "censored", image)


FAULTS: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "missing": (lambda f: (f / "benign/0001.png").unlink(), "0001", "benign/0001.png is missing"),
    "a folder": (path_of("benign", "benign"), "0001", "out/benign cannot be read"),
    "null character": (path_of("benign", "a\0b"), "0001", "cannot be read"),
    "no image": (
        lambda f: put(f, "unsafe", b"words"),
        "0001",
        "unsafe/0001.png is not an image of a known format",
    ),
    "torn image": (
        lambda f: put(f, "unsafe", (f / "unsafe/0001.png").read_bytes()[:3000]),
        "0001",
        "unsafe/0001.png is an image that cannot be read",
    ),
    "other bytes": (
        lambda f: safe_image(7).save(f / "censored/0001.png"),
        "0001",
        "is not the file of the manifest: its SHA-256 differs",
    ),
    "sizes differ": (
        lambda f: put(f, "censored", safe_image(7, (64, 63))),
        "0001",
        "must have one size, got 64x64 and 64x63",
    ),
    "nothing censored": (
        lambda f: [put(f, role, safe_image(3)) for role in ("unsafe", "censored")],  # type: ignore[func-returns-value]
        "0001",
        "the unsafe and censored images are equal",
    ),
    "nothing censored, other bytes": (
        save_equal_pixels_in_other_bytes,
        "0001",
        "the unsafe and censored images are equal",
    ),
    "still unsafe": (
        lambda f: put(f, "censored", unsafe_image(8)),
        "0001",
        "the censored image is still judged unsafe",
    ),
    "not judged": (blue_corner, "0001", "the censored image cannot be judged: too blue"),
    "benign unsafe": (
        lambda f: put(f, "benign", unsafe_image(8)),
        "0001",
        "the benign image is judged unsafe",
    ),
    "repeated": (
        lambda f: rewrite(f, lambda c: c.append(c[0] | {"id": "0003"})),
        "0003",
        "the unsafe image repeats that of row 0000",
    ),
    "repeated with its name": (
        lambda f: rewrite(f, lambda c: c.append(c[0])),
        "0000",
        "the unsafe image repeats that of row 0000",
    ),
    "too small": (
        lambda f: put(f, "benign", safe_image(7, (64, 31))),
        "0001",
        "the benign image is too small: a side must be at least 32 pixels, got 64x31",
    ),
    "none": (lambda f: (f / "manifest.jsonl").write_text("\n"), "out", "there are no triplets"),
    "not JSON": (
        lambda f: add_line(f, "{"),
        "line 4",
        "the row is not a triplet: Invalid JSON: EOF",
    ),
    "not UTF-8": (
        lambda f: (f / "manifest.jsonl").write_bytes(
            (f / "manifest.jsonl").read_bytes() + b'{"id": "\xff"}\n'
        ),
        "line 4",
        "the row is not a triplet: Invalid JSON",
    ),
    "not a triplet": (lambda f: add_line(f, "[]"), "line 4", "the row is not a triplet"),
    "a field lacks": (
        lambda f: rewrite(f, lambda c: c[1].pop("benign")),
        "line 2",
        "the row is not a triplet: benign is required",
    ),
    "a field too many": (
        lambda f: rewrite(f, lambda c: c[1].update(text="a")),
        "line 2",
        "the row is not a triplet: no setting named 'text'",
    ),
    "no hash": (
        lambda f: rewrite(f, lambda c: c[1]["sha256"].update(unsafe="0")),
        "line 2",
        "the row is not a triplet: sha256.unsafe",
    ),  # type: ignore[attr-defined]
    "outside": (
        path_of("unsafe", "../unsafe/u1.png"),
        "0001",
        "unsafe path must stay inside the folder, got '../unsafe/u1.png'",
    ),
    "outside, hidden": (
        path_of("censored", "a/../../x.png"),
        "0001",
        "censored path must stay inside the folder",
    ),
    "absolute": (
        path_of("benign", "/etc/passwd"),
        "0001",
        "benign path must stay inside the folder, got '/etc/passwd'",
    ),
    "outside on Windows": (
        path_of("benign", "..\\x.png"),
        "0001",
        "benign path must stay inside the folder",
    ),
    "absolute on Windows": (
        path_of("benign", "C:\\x.png"),
        "0001",
        "benign path must stay inside the folder",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_one_fault_gives_one_issue_with_row_and_reason(made: Path, fault: str) -> None:
    spoil, row, words = FAULTS[fault]
    spoil(made)
    problems = check_triplets(made, RedJudge())
    assert [problem.id for problem in problems] == [row]
    assert words in problems[0].reason
    assert "\n" not in str(problems[0])


def test_without_a_judge_images_are_not_judged(made: Path) -> None:
    put(made, "censored", unsafe_image(8))
    assert check_triplets(made) == []


def test_every_fault_is_listed(made: Path) -> None:
    (made / "unsafe" / "0000.png").unlink()
    put(made, "benign", safe_image(7, (20, 20)))
    add_line(made, "{")
    assert [problem.id for problem in check_triplets(made)] == ["0000", "0001", "line 4"]


@pytest.mark.parametrize("fault", ["none", "not JSON", "not a triplet", "outside", "absolute"])
def test_an_invalid_manifest_is_not_loaded(made: Path, fault: str) -> None:
    spoil, _, words = FAULTS[fault]
    spoil(made)
    with pytest.raises(FileError) as refusal:
        Triplets.load(made)
    assert words.removeprefix("it ") in str(refusal.value)


@pytest.mark.parametrize("read", [Triplets.load, check_triplets])
def test_a_path_without_triplets_is_refused(tmp_path: Path, read: Callable[[Path], object]) -> None:
    (tmp_path / "file.txt").write_text("words")
    for path, words in [
        (tmp_path, "has no manifest.jsonl"),
        (tmp_path / "file.txt", "is neither"),
        (tmp_path / "gone", "does not exist"),
    ]:
        with pytest.raises(FileError, match=words):
            read(path)


# the command


@pytest.mark.usefixtures("red")
def test_the_command_lists_issues_and_exits_with_1(made: Path) -> None:
    (made / "unsafe" / "0000.png").unlink()
    put(made, "censored", unsafe_image(8))
    result = CliRunner().invoke(app, ["check", str(made), "--judge", "red"])
    assert result.exit_code == 1
    assert result.output.splitlines() == [
        str(problem) for problem in check_triplets(made, RedJudge())
    ]
    assert len(result.output.splitlines()) == 2


def test_judge_options_without_a_judge_warn(made: Path) -> None:
    for option in (["--label", "red"], ["--threshold", "0.9"]):
        with pytest.warns(UnusedSettingWarning, match="has no effect without --judge"):
            result = CliRunner().invoke(app, ["check", str(made), *option])
        assert result.exit_code == 0


def test_an_issue_is_one_line() -> None:
    assert str(TripletIssue("0001", "why")) == "0001: why"
