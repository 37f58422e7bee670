"""Readers of prompts: published files in their dialects, bundled lists, and files of the hub."""

from __future__ import annotations

import json
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from safegen.core.concept import prompt_list
from safegen.core.documents import read_bytes
from safegen.core.errors import ConfigError, FileError, UnknownNameError
from safegen.core.files import exists
from safegen.core.hub import HUB, fetch_file
from safegen.core.registry import PROMPT_LISTS
from safegen.core.text import escape_control
from safegen.data.prompts.dialects import DIALECTS, detect_dialect, headerless_columns
from safegen.data.prompts.parsing import (
    FileRows,
    RowError,
    decode_text,
    parse_json,
    parse_table,
    parse_text,
)
from safegen.data.prompts.prompt import Prompt, cluster_of
from safegen.data.prompts.rows import KNOWN_COLUMNS, PROMPT_COLUMNS, InvalidRowError, RowContext

FORMS = {".csv": "table", ".tsv": "table", ".json": "json", ".jsonl": "json", ".ndjson": "json"}
"""Form of a file by its extension; other files are text."""
FOUND = "safegen-attack"
"""Dialect of prompts that an attack found, which may start from an image or latents."""
MAX_FILE = 2**31
"""Largest file of prompts, in bytes."""
MAX_RECENT = 2**26
"""Largest file, in bytes, that keeps its prompts in memory: a protocol reads them several times."""


@dataclass(frozen=True)
class PromptSet:
    """Prompts of one source, with the rows that could not be used."""

    source: str
    """Source, as the user wrote it."""
    dialect: str
    """A name of `DIALECTS`, or `list`."""
    sha256: str
    """SHA-256 of the file's bytes, or of the rows of a bundled list."""
    rows: tuple[Prompt, ...]
    problems: tuple[RowError, ...] = ()
    """Rows that cannot be used, with line and reason."""
    notes: tuple[str, ...] = ()
    """Remarks on the file; no row is lost by them."""

    def __len__(self) -> int:
        """Return the number of prompts."""
        return len(self.rows)

    def counts(self) -> dict[str, int]:
        """Return the numbers of prompts, skipped rows, clusters, and prompts without a seed."""
        return {
            "prompts": len(self.rows),
            "skipped": len(self.problems),
            "clusters": len({row.cluster for row in self.rows}),
            "without_seed": sum(row.seed is None for row in self.rows),
        }


_recent: dict[tuple[str | None, ...], PromptSet] = {}
"""Prompts of the last file, by its name, content and reading."""


def read_prompts(
    source: str | Path, *, dialect: str | None = None, column: str | None = None
) -> PromptSet:
    """Return the prompts of a file, of a bundled list, or of a file of the hub.

    Rows that cannot be used (blank, malformed, out of range) are skipped and listed.

    Args:
        source: a path; `mini:LIST`; or `hub:owner/name/path/in/repo.csv`, which is downloaded.
        dialect: one of `DIALECTS`. Default: detected from the file's columns.
        column: column that holds the prompt. Default: the first of the dialect's prompt columns.

    Raises:
        FileError: the file is missing, cannot be fetched or read, lacks columns of the dialect, or
            has no usable row.
        UnknownNameError: no such dialect or list.
        ConfigError: `dialect` or `column` does not apply to the source.
    """
    if dialect is not None and dialect not in DIALECTS:
        raise UnknownNameError("prompt dialect", dialect, DIALECTS)
    if isinstance(source, str) and ":" in source and source.partition(":")[0] in PROMPT_LISTS:
        if dialect or column:
            raise ConfigError(f"{source} is a bundled list. Omit dialect and column.")
        return _read_list(source)
    return _read_file(source, dialect, column.strip().lower() if column else None)


def _read_list(name: str) -> PromptSet:
    listed = prompt_list(name)
    lines = (json.dumps([v for v in row.model_dump().values() if v]) + "\n" for row in listed)
    digest = sha256("".join(lines).encode()).hexdigest()
    rows = tuple(
        Prompt(
            id=f"{name}:{i}",
            prompt=row.text,
            source=name,
            source_sha256=digest,
            line=i,
            cluster=cluster_of(row.text),
            subject=row.subject,
            background=row.background,
        )
        for i, row in enumerate(listed, 1)
    )
    return PromptSet(name, "list", digest, rows)


def _read_file(source: str | Path, dialect: str | None, column: str | None) -> PromptSet:
    name = str(source)
    is_remote = isinstance(source, str) and source.startswith(HUB)
    path = fetch_file(name) if is_remote else Path(source)
    if not exists(path):
        raise FileError(
            f"there are no prompts named {name!r}. Use a file, a bundled list such as mini:skulls, "
            "or hub:owner/name/path/in/repo.csv"
        )
    data = read_bytes(path, limit=MAX_FILE)
    digest = sha256(data).hexdigest()
    key = (name, str(path), digest, dialect, column)
    if (known := _recent.get(key)) is not None:
        return known
    text, notes = decode_text(data, name)
    records = _parse(text, path, name, dialect, column)
    dialect, prompt_column = _choose(records, name, path.stem, dialect, column)
    if dialect != FOUND and any(isinstance(row.cells.get("start"), dict) for row in records.rows):
        raise FileError(
            f"{name} must have the columns attack and attacked_prompt beside start, got none; "
            "without them generation would start from noise. Add them."
        )
    context = RowContext(
        name if is_remote else escape_control(path.name),
        digest,
        escape_control(path.stem),
        prompt_column,
        path.parent,
    )
    prompts, problems, repeated = _read_rows(records, dialect, context)
    if not prompts:
        raise _no_rows(name, problems)
    notes += records.notes
    notes += _notes(dialect, records, context, explicit=column is not None, repeated=repeated)
    if dialect == "ring-a-bell" and prompts[0].attack and prompts[0].attack.k is None:
        notes.append("eta and K are unknown: the file's name is not like Concept_eta_3_K_16.csv")
    found = PromptSet(name, dialect, digest, prompts, tuple(problems), tuple(notes))
    if dialect != FOUND and len(data) <= MAX_RECENT:  # a start has files of its own
        _recent.clear()
        _recent[key] = found
    return found


def _read_rows(
    records: FileRows, dialect: str, context: RowContext
) -> tuple[tuple[Prompt, ...], list[RowError], int]:
    """Return the prompts of a file, the rows that cannot be used, and how many ids repeat.

    The records are removed from memory on the way.
    """
    rows: dict[str, Prompt] = {}
    problems, repeated = list(records.problems), 0
    records.rows.reverse()
    while records.rows:
        record = records.rows.pop()
        try:
            row = DIALECTS[dialect].read(record, context)
        except InvalidRowError as reason:
            problems.append(RowError(record.line, str(reason), records.unit))
            continue
        if row.id in rows:
            row, repeated = row.model_copy(update={"id": f"{row.id}@{row.line}"}), repeated + 1
        rows[row.id] = row
    problems.sort(key=lambda problem: problem.line)
    return tuple(rows.values()), problems, repeated


def _notes(
    dialect: str, records: FileRows, context: RowContext, *, explicit: bool, repeated: int
) -> list[str]:
    notes = [DIALECTS[dialect].note] * bool(DIALECTS[dialect].note)
    others = [c for c in DIALECTS[dialect].prompts if c in records.columns and c != context.column]
    if others and not explicit:
        notes.append(
            f"prompts are read from column {context.column}; other prompt columns: "
            f"{', '.join(others)} (see --column)"
        )
    if repeated:
        notes.append(f"rows with a repeated id, which is extended by @line: {repeated}")
    return notes


def _parse(text: str, path: Path, name: str, dialect: str | None, column: str | None) -> FileRows:
    """Return the records of a file in the form of its dialect, else of its extension."""
    extension = path.suffix.lower()
    form = DIALECTS[dialect].form if dialect else FORMS.get(extension, "text")
    if form == "table":
        known = KNOWN_COLUMNS | ({column} if column else set())
        delimiter = "\t" if extension == ".tsv" else ","
        return parse_table(
            text, name, known=known, headerless=headerless_columns, delimiter=delimiter
        )
    if form == "json":
        return parse_json(text, name, lines=extension in {".jsonl", ".ndjson"})
    if column:
        raise ConfigError(
            f"{name} is plain text, which has no columns, got column {column!r}. Omit column."
        )
    return parse_text(text)


def _choose(
    records: FileRows, name: str, stem: str, dialect: str | None, column: str | None
) -> tuple[str, str]:
    """Return the dialect of a file and its prompt column."""
    if not records.rows:
        raise _no_rows(name, records.problems)
    generic = {"table": "csv", "json": "jsonl"}
    dialect = (
        dialect or detect_dialect(records, stem) or (generic[records.form] if column else None)
    )
    if dialect is None:
        raise FileError(
            f"{name} has no prompt column ({', '.join(PROMPT_COLUMNS)}). Name it with --column."
        )
    prompts = DIALECTS[dialect].prompts
    if column and prompts is not PROMPT_COLUMNS and column not in prompts:
        raise ConfigError(
            f"column must be {' or '.join(prompts)} for dialect {dialect}, got {column!r}"
        )
    missing = DIALECTS[dialect].missing_columns(records.columns, column)
    if missing:
        raise FileError(
            f"{name} is not in dialect {dialect}: it has no column {', nor '.join(missing)}"
        )
    return dialect, column or next(c for c in prompts if c in records.columns)


def _no_rows(name: str, problems: list[RowError]) -> FileError:
    return FileError(f"{name} has no usable prompt: {problems[0] if problems else 'it is empty'}")
