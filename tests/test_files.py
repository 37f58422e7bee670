"""Writing files so that nothing half-written is ever taken for finished."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from safegen.core.errors import FileError
from safegen.core.files import (
    STAGING_DIR,
    check_writable,
    exists,
    is_incomplete,
    read_lines,
    staged_directory,
    swap_directory,
)


def below(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def fill(folder: Path) -> None:
    """Make two files, a folder, and the last file."""
    (folder / "a.png").write_text("a")
    (folder / "b").mkdir()
    (folder / "b" / "c.png").write_text("c")
    (folder / "d.png").write_text("d")
    (folder / "end.html").write_text("end")


def test_a_private_folder_and_those_around_it_come_into_being(tmp_path):
    out = tmp_path / "new" / "newer" / "out"
    with staged_directory(out, last="end.html") as folder:
        assert folder == out / STAGING_DIR
        fill(folder)
        assert is_incomplete(out, last="end.html")
    assert below(out) == ["a.png", "b", "b/c.png", "d.png", "end.html"]
    assert not is_incomplete(out, last="end.html")


def make(out: Path, then: Callable[[Path], object]) -> None:
    """Fill a private folder, and do something more before its block ends."""
    with staged_directory(out, last="end.html") as folder:
        fill(folder)
        then(folder)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("a bug"), KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")],
)
def test_what_raises_leaves_neither_the_folder_nor_those_around_it(tmp_path, error):
    def fail(folder: Path) -> None:
        raise error

    (tmp_path / "mine").mkdir()
    with pytest.raises(FileError if isinstance(error, OSError) else type(error)):
        make(tmp_path / "mine" / "new" / "out", fail)
    assert below(tmp_path) == ["mine"]


@pytest.mark.parametrize("theirs", ["b", "d.png", "end.html"])
def test_what_has_moved_is_taken_back_and_what_is_someone_elses_is_kept(tmp_path, theirs):
    out = tmp_path / "out"
    with pytest.raises(
        FileError, match=f"out cannot be written: someone else put {theirs} there meanwhile"
    ):
        make(out, lambda _: (out / theirs).write_text("keep me"))
    assert below(out) == [theirs]
    assert (out / theirs).read_text() == "keep me"


def test_a_link_that_has_moved_is_taken_back_and_its_target_kept(tmp_path):
    def link(folder: Path) -> None:
        (folder / "c").symlink_to(tmp_path / "target")
        (tmp_path / "out" / "end.html").mkdir()

    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "precious.txt").write_text("keep me")
    with pytest.raises(FileError, match="out cannot be written"):
        make(tmp_path / "out", link)
    assert below(tmp_path) == ["out", "out/end.html", "target", "target/precious.txt"]


def test_a_block_that_forgets_its_last_entry_is_our_bug_and_leaves_nothing(tmp_path):
    with pytest.raises(AssertionError, match=r"did not make end\.html"):
        make(tmp_path / "out", lambda folder: (folder / "end.html").unlink())
    assert below(tmp_path) == []


def test_a_folder_below_a_file_is_refused_in_one_line(tmp_path):
    (tmp_path / "file").write_text("keep me")
    with pytest.raises(FileError, match="out cannot be written: Not a directory"):
        make(tmp_path / "file" / "out", fill)
    assert below(tmp_path) == ["file"]


def test_a_name_that_the_system_does_not_take_is_not_there(tmp_path):
    (tmp_path / "file").write_text("x")
    assert exists(tmp_path)
    assert not exists(tmp_path, file=True)
    assert exists(tmp_path / "file", file=True)
    for name in (tmp_path / "gone", tmp_path / ("long" * 100), "a\0b"):
        assert not exists(name)
        assert not exists(name, file=True)


def test_lines_of_a_text_file_are_those_that_a_user_sees(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa castle\r\n\r\n  a cat\u2028at dusk \rlast\x0bline".encode())
    assert read_lines(file) == ["a castle", "a cat\u2028at dusk", "last\x0bline"]
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(FileError, match="is not UTF-8 text"):
        read_lines(file)
    with pytest.raises(FileError, match="cannot be read: Is a directory"):
        read_lines(tmp_path)


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    out = tmp_path / "home" / "out"
    with swap_directory(out) as folder:
        (folder / "one").write_text("1")
    assert below(tmp_path) == ["home", "home/out", "home/out/one"]

    def fill_up(folder):
        (folder / "two").write_text("2")
        raise OSError(errno.ENOSPC, "No space left on device")

    with (
        pytest.raises(FileError, match="out cannot be written: No space left"),
        swap_directory(out) as folder,
    ):
        fill_up(folder)
    with pytest.raises(KeyboardInterrupt), swap_directory(out):
        raise KeyboardInterrupt
    assert below(tmp_path) == ["home", "home/out", "home/out/one"]
    with swap_directory(out) as folder:
        (folder / "two").write_text("2")
    assert below(tmp_path) == ["home", "home/out", "home/out/two"]


def test_a_place_that_cannot_be_written_is_refused_before_the_work(tmp_path, monkeypatch):
    check_writable(tmp_path / "new" / "newer" / "file")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match=r"patch cannot be written: .*file is a file, not a folder"):
        check_writable(tmp_path / "file" / "new" / "patch")
    monkeypatch.setattr("os.access", lambda path, way: False)
    with pytest.raises(FileError, match=r"patch cannot be written: nothing may be written to"):
        check_writable(tmp_path / "new" / "patch")
    assert below(tmp_path) == ["file"]
