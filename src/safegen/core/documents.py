"""Read JSON and TOML documents of unknown origin; every defect is one line that names the file."""

from __future__ import annotations

import json
import math
import stat
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError

from safegen.core.errors import FileError, explain

Record = TypeVar("Record", bound=BaseModel)
MAX_BYTES = 256 * 2**20
"""Largest document that is read, in bytes; larger ones are refused."""
MAX_DEPTH = 100
"""Most levels of lists and objects in a document; deeper ones are refused."""


def read_bytes(path: Path, *, limit: int = MAX_BYTES) -> bytes:
    """Return the content of a regular file.

    A pipe, a device or a folder is refused without waiting for data.

    Raises:
        FileError: the file is missing, no regular file, unreadable, or larger than `limit` bytes.
    """
    check_file(path)
    try:
        with path.open("rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise FileError(f"{str(path)!r} cannot be read: {error.strerror or error}") from error
    if len(content) > limit:
        raise FileError(f"{str(path)!r} must have at most {limit} bytes. Is it the right file?")
    return content


def check_file(path: Path) -> int:
    """Check that a path is a regular file, and return its size in bytes.

    Raises:
        FileError: it is missing, cannot be reached, or is no regular file.
    """
    try:
        status = path.stat()
    except FileNotFoundError as error:
        raise FileError(f"{str(path)!r} does not exist") from error
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        reason = getattr(error, "strerror", None) or error
        raise FileError(f"{str(path)!r} cannot be read: {reason}") from error
    check_regular(path, status.st_mode)
    return status.st_size


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


def read_json_object(path: Path, *, constants: bool = False) -> dict[str, Any]:
    """Return the object of a JSON file.

    Args:
        path: the file.
        constants: see `parse_json`.

    Raises:
        FileError: the file cannot be read, is not JSON, or is not an object.
    """
    value = parse_json(read_text(path), str(path), constants=constants)
    return check_object(value, str(path))


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
        value = tomllib.loads(text)
        check_depth(value)
    except (ValueError, RecursionError) as error:
        raise FileError(f"{str(path)!r} is not TOML: {reason_of(error)}") from error
    return value


def parse_json(
    text: str | bytes, source: str, *, unique_keys: bool = False, constants: bool = False
) -> Any:
    """Return the value of a JSON text; only what JSON can write again is accepted.

    NaN, infinite numbers, lone surrogates and more than `MAX_DEPTH` levels are refused.

    Args:
        text: the JSON text.
        source: name of the text for messages, a path for example.
        unique_keys: also refuse an object with the same key twice.
        constants: accept the words NaN, Infinity and -Infinity, which Python's json writes.

    Raises:
        FileError: the text is not JSON.
    """
    hook = _refuse_repeated_keys if unique_keys else None
    constant = float if constants else _refuse_constant
    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        value = json.loads(
            text, parse_constant=constant, parse_float=_parse_float, object_pairs_hook=hook
        )
        check_depth(value)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise FileError(f"{source!r} is not JSON: {reason_of(error)}") from error
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
        raise FileError(f"{source!r}: {_shorten(explain(error, model))}") from error


def _shorten(text: str, limit: int = 1000) -> str:
    """Return a message with control characters escaped, cut to a number of characters."""
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[:limit])
    return shown if len(text) <= limit else f"{shown}..."


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


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _parse_float(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text[:80]} is too large a number")
    return value


def _refuse_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        repeated = next(key for key, count in counts.items() if count > 1)
        raise ValueError(f"it has the key {repeated[:80]!r} more than once")
    return value


def check_depth(value: Any) -> None:
    """Raise RecursionError if a value has more than `MAX_DEPTH` levels."""
    level, depth = [value], 0
    while level := [item for item in level if isinstance(item, dict | list)]:
        depth += 1
        if depth > MAX_DEPTH:
            raise RecursionError
        level = [
            child for item in level for child in (item.values() if isinstance(item, dict) else item)
        ]
