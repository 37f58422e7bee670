"""Staged files and folders: no partial output looks finished, and one process writes at a time."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from safegen.core.errors import FileError
from safegen.core.files import (
    IN_USE,
    LOCK,
    atomic_write,
    check_output,
    claim,
    claim_folder,
    exists,
    is_unfinished,
    read_lines,
    staged_directory,
)

LONG = "ä" * 121 + "x" * 13
"""Name of 255 bytes, the longest of common file systems."""


def below(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def fill(folder: Path) -> None:
    """Write a file, and another in a folder."""
    (folder / "a.png").write_text("a")
    (folder / "b").mkdir()
    (folder / "b" / "c.png").write_text("c")


def make(out: Path, then: Callable[[Path], object] = lambda folder: None) -> None:
    """Write a staged folder and call `then` before its block ends."""
    with staged_directory(out) as folder:
        fill(folder)
        then(folder)


def test_a_staged_folder_and_its_parents_are_created(tmp_path):
    out = tmp_path / "new" / "newer" / "out"
    seen: list[bool] = []
    make(out, lambda _: seen.extend([out.exists(), is_unfinished(out.with_name("out.unfinished"))]))
    assert seen == [False, True]
    assert below(tmp_path) == [
        "new",
        "new/newer",
        "new/newer/out",
        *(f"new/newer/out/{name}" for name in ("a.png", "b", "b/c.png")),
    ]


@pytest.mark.parametrize(
    "error",
    [RuntimeError("a bug"), KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")],
)
@pytest.mark.parametrize("kind", ["folder", "file"])
def test_an_exception_removes_the_output_and_the_parents_it_created(tmp_path, error, kind):
    (tmp_path / "mine").mkdir()
    out = tmp_path / "mine" / "new" / "out"
    write = staged_directory if kind == "folder" else atomic_write
    with pytest.raises(FileError if isinstance(error, OSError) else type(error)):
        with write(out):
            raise error
    assert below(tmp_path) == ["mine"]


def test_a_folder_that_appears_meanwhile_is_never_replaced(tmp_path):
    def appear(_: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "precious.txt").write_text("keep me")

    with pytest.raises(FileError, match="out cannot be written: Directory not empty"):
        make(tmp_path / "out", appear)
    assert below(tmp_path) == ["out", "out/precious.txt"]


@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_appears_meanwhile_is_never_replaced(tmp_path, monkeypatch, links):
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "no hard links here")

    if not links:
        monkeypatch.setattr("os.link", refuse)
    with atomic_write(tmp_path / "first") as tmp:
        tmp.write_text("mine")

    def write_meanwhile() -> None:
        with atomic_write(tmp_path / "out") as tmp:
            tmp.write_text("mine")
            (tmp_path / "out").write_text("keep me")

    with pytest.raises(FileError, match="out cannot be written: File exists"):
        write_meanwhile()
    assert (tmp_path / "out").read_text() == "keep me"
    assert (tmp_path / "first").read_text() == "mine"
    assert below(tmp_path) == ["first", "out"]


def test_a_replaced_file_is_whole_or_as_before(tmp_path):
    out = tmp_path / "out"
    out.write_text("before")

    def fail() -> None:
        with atomic_write(out, replace=True) as tmp:
            tmp.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert out.read_text() == "before"
    with atomic_write(out, replace=True) as tmp:
        tmp.write_text("after")
        assert out.read_text() == "before"
    assert out.read_text() == "after"
    assert below(tmp_path) == ["out"]


def test_only_a_regular_file_is_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    for name in ("pipe", "link"):
        with (
            pytest.raises(FileError, match=f"{name}' must be a regular file, got a pipe"),
            atomic_write(tmp_path / name, replace=True) as temporary,
        ):
            temporary.write_text("x")
        assert (tmp_path / name).is_fifo()
    assert below(tmp_path) == ["link", "pipe"]


def test_a_folder_below_a_file_is_refused_in_one_line(tmp_path):
    (tmp_path / "file").write_text("keep me")
    with pytest.raises(FileError, match=r"out cannot be written: .*file is a file, not a folder"):
        make(tmp_path / "file" / "out")
    with pytest.raises(FileError, match="out cannot be written: "):
        with atomic_write(tmp_path / "file" / "out"):
            pass
    with pytest.raises(FileError, match="must be a file, got a folder"):
        with atomic_write(tmp_path):
            pass
    assert below(tmp_path) == ["file"]


def test_an_invalid_name_does_not_exist(tmp_path):
    (tmp_path / "file").write_text("x")
    assert exists(tmp_path)
    assert not exists(tmp_path, file=True)
    assert exists(tmp_path / "file", file=True)
    for name in (tmp_path / "gone", tmp_path / ("long" * 100), "a\0b"):
        assert not exists(name)
        assert not exists(name, file=True)


def test_read_lines_splits_at_line_ends_only(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa castle\r\n\r\n  a cat\u2028at dusk \rlast\x0bline".encode())
    assert read_lines(file) == ["a castle", "a cat\u2028at dusk", "last\x0bline"]
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(FileError, match="is not UTF-8 text"):
        read_lines(file)
    with pytest.raises(FileError, match="must be a regular file, got a folder"):
        read_lines(tmp_path)


def test_an_output_that_cannot_be_written_is_refused_before_the_work(tmp_path, monkeypatch):
    check_output(tmp_path / "new" / "newer" / "file")
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    with pytest.raises(FileError, match=r"patch cannot be written: .*file is a file, not a folder"):
        check_output(tmp_path / "file" / "new" / "patch")
    with pytest.raises(FileError, match="dangling already exists"):
        check_output(tmp_path / "dangling")
    with pytest.raises(FileError, match="must have at most 255 bytes, got 256"):
        check_output(tmp_path / (LONG + "x"))
    monkeypatch.setattr("os.access", lambda path, way: False)
    with pytest.raises(FileError, match=r"patch cannot be written: .* is not writable"):
        check_output(tmp_path / "new" / "patch")
    assert below(tmp_path) == ["dangling", "file"]


def test_names_of_255_bytes_are_written(tmp_path):
    assert len(os.fsencode(LONG)) == 255
    check_output(tmp_path / LONG)
    with atomic_write(tmp_path / LONG) as tmp:
        tmp.write_text("whole")
    (tmp_path / "folders").mkdir()
    make(tmp_path / "folders" / LONG)
    assert (tmp_path / LONG).read_text() == "whole"
    assert (tmp_path / "folders" / LONG / "a.png").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([LONG, "folders"])
    assert [p.name for p in (tmp_path / "folders").iterdir()] == [LONG]


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_outputs_have_the_permissions_of_a_new_file(tmp_path):
    """Libraries of tensors write files that only their owner can read."""
    before = os.umask(0o027)
    try:
        with atomic_write(tmp_path / "file") as tmp:
            save_file({"a": torch.zeros(1)}, tmp)
            assert tmp.stat().st_mode & 0o777 == 0o600
        with staged_directory(tmp_path / "folder") as folder:
            (folder / "deep").mkdir()
            save_file({"a": torch.zeros(1)}, folder / "deep" / "file")
    finally:
        os.umask(before)
    modes = {name: (tmp_path / name).stat().st_mode & 0o777 for name in below(tmp_path)}
    assert modes == {
        "file": 0o640,
        "folder": 0o750,
        "folder/deep": 0o750,
        "folder/deep/file": 0o640,
    }


# claims: one process at one output

OTHER = """
import sys, time
from pathlib import Path
from safegen.core.files import atomic_write, claim, claim_folder, staged_directory
ways = {"claim": claim, "file": atomic_write, "folder": staged_directory, "run": claim_folder}
kind, out = sys.argv[1], Path(sys.argv[2])
with ways[kind](out) as tmp:
    if kind in ("claim", "folder"):
        (tmp / "half.png").write_text("half")
    elif kind == "file":
        tmp.write_text("half")
    print("ready", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def other():
    """Return a function that starts a process which writes an output until it is told to end."""
    started = []

    def start(kind: str, out: Path) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", OTHER, kind, str(out)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


WAYS = {"claim": claim, "file": atomic_write, "folder": staged_directory, "run": claim_folder}


@pytest.mark.parametrize(
    ("first", "second"),
    [("file", "file"), ("folder", "folder"), ("claim", "file"), ("file", "claim"), ("run", "run")],
)
def test_a_second_process_is_told_at_once_and_changes_nothing(tmp_path, other, first, second):
    out = tmp_path / "new" / "out"
    process = other(first, out)
    before, start = below(tmp_path), time.monotonic()
    with pytest.raises(FileError, match=r"out is being written by another process\. Wait for it"):
        with WAYS[second](out):
            raise AssertionError
    assert time.monotonic() - start < 1
    assert below(tmp_path) == before
    process.communicate("\n", timeout=20)
    assert process.returncode == 0
    assert below(tmp_path / "new") == {
        "file": ["out"],
        "folder": ["out", "out/half.png"],
        "claim": [],
        "run": [],
    }.get(first, [])


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
@pytest.mark.parametrize("kind", sorted(WAYS))
def test_what_a_killed_process_left_is_removed_by_the_next_that_writes_there(tmp_path, other, kind):
    out = tmp_path / "new" / "out"
    process = other(kind, out)
    process.kill()
    process.wait()
    left = below(tmp_path)
    assert any(LOCK in name for name in left)
    assert not out.exists() or kind == "run"
    with WAYS[kind](out) as tmp:
        assert not [name for name in below(tmp_path) if "half.png" in name]
        if kind == "file":
            tmp.write_text("whole")
    assert below(tmp_path) == {"file": ["new", "new/out"], "folder": ["new", "new/out"]}.get(
        kind, ["new", "new/out"] if kind == "run" else ["new"]
    )


def test_a_folder_of_someone_else_in_the_way_is_not_removed(tmp_path):
    theirs = tmp_path / "out.unfinished"
    theirs.mkdir()
    (theirs / "precious.txt").write_text("keep me")
    with pytest.raises(FileError, match=r"out\.unfinished was not made by safegen\. Rename it"):
        with atomic_write(tmp_path / "out"):
            pass
    assert below(tmp_path) == ["out.unfinished", "out.unfinished/precious.txt"]
    (theirs / "precious.txt").unlink()
    with atomic_write(tmp_path / "out") as tmp:
        tmp.write_text("whole")
    assert below(tmp_path) == ["out"]


def test_a_process_can_claim_what_it_has_claimed(tmp_path):
    with claim(tmp_path / "out"):
        with atomic_write(tmp_path / "out") as tmp:
            tmp.write_text("whole")
        assert below(tmp_path) == ["out", "out.unfinished", f"out.unfinished/{LOCK}"]
    assert below(tmp_path) == ["out"]


def test_a_claimed_folder_stays_if_something_was_written_there(tmp_path):
    with claim_folder(tmp_path / "new" / "empty"):
        pass
    assert below(tmp_path) == []
    with claim_folder(tmp_path / "new" / "full"):
        with claim_folder(tmp_path / "new" / "full"):
            (tmp_path / "new" / "full" / "a.png").write_text("a")
    assert below(tmp_path) == ["new", "new/full", "new/full/a.png"]


@pytest.mark.parametrize("place", ["link", "link/o"])
def test_a_folder_behind_a_link_to_nothing_is_not_claimed(tmp_path, place):
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    with pytest.raises(FileError, match="is a link to nothing"), claim_folder(tmp_path / place):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


def test_an_output_in_a_claimed_folder_is_written_under_the_folders_claim(tmp_path):
    run = tmp_path / "run"
    with claim_folder(run):
        (run / "images").mkdir()
        with atomic_write(run / "images" / "a.png") as temporary:
            assert temporary.parent.parent == run / IN_USE
            temporary.write_text("image")
        with staged_directory(run / "patches") as staging:
            (staging / "p").write_text("patch")
        assert sorted(path.name for path in run.iterdir()) == ["images", IN_USE, "patches"]
    assert sorted(path.name for path in run.rglob("*")) == ["a.png", "images", "p", "patches"]
