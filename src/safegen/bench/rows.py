"""Prompts as a plan needs them, and the hashes that name them. The one place that knows where prompts come from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from safegen.concept import prompt_list
from safegen.errors import BadFile
from safegen.tables import PROMPT_LISTS


class Row(NamedTuple):
    """One prompt as a plan needs it."""

    text: str
    subject: str | None = None
    seed: int | None = None


def read_rows(source: str, n: int | None, select: Mapping[str, str]) -> list[Row]:
    """Return the first `n` prompts of `source:list`, or of a plain text file with a prompt a line.

    Raises:
        UnknownName: no such source or list.
        BadFile: the file is missing, empty, or of a kind that is not read here.
    """
    if source.partition(":")[0] in PROMPT_LISTS:
        if n is None:
            raise BadFile(f"the list {source} needs a number of prompts")
        return [Row(row.text, row.subject) for row in prompt_list(source, n)]
    path = Path(source)
    if not path.is_file():
        raise BadFile(f"the prompt file {source!r} does not exist")
    if path.suffix != ".txt" or select:
        raise BadFile(f"{source} cannot be read as a protocol's prompts; this version reads plain text (.txt) with a prompt a line")
    try:
        texts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise BadFile(f"the prompt file {source!r} is not UTF-8 text: {error}") from error
    rows = [Row(text) for text in texts if text][:n]
    if not rows:
        raise BadFile(f"the prompt file {source!r} has no prompts")
    return rows


def hash_rows(rows: Sequence[Row]) -> str:
    """Return a SHA-256 over a list's rows: the hash of each text, its subject and its seed, in order."""
    return hash_lines([(sha(row.text), row.subject, row.seed) for row in rows])


def hash_lines(lines: Sequence[object]) -> str:
    """Return a SHA-256 over plain values, one canonical JSON line each."""
    return sha("".join(canonical(line) + "\n" for line in lines))


def canonical(value: object) -> str:
    """Return JSON with sorted keys and no spare blanks: equal values, equal text."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def sha(text: str) -> str:
    """Return the SHA-256 of a text's UTF-8 bytes."""
    return hashlib.sha256(text.encode()).hexdigest()
