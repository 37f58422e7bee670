"""Read JSON and TOML documents of unknown origin; every defect is one line that names the file."""

from __future__ import annotations

import json
import stat
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json

from safegen.core.errors import FileError, explain

Record = TypeVar("Record", bound=BaseModel)
MAX_BYTES = 256 * 2**20
"""Largest document that is read, in bytes; larger ones are refused."""


def read_bytes(path: Path, *, limit: int = MAX_BYTES) -> bytes:
    """Return the content of a regular file.

    A pipe, a device or a folder is refused without waiting for data.

    Raises:
        FileError: the file is missing, no regular file, unreadable, or larger than `limit` bytes.
    """
    try:
        check_regular(path, path.stat().st_mode)
        with path.open("rb") as file:
            content = file.read(limit + 1)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        reason = getattr(error, "strerror", None) or error
        raise FileError(f"{str(path)!r} cannot be read: {reason}") from error
    if len(content) > limit:
        raise FileError(f"{str(path)!r} must have at most {limit} bytes. Is it the right file?")
    return content


def check_regular(path: Path, mode: int) -> None:
    """Raise if the mode of a path is not that of a regular file.

    Raises:
        FileError: the path is a folder, a pipe, a device or a socket.
    """
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
        kind = kinds.get(stat.S_IFMT(mode), "a device")
        raise FileError(f"{str(path)!r} must be a regular file, got {kind}")


def read_text(path: Path, *, limit: int = MAX_BYTES) -> str:
    """Return the text of a UTF-8 file, without a byte-order mark.

    CR LF and CR become LF.

    Raises:
        FileError: the file cannot be read, is too large or is not UTF-8.
    """
    try:
        text = read_bytes(path, limit=limit).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FileError(f"{str(path)!r} is not UTF-8 text: {error}") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_json(path: Path) -> Any:
    """Return the value of a JSON file.

    Raises:
        FileError: the file cannot be read or is not JSON.
    """
    return parse_json(read_text(path), str(path))


def read_json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the number and the value of each line of a JSON Lines file; blank lines are skipped.

    Raises:
        FileError: the file cannot be read, or a line is not JSON.
    """
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            yield number, parse_json(line, f"{path} line {number}")


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the object of a JSON file.

    Raises:
        FileError: the file cannot be read, is not JSON, or is not an object.
    """
    return check_object(read_json(path), str(path))


def check_object(value: Any, source: str) -> dict[str, Any]:
    """Return a value if it is a JSON object.

    Raises:
        FileError: the value is not an object.
    """
    if not isinstance(value, dict):
        raise FileError(f"{source!r} must be a JSON object, got {type(value).__name__}")
    return value


def read_toml(path: Path) -> dict[str, Any]:
    """Return the table of a TOML file.

    Raises:
        FileError: the file cannot be read or is not TOML.
    """
    text = read_text(path)
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise FileError(f"{str(path)!r} is not TOML: {reason_of(error)}") from error


def parse_json(text: str | bytes, source: str) -> Any:
    """Return the value of a JSON text; NaN, infinities and deep nesting are refused.

    Args:
        text: the JSON text.
        source: name of the text for messages, a path for example.

    Raises:
        FileError: the text is not JSON.
    """
    try:
        value = from_json(text, allow_inf_nan=False)
        json.dumps(value, allow_nan=False)  # 1e999 is infinite
    except ValueError as error:
        raise FileError(f"{source!r} is not JSON: {error}") from error
    return value


def read_record(model: type[Record], path: Path) -> Record:
    """Return the record in a JSON file; see `parse_record`.

    Raises:
        FileError: the file cannot be read, or does not fit the class.
    """
    return parse_record(model, read_bytes(path), str(path))


def parse_record(model: type[Record], text: bytes, source: str) -> Record:
    """Return a record from its JSON; types are strict, so "3" and true are no integers.

    Args:
        model: class of the record.
        text: the JSON text.
        source: name of the text for messages, a path for example.

    Raises:
        FileError: the text is not JSON or does not fit the class; each wrong field is named.
    """
    try:
        return model.model_validate_json(text, strict=True)
    except ValidationError as error:
        raise FileError(f"{source!r} is damaged: {explain(error, model)}") from error


def validate(model: type[Record], value: Any, source: str) -> Record:
    """Return a record of untrusted data.

    Args:
        model: class of the record.
        value: parsed JSON or TOML.
        source: name of the data for messages, a path for example.

    Raises:
        FileError: the data does not fit the class; each wrong field is named.
    """
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise FileError(f"{source!r}: {explain(error, model)}") from error


def reason_of(error: Exception) -> str:
    """Return why a document cannot be parsed, on one line."""
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error)


def check_plain(value: Any) -> Any:
    """Return a value if it is plain JSON with finite numbers; for pydantic validators.

    Raises:
        ValueError: it is not.
    """
    try:
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"values must be plain JSON with finite numbers: {error}") from None
    return value
