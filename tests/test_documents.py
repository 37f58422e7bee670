"""Documents of unknown origin: every defect is one line that names the file."""

import os
import socket
from pathlib import Path

import pytest
from pydantic import BaseModel

from safegen.core.documents import (
    parse_json,
    read_bytes,
    read_json_lines,
    read_json_object,
    read_text,
    read_toml,
    validate,
)
from safegen.core.errors import FileError


class Point(BaseModel):
    """A record."""

    x: int
    y: float = 0.0


def test_no_read_waits_for_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileError, match=r"pipe' must be a regular file, got a pipe"):
        read_bytes(tmp_path / "pipe")


def test_sockets_devices_and_folders_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the path of a socket has at most 107 bytes
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("s")
        with pytest.raises(FileError, match="got a socket"):
            read_bytes(tmp_path / "s")
    with pytest.raises(FileError, match="got a device"):
        read_bytes(Path("/dev/zero"))
    with pytest.raises(FileError, match="got a folder"):
        read_bytes(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(FileError, match="cannot be read: Too many levels"):
        read_bytes(tmp_path / "loop")
    with pytest.raises(FileError, match="cannot be read: embedded null byte"):
        read_bytes(Path("a\0b"))


def test_size_limit_and_encoding(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(b"\xef\xbb\xbfa\r\nb\rc")
    assert read_text(path) == "a\nb\nc"
    with pytest.raises(FileError, match="must have at most 4 bytes"):
        read_text(path, limit=4)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(FileError, match="is not UTF-8 text"):
        read_text(path)


DAMAGED = [
    "{",
    "[" * 100_000,
    "[" * 101 + "]" * 101,
    "9" * 5000,
    '{"a": NaN}',
    '{"a": 1e999}',
    "",
    '"\\ud8',
    '{"a": "\\ud800"}',
    b'"\xed\xa0\x80"',
]


@pytest.mark.parametrize("text", DAMAGED)
def test_damaged_json_is_one_line(tmp_path: Path, text: str | bytes) -> None:
    with pytest.raises(FileError, match="'the source' is not JSON: ") as caught:
        parse_json(text, "the source")
    assert "\n" not in str(caught.value)
    path = tmp_path / "x.json"
    path.write_text("[1]")
    with pytest.raises(FileError, match=r"x\.json' must be a JSON object, got list"):
        read_json_object(path)


def test_a_repeated_key_is_refused_where_it_matters() -> None:
    assert parse_json('{"a": 1, "a": 2}', "x") == {"a": 2}
    with pytest.raises(FileError, match="'x' is not JSON: it has the key 'a' more than once"):
        parse_json('[{"a": 1, "a": 2}]', "x", unique_keys=True)


def test_json_may_have_a_hundred_levels_and_any_character() -> None:
    assert parse_json("[" * 100 + "]" * 100, "x")
    assert parse_json('"\\ud83d\\ude00 \\u00e4"', "x") == "😀 ä"


def test_json_lines_name_the_line(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"x": 1}\n\n{"x": \n')
    lines = read_json_lines(path)
    assert next(lines) == (1, {"x": 1})
    with pytest.raises(FileError, match=r"x\.jsonl line 3' is not JSON"):
        next(lines)


@pytest.mark.parametrize("text", ["a = [", "a = " + "[" * 5000 + "]" * 5000, "a = 1\na = 2"])
def test_damaged_toml_is_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.toml"
    path.write_text(text)
    with pytest.raises(FileError, match=r"x\.toml' is not TOML: ") as caught:
        read_toml(path)
    assert "\n" not in str(caught.value)


def test_validate_names_source_and_field() -> None:
    assert validate(Point, {"x": 1}, "p.json") == Point(x=1)
    with pytest.raises(FileError, match=r"'p\.json': x is required"):
        validate(Point, {}, "p.json")
    with pytest.raises(FileError, match=r"'p\.json': x must be a valid integer.* got 'a'"):
        validate(Point, {"x": "a"}, "p.json")


class Table(BaseModel):
    """Numbers by name."""

    entries: dict[str, int]


def test_the_message_of_validate_is_short_and_printable() -> None:
    wrong = {f"\x1b[31m\n{i}": "x" for i in range(1000)}
    with pytest.raises(FileError) as caught:
        validate(Table, {"entries": wrong}, "t.json")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1100
