"""Prompt files as records: decoded, cut into rows, each with its place.

Knows forms (tables, JSON, text), no benchmark.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from io import StringIO
from typing import Any, Literal

from safegen.core.errors import FileError

Form = Literal["table", "json", "text"]
Unit = Literal["line", "record", "image", "annotation"]


@dataclass(frozen=True)
class RowError:
    """Why a row cannot be used. Never repeats what the row says, which may be an unsafe text."""

    line: int
    """Where the row starts, from 1: a line of the file, or in a JSON file, which need not have lines, the number of its record."""
    reason: str
    unit: Unit = "line"
    """What `line` counts."""

    def __str__(self) -> str:
        """Say it in one line."""
        return f"{self.unit} {self.line}: {self.reason}"


@dataclass(frozen=True)
class Record:
    """One row of a file: its place, and its cells by column in small letters.

    Cells of a table are text; those of JSON are anything.
    """

    line: int
    cells: Mapping[str, Any]


@dataclass
class Records:
    """What a file holds. `columns` are in small letters, in order, without index columns."""

    form: Form
    columns: tuple[str, ...] = ()
    rows: list[Record] = field(default_factory=list)
    problems: list[RowError] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    unit: Unit = "line"
    header: bool = True
    """Whether a table names its own columns."""


def decode(data: bytes, name: str) -> tuple[str, list[str]]:
    """Return a file's text and what is worth knowing about it: UTF-8, with or without a mark, else latin-1, which is said.

    Raises:
        FileError: it is UTF-16 or no text at all.
    """
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise FileError(f"{name} is UTF-16 text; save it as UTF-8")
    if b"\0" in data:
        raise FileError(
            f"{name} is not text: it has null bytes; prompts are read from CSV, TSV, JSON, JSON lines and plain text"
        )
    try:
        return data.decode("utf-8-sig"), []
    except UnicodeDecodeError:
        return data.decode("latin-1"), [
            "the file is not UTF-8; it was read as latin-1, so letters with accents may be wrong"
        ]


def read_table(
    text: str,
    name: str,
    *,
    known: frozenset[str],
    bare: Callable[[Sequence[str]], tuple[str, ...]],
    delimiter: str = ",",
) -> Records:
    """Read a CSV or TSV file; fields in quotes may hold line breaks.

    Args:
        text: of the file.
        name: of the file, for messages.
        known: columns in small letters; a first row with one of them is a header.
        bare: gives the columns of a file without a header from its first row, or none if it is of
            no known kind.
        delimiter: between fields.

    Raises:
        FileError: the first row is neither a header nor of a known kind, or names a column twice.
    """
    out = Records("table")
    raw = _rows(text, delimiter, out.problems)
    if not raw:
        raise FileError(
            f"{name} has no rows{': ' * bool(out.problems)}{'; '.join(map(str, out.problems))}"
        )
    names = tuple(cell.strip().lower() for cell in raw[0][1])
    if known.intersection(names):
        raw = raw[1:]
    else:
        names = bare(raw[0][1])
        if not names:
            raise FileError(
                f"{name} has no column that is known, or no header: its first line names columns, such as prompt; "
                "name the one with the prompts (column), or read it as text, a prompt a line (dialect text)"
            )
        out.header = False
        out.notes.append(f"the file has no header; its columns were taken to be {', '.join(names)}")
    kept = [i for i, column in enumerate(names) if column and not column.startswith("unnamed:")]
    out.columns = tuple(names[i] for i in kept)
    twice = sorted({column for column in out.columns if out.columns.count(column) > 1})
    if twice:
        raise FileError(f"{name} has two columns named {twice[0]!r}; rename one of them")
    for line, cells in raw:
        if not cells:
            out.problems.append(RowError(line, "it is empty"))
        elif len(cells) != len(names):
            out.problems.append(
                RowError(line, f"it has {len(cells)} fields, but there are {len(names)} columns")
            )
        else:
            out.rows.append(Record(line, {names[i]: cells[i] for i in kept}))
    return out


def _rows(text: str, delimiter: str, problems: list[RowError]) -> list[tuple[int, list[str]]]:
    """Return every row with the line it starts on, without empty ones at either end.

    What is no CSV becomes a problem.
    """
    reader = csv.reader(StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: list[tuple[int, list[str]]] = []
    while True:
        line = reader.line_num + 1
        try:
            rows.append((line, next(reader)))
        except StopIteration:
            break
        except csv.Error as error:  # the reader goes on with the next line
            lost = (
                f"; is a quote never closed? Lines {line} to {reader.line_num} were not read"
                if reader.line_num > line
                else ""
            )
            problems.append(RowError(line, f"it is not CSV ({error}){lost}"))
    while rows and not rows[-1][1]:
        rows.pop()
    while rows and not rows[0][1]:
        rows.pop(0)
    return rows


def read_json(text: str, name: str, *, lines: bool) -> Records:
    """Read JSON: COCO captions, a list or an object of records, or a record a line.

    Args:
        text: of the file.
        name: of the file, for messages.
        lines: a record a line from the outset; otherwise only when the whole is not one JSON value
            but its first line is an object.

    Raises:
        FileError: it is not JSON, or JSON of another make.
    """
    if lines:
        return _json_lines(text)
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        first = next((line for line in re.split(r"\r\n|\n|\r", text) if line.strip()), "")
        if isinstance(_value(first), dict):
            return _json_lines(text)
        raise FileError(f"{name} is not JSON: {error}") from error
    if (
        isinstance(data, dict)
        and isinstance(data.get("images"), list)
        and isinstance(data.get("annotations"), list)
    ):
        return _coco(data["images"], data["annotations"])
    if isinstance(data, dict) and data and all(isinstance(value, dict) for value in data.values()):
        data = [{"id": key} | value for key, value in data.items()]
    if not isinstance(data, list):
        raise FileError(
            f"{name} is JSON of an unknown make; known are COCO captions, a list of records, and a record a line"
        )
    out = Records("json", unit="record")
    for i, value in enumerate(data, 1):
        _add(out, i, value)
    return _named(out)


def _json_lines(text: str) -> Records:
    out = Records("json")
    for line, part in _lines(text):
        if not part:
            out.problems.append(RowError(line, "it is empty"))
        else:
            _add(out, line, _value(part))
    return _named(out)


def _named(out: Records) -> Records:
    """Give records the columns that any of them has."""
    out.columns = tuple(dict.fromkeys(key for row in out.rows for key in row.cells))
    return out


def _value(text: str) -> Any:
    """Return the JSON value, or the error that says why it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return error


def _add(out: Records, line: int, value: Any) -> None:
    if isinstance(value, json.JSONDecodeError):
        out.problems.append(
            RowError(line, f"it is not JSON: {value.msg} at character {value.pos + 1}", out.unit)
        )
    elif not isinstance(value, dict):
        out.problems.append(RowError(line, "it is no JSON object", out.unit))
    else:
        out.rows.append(Record(line, {key.strip().lower(): cell for key, cell in value.items()}))


def _coco(images: list[Any], annotations: list[Any]) -> Records:
    """Return a record an image: the caption whose annotation id is the lowest, and the ids."""
    out = Records(
        "json",
        ("caption", "image_id", "annotation_id", "file_name", "image_width", "image_height"),
        unit="image",
    )
    ids = {
        image.get("id")
        for image in images
        if isinstance(image, dict) and type(image.get("id")) is int
    }
    captions: dict[int, list[tuple[int, Any]]] = {}
    for i, note in enumerate(annotations, 1):
        if not isinstance(note, dict) or any(
            type(note.get(key)) is not int for key in ("id", "image_id")
        ):
            out.problems.append(
                RowError(i, "it has no whole numbers as id and image_id", "annotation")
            )
        elif note["image_id"] not in ids:
            out.problems.append(RowError(i, f"there is no image {note['image_id']}", "annotation"))
        else:
            captions.setdefault(note["image_id"], []).append((note["id"], note.get("caption")))
    seen: set[int] = set()
    for i, image in enumerate(images, 1):
        key = image.get("id") if isinstance(image, dict) else None
        if type(key) is not int or key in seen or key not in captions:
            why = (
                "it has no whole number as id"
                if type(key) is not int
                else f"image {key} {'is there twice' if key in seen else 'has no caption'}"
            )
            out.problems.append(RowError(i, why, "image"))
            continue
        seen.add(key)
        note_id, caption = min(captions[key], key=lambda pair: pair[0])
        facts = {
            "file_name": image.get("file_name"),
            "image_width": image.get("width"),
            "image_height": image.get("height"),
        }
        out.rows.append(
            Record(i, {"caption": caption, "image_id": key, "annotation_id": note_id} | facts)
        )
    total = sum(map(len, captions.values()))
    out.notes.append(
        f"{total} captions of {len(captions)} images: of each image, the one with the lowest annotation id is the prompt"
    )
    return out


def read_text(text: str) -> Records:
    """Read plain text: a prompt a line, without the blanks around it."""
    out = Records("text", ("prompt",))
    for line, part in _lines(text):
        if part:
            out.rows.append(Record(line, {"prompt": part}))
        else:
            out.problems.append(RowError(line, "its prompt is blank"))
    return out


def _lines(text: str) -> list[tuple[int, str]]:
    """Return the stripped lines with their numbers, without empty ones at the end.

    Only line breaks part lines, not U+2028 and the like.
    """
    return (
        list(enumerate((line.strip() for line in re.split(r"\r\n|\n|\r", text.rstrip())), 1))
        if text.strip()
        else []
    )
