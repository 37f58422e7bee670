"""Staged files and directories: partial output never looks finished."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from safegen.core.errors import FileError
from safegen.core.files import (
    STAGING_DIR,
    check_output,
    exists,
    is_incomplete,
    read_lines,
    staged_directory,
)


def below(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def fill(folder: Path) -> None:
    """Write two files, a directory and the last file."""
    (folder / "a.png").write_text("a")
    (folder / "b").mkdir()
    (folder / "b" / "c.png").write_text("c")
    (folder / "d.png").write_text("d")
    (folder / "end.html").write_text("end")


def test_a_staged_directory_and_its_parents_are_created(tmp_path):
    out = tmp_path / "new" / "newer" / "out"
    with staged_directory(out, last="end.html") as folder:
        assert folder == out / STAGING_DIR
        fill(folder)
        assert is_incomplete(out, last="end.html")
    assert below(out) == ["a.png", "b", "b/c.png", "d.png", "end.html"]
    assert not is_incomplete(out, last="end.html")


def make(out: Path, then: Callable[[Path], object]) -> None:
    """Write a staged directory and run `last` before its block ends."""
    with staged_directory(out, last="end.html") as folder:
        fill(folder)
        then(folder)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("a bug"), KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")],
)
def test_an_exception_removes_the_folder_and_the_parents_it_created(tmp_path, error):
    def fail(folder: Path) -> None:
        raise error

    (tmp_path / "mine").mkdir()
    with pytest.raises(FileError if isinstance(error, OSError) else type(error)):
        make(tmp_path / "mine" / "new" / "out", fail)
    assert below(tmp_path) == ["mine"]


def test_a_directory_that_appears_in_the_meantime_is_not_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr("safegen.core.files.check_output", lambda out, last: None)
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("keep me")
    with pytest.raises(FileError, match="out cannot be written: File exists"):
        make(out, lambda folder: None)
    assert below(out) == ["precious.txt"]


def test_a_move_that_fails_removes_its_entries_and_keeps_those_of_others(tmp_path):
    def link(folder: Path) -> None:
        (folder / "c").symlink_to(tmp_path / "target")
        (tmp_path / "out" / "end.html").mkdir()

    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "precious.txt").write_text("keep me")
    with pytest.raises(FileError, match="out cannot be written"):
        make(tmp_path / "out", link)
    assert below(tmp_path) == ["out", "out/end.html", "target", "target/precious.txt"]


def test_a_file_that_appears_meanwhile_is_never_replaced(tmp_path):
    with pytest.raises(FileError, match=r"a\.png was put there meanwhile"):
        make(tmp_path / "out", lambda _: (tmp_path / "out" / "a.png").write_text("keep me"))
    assert below(tmp_path) == ["out", "out/a.png"]
    assert (tmp_path / "out" / "a.png").read_text() == "keep me"


def test_a_block_without_its_last_entry_raises_and_leaves_no_files(tmp_path):
    with pytest.raises(AssertionError, match=r"did not create end\.html"):
        make(tmp_path / "out", lambda folder: (folder / "end.html").unlink())
    assert below(tmp_path) == []


def test_a_folder_below_a_file_is_refused_in_one_line(tmp_path):
    (tmp_path / "file").write_text("keep me")
    with pytest.raises(FileError, match=r"out cannot be written: .*file is a file, not a folder"):
        make(tmp_path / "file" / "out", fill)
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
    with pytest.raises(FileError, match=r"patch cannot be written: .*file is a file, not a folder"):
        check_output(tmp_path / "file" / "new" / "patch")
    monkeypatch.setattr("os.access", lambda path, way: False)
    with pytest.raises(FileError, match=r"patch cannot be written: .* is not writable"):
        check_output(tmp_path / "new" / "patch")
    assert below(tmp_path) == ["file"]
