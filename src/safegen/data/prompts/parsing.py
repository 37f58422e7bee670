"""Parsers of prompt files: tables, JSON and text, as records with their line numbers."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from io import StringIO
from typing import Any, Literal

from safegen.core.documents import MAX_DEPTH, check_depth, reason_of
from safegen.core.errors import FileError

FileForm = Literal["table", "json", "text"]
RowUnit = Literal["line", "record", "image", "annotation"]


@dataclass(frozen=True)
class RowError:
    """Reason why a row cannot be used. It never quotes the row, which may be an unsafe text."""

    line: int
    """First line of the row, from 1; in a JSON file, the number of the record."""
    reason: str
    unit: RowUnit = "line"
    """Unit of `line`."""

    def __str__(self) -> str:
        """Return unit, line and reason."""
        return f"{self.unit} {self.line}: {self.reason}"


@dataclass(frozen=True, slots=True)
class FileRow:
    """One row of a file: its line, and its cells by lower-case column name.

    Cells of a table are text; cells of JSON are any JSON value.
    """

    line: int
    cells: Mapping[str, Any]


@dataclass
class FileRows:
    """Content of a file; `columns` are lower-case, in order, without index columns."""

    form: FileForm
    columns: tuple[str, ...] = ()
    rows: list[FileRow] = field(default_factory=list)
    problems: list[RowError] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    unit: RowUnit = "line"
    header: bool = True
    """Whether a table has a header."""


def decode_text(data: bytes, name: str) -> tuple[str, list[str]]:
    """Return a file's text, and a note if it is not UTF-8 and was decoded as latin-1.

    Raises:
        FileError: the file is UTF-16, or not text.
    """
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise FileError(f"{name} is UTF-16 text. Save it as UTF-8.")
    if b"\0" in data:
        raise FileError(
            f"{name} is not text: it has null bytes. Use CSV, TSV, JSON, JSON lines or plain text."
        )
    try:
        return data.decode("utf-8-sig"), []
    except UnicodeDecodeError:
        note = "the file is not UTF-8; it was read as latin-1, so accented letters may be wrong"
        return data.decode("latin-1"), [note]


def parse_table(
    text: str,
    name: str,
    *,
    known: frozenset[str],
    headerless: Callable[[Sequence[str]], tuple[str, ...]],
    delimiter: str = ",",
) -> FileRows:
    """Return the records of a CSV or TSV file; quoted fields may contain line breaks.

    Args:
        text: text of the file.
        name: name of the file, for messages.
        known: lower-case columns; a first row with one of them is a header.
        headerless: function that returns the columns of a file without a header from its first
            row, or () if they are unknown.
        delimiter: separator of fields.

    Raises:
        FileError: the first row is neither a header nor recognized, or a column name repeats.
    """
    records = FileRows("table")
    raw = _csv_rows(text, delimiter, records.problems)
    if not raw:
        reasons = "; ".join(map(str, records.problems))
        raise FileError(f"{name} has no rows{': ' * bool(reasons)}{reasons}")
    names = tuple(cell.strip().lower() for cell in raw[0][1])
    if known.intersection(names):
        raw = raw[1:]
    else:
        names = headerless(raw[0][1])
        if not names:
            raise FileError(
                f"{name} has no known column, or no header. Name the prompt column with --column, "
                "or give a .txt file with one prompt a line."
            )
        records.header = False
        records.notes.append(f"the file has no header; its columns are read as {', '.join(names)}")
    used = [i for i, column in enumerate(names) if column and not column.startswith("unnamed:")]
    records.columns = tuple(names[i] for i in used)
    repeated = sorted({c for c in records.columns if records.columns.count(c) > 1})
    if repeated:
        raise FileError(f"{name} has two columns named {repeated[0]!r}. Rename one of them.")
    for line, cells in raw:
        if not cells:
            records.problems.append(RowError(line, "the row is empty"))
        elif len(cells) != len(names):
            reason = f"the row has {len(cells)} fields, the table has {len(names)} columns"
            records.problems.append(RowError(line, reason))
        else:
            records.rows.append(FileRow(line, {names[i]: cells[i] for i in used}))
    return records


def _csv_rows(text: str, delimiter: str, problems: list[RowError]) -> list[tuple[int, list[str]]]:
    """Return every row with its first line, without empty rows at the start and the end.

    Invalid CSV is added to `problems`.
    """
    reader = csv.reader(StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: list[tuple[int, list[str]]] = []
    while True:
        line = reader.line_num + 1
        try:
            rows.append((line, next(reader)))
        except StopIteration:
            break
        except csv.Error as error:  # the reader continues with the next line
            reason = f"the row is not CSV ({error})"
            if reader.line_num > line:
                reason += (
                    f"; check for an unclosed quote: lines {line} to {reader.line_num} are lost"
                )
            problems.append(RowError(line, reason))
    while rows and not rows[-1][1]:
        rows.pop()
    while rows and not rows[0][1]:
        rows.pop(0)
    return rows


def parse_json(text: str, name: str, *, lines: bool) -> FileRows:
    """Return the records of JSON: COCO captions, a list or object of records, or JSON lines.

    Args:
        text: text of the file.
        name: name of the file, for messages.
        lines: whether each line is a record. Otherwise lines are tried only if the text is not one
            JSON value and its first line is an object.

    Raises:
        FileError: the text is not JSON, or has another structure.
    """
    if lines:
        return _json_lines(text)
    try:
        data = json.loads(text)
        check_depth(data)
    except (ValueError, RecursionError) as error:
        first = next((line for line in re.split(r"\r\n|\n|\r", text) if line.strip()), "")
        if isinstance(_parse_value(first), dict):
            return _json_lines(text)
        raise FileError(f"{name} is not JSON: {reason_of(error)}") from error
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
            f"{name} has an unknown JSON structure. "
            "Use COCO captions, a list of records, or JSON lines."
        )
    records = FileRows("json", unit="record")
    for i, value in enumerate(data, 1):
        _add(records, i, value)
    return _with_columns(records)


def _json_lines(text: str) -> FileRows:
    records = FileRows("json")
    for line, part in _numbered_lines(text):
        if not part:
            records.problems.append(RowError(line, "the line is empty"))
        else:
            _add(records, line, _parse_value(part))
    return _with_columns(records)


def _with_columns(records: FileRows) -> FileRows:
    """Return the records with the columns that any of them has."""
    records.columns = tuple(dict.fromkeys(key for row in records.rows for key in row.cells))
    return records


def _parse_value(text: str) -> Any:
    """Return the JSON value, or the error if the text is not JSON."""
    try:
        value = json.loads(text)
        if text.count("[") + text.count("{") > MAX_DEPTH:
            check_depth(value)
    except (ValueError, RecursionError) as error:
        return error
    return value


def _add(records: FileRows, line: int, value: Any) -> None:
    if isinstance(value, json.JSONDecodeError):
        reason = f"the record is not JSON: {value.msg} at character {value.pos + 1}"
        records.problems.append(RowError(line, reason, records.unit))
    elif isinstance(value, RecursionError):
        records.problems.append(RowError(line, reason_of(value), records.unit))
    elif not isinstance(value, dict):
        records.problems.append(RowError(line, "the record is not a JSON object", records.unit))
    else:
        records.rows.append(
            FileRow(line, {key.strip().lower(): cell for key, cell in value.items()})
        )


def _coco(images: list[Any], annotations: list[Any]) -> FileRows:
    """Return one record per image, with the caption of the lowest annotation id."""
    records = FileRows(
        "json",
        ("caption", "image_id", "annotation_id", "file_name", "image_width", "image_height"),
        unit="image",
    )
    ids = {i["id"] for i in images if isinstance(i, dict) and type(i.get("id")) is int}
    captions: dict[int, list[tuple[int, Any]]] = {}
    for i, note in enumerate(annotations, 1):
        if not isinstance(note, dict) or any(
            type(note.get(key)) is not int for key in ("id", "image_id")
        ):
            reason = "id and image_id must be integers"
            records.problems.append(RowError(i, reason, "annotation"))
        elif note["image_id"] not in ids:
            reason = f"there is no image {note['image_id']}"
            records.problems.append(RowError(i, reason, "annotation"))
        else:
            captions.setdefault(note["image_id"], []).append((note["id"], note.get("caption")))
    seen: set[int] = set()
    for i, image in enumerate(images, 1):
        key = image.get("id") if isinstance(image, dict) else None
        if type(key) is not int:
            records.problems.append(RowError(i, "id must be an integer", "image"))
        elif key in seen or key not in captions:
            problem = "is repeated" if key in seen else "has no caption"
            records.problems.append(RowError(i, f"image {key} {problem}", "image"))
        else:
            seen.add(key)
            annotation_id, caption = min(captions[key], key=lambda pair: pair[0])
            cells = {
                "caption": caption,
                "image_id": key,
                "annotation_id": annotation_id,
                "file_name": image.get("file_name"),
                "image_width": image.get("width"),
                "image_height": image.get("height"),
            }
            records.rows.append(FileRow(i, cells))
    records.notes.append(
        f"{sum(map(len, captions.values()))} captions of {len(captions)} images: the prompt of an "
        "image is the caption with the lowest annotation id"
    )
    return records


def parse_text(text: str) -> FileRows:
    """Return the records of plain text, one stripped prompt per line."""
    records = FileRows("text", ("prompt",))
    for line, part in _numbered_lines(text):
        if part:
            records.rows.append(FileRow(line, {"prompt": part}))
        else:
            records.problems.append(RowError(line, "the prompt is blank"))
    return records


def _numbered_lines(text: str) -> list[tuple[int, str]]:
    """Return the stripped lines with their numbers, without empty lines at the end.

    Only line breaks separate lines, not U+2028 and similar characters.
    """
    if not text.strip():
        return []
    lines = re.split(r"\r\n|\n|\r", text.rstrip())
    return list(enumerate((line.strip() for line in lines), 1))
