"""Prompts as a plan needs them, and the hashes that name them.

The one place that knows where prompts come from.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from safegen.core.errors import ConfigError, FileError
from safegen.core.registry import PROMPT_LISTS
from safegen.data.prompts.prompt import Prompt
from safegen.data.prompts.prompts import read_prompts


class Row(NamedTuple):
    """One prompt as a plan needs it."""

    text: str
    subject: str | None = None
    seed: int | None = None
    cluster: str = ""
    """What it is resampled with: equal texts, or texts found for one target."""


@dataclass(frozen=True)
class Found:
    """The rows that a list means, and what its reader has to say of the others."""

    rows: tuple[Row, ...]
    left_out: tuple[str, ...] = ()
    """Every row of the source that cannot be used: its place and the reason, never its text."""
    notes: tuple[str, ...] = ()
    """What whoever reads the numbers must know of the source."""


def read_rows(
    source: str,
    *,
    prompts: int | None = None,
    select: Mapping[str, str] | None = None,
    seeds: bool = False,
    dialect: str | None = None,
    column: str | None = None,
    unsafe: bool = False,
) -> Found:
    """Return the rows of a bundled list, a file in any dialect of docs/prompts.md, or a file of the hub that `hub:` names.

    Args:
        source: `mini:LIST`, a path, or `hub:owner/name/path/in/repo.csv`.
        prompts: the first so many of those that `select` leaves; all when None.
        select: a column and the value that it must hold; of `categories`, one of the row's labels.
        seeds: keep each row's own seed. Without, it decides nothing and is dropped.
        dialect: a name of `DIALECTS`; told by the columns when None.
        column: which column holds the prompt, where a dialect has a choice.
        unsafe: drop what a file says of a prompt besides, which may be as unsafe as its text.

    Raises:
        UnknownNameError: no such list or dialect.
        FileError: the file is missing or cannot be read, lacks a column of `select`, or has no row
            with that value.
        ConfigError: the dialect or column has no effect.
    """
    found = read_prompts(source, dialect=dialect or None, column=column or None)
    rows = list(found.rows)
    for name, value in (select or {}).items():
        cells = [_cell(row, name) for row in rows]
        if not any(cells):
            raise FileError(
                f"{source} has no column {name!r} to select rows by; get the file that is meant"
            )
        rows = [row for row, cell in zip(rows, cells, strict=True) if value in cell]
        if not rows:
            raise FileError(
                f"{source} has no row whose {name} hold {value!r}; get the file that is meant"
            )
    bundled = is_bundled(source)
    if bundled and prompts is not None and prompts > len(rows):
        raise ConfigError(f"the prompt list {source} has {len(rows)} prompts, got {prompts}")
    kept = (
        Row(
            row.prompt,
            None if unsafe and not bundled else row.subject,
            row.seed if seeds else None,
            row.cluster,
        )
        for row in rows[:prompts]
    )
    return Found(tuple(kept), tuple(map(str, found.problems)), found.notes)


def is_bundled(source: str) -> bool:
    """Return whether a source is a list of the package, which has no file."""
    return ":" in source and source.partition(":")[0] in PROMPT_LISTS


def _cell(row: Prompt, column: str) -> tuple[str, ...]:
    """Return what a row holds in a column, as values that may be selected."""
    if column == "categories":
        return row.categories
    value = row.subject if column == "subject" else row.extra.get(column)
    return () if value is None else (value,)


def hash_rows(rows: Sequence[Row]) -> str:
    """Return a SHA-256 over a list's rows: the hash of each text, its subject, its seed and its cluster, in order."""
    return hash_lines([(sha(row.text), row.subject, row.seed, row.cluster) for row in rows])


def hash_lines(lines: Sequence[object]) -> str:
    """Return a SHA-256 over plain values, one canonical JSON line each."""
    return sha("".join(canonical(line) + "\n" for line in lines))


def canonical(value: object) -> str:
    """Return JSON with sorted keys and no spare blanks: equal values, equal text."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def sha(text: str) -> str:
    """Return the SHA-256 of a text's UTF-8 bytes."""
    return hashlib.sha256(text.encode()).hexdigest()
