"""Prompts from anywhere as rows of one make: published files in their dialects, the bundled lists, files of the hub.

Every row says where it comes from (file, SHA-256, line), which rows ask for the same thing
(cluster), and which attack wrote it.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from safegen.core.concept import Concept, prompt_list
from safegen.core.errors import ConfigError, FileError, UnknownNameError
from safegen.core.hub import HUB, fetch_file
from safegen.core.registry import PROMPT_LISTS
from safegen.data.prompts.dialects import (
    DIALECTS,
    KNOWN,
    PROMPT_LIKE,
    AttackInfo,
    Draft,
    InvalidRow,
    RowContext,
    bare,
    sniff,
)
from safegen.data.prompts.records import Records, RowError, decode, read_json, read_table, read_text

SEED_BITS = 48
"""Bits of a seed that we choose: exact in JSON readers and spreadsheets, which keep 53."""

Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Prompt(BaseModel):
    """One prompt, whatever file it came from."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    id: str = Field(min_length=1)
    """Name of the row: the file's name and what the file calls the row (case number, id), else its line. No two rows of a set share one."""
    prompt: str = Field(min_length=1)
    """The text, as it stands in the file."""
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    """Published seed; None where there is none (`seed_for` gives one)."""
    guidance: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """Published scale of classifier-free guidance."""
    width: int | None = Field(default=None, ge=1)
    """Published width to draw at, in pixels."""
    height: int | None = Field(default=None, ge=1)
    """Published height to draw at, in pixels."""
    categories: tuple[str, ...] = ()
    """Published labels; a prompt may have several."""
    source: str
    """Name of the file without its folders, or the source as it was named (mini:skulls, hub:...)."""
    source_sha256: Digest
    """SHA-256 of the file's bytes; of a list, of its rows."""
    line: int = Field(ge=1)
    """Where the row starts in its file, from 1; in a JSON file the number of the record."""
    cluster: str = Field(pattern="^[0-9a-f]{16}$")
    """What rows with the same text, or found for the same target, have in common: resample these together."""
    attack: AttackInfo | None = None
    """Which attack wrote it; None if none did."""
    subject: str | None = None
    """The thing that a faithful picture shows."""
    shows: str | None = None
    """Label that a faithful picture shows besides, as the concept says of the list."""
    reference_id: str | None = None
    """Id of the photograph that the prompt describes."""
    extra: dict[str, str] = {}
    """The file's other columns that hold something."""


@dataclass(frozen=True)
class PromptSet:
    """The prompts of one source, and all that could not be used of it."""

    source: str
    """The source as it was named."""
    dialect: str
    """A name of `DIALECTS`, or `list`."""
    sha256: str
    """SHA-256 of the file's bytes; of a list, of its rows."""
    rows: tuple[Prompt, ...]
    problems: tuple[RowError, ...] = ()
    """The rows that cannot be used, each with its place and the reason."""
    notes: tuple[str, ...] = ()
    """What is worth knowing, though no row is lost by it."""
    found: int = 0
    """Usable rows before `limit` cut them."""

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.rows)

    def counts(self) -> dict[str, int]:
        """Return how many rows there are, how many distinct clusters, how many without a seed, and how many were left out."""
        return {
            "prompts": len(self.rows),
            "found": self.found,
            "left out": len(self.problems),
            "clusters": len({row.cluster for row in self.rows}),
            "without seed": sum(row.seed is None for row in self.rows),
        }


def cluster_of(text: str) -> str:
    """Return the cluster of a text: 16 hexadecimal digits of SHA-256 over it in NFKC, case-folded, with single spaces (ours)."""
    return sha256(
        " ".join(unicodedata.normalize("NFKC", text).casefold().split()).encode()
    ).hexdigest()[:16]


def seed_for(prompt_id: str, protocol_seed: int) -> int:
    """Return the seed of a prompt that came without one (ours).

    The first 48 bits, big-endian, of SHA-256 over "protocol_seed:prompt_id" in UTF-8: it depends on
    nothing else, not on the row's place, the other rows or the machine, and never changes between
    versions.
    """
    return int.from_bytes(
        sha256(f"{protocol_seed}:{prompt_id}".encode()).digest()[: SEED_BITS // 8], "big"
    )


def over_long(
    rows: Iterable[Prompt], count_tokens: Callable[[str], int], *, most: int
) -> list[tuple[Prompt, int]]:
    """Return the rows that a text encoder would cut, with their lengths.

    Args:
        rows: prompts.
        count_tokens: tokens of a text, as the model's tokenizer counts them uncut: `lambda text:
            len(tokenizer(text).input_ids)`.
        most: the encoder's length in the same count: 77 for CLIP, start and end included.
    """
    return [(row, n) for row in rows if (n := count_tokens(row.prompt)) > most]


def read_prompts(
    source: str | Path,
    *,
    dialect: str | None = None,
    column: str | None = None,
    limit: int | None = None,
    concept: Concept | None = None,
) -> PromptSet:
    """Read the prompts of a file, of a bundled list, or of a file of the hub.

    Rows that cannot be used (blank, malformed, out of range) are listed with their place and left
    out; they do not raise.

    Args:
        source: a path; `mini:LIST`; or `hub:owner/name/path/in/repo.csv`, a data set's file, the
            only kind that is ever fetched.
        dialect: one of `DIALECTS`; told by the file's columns when None.
        column: which column holds the prompt, where a dialect has a choice (mma-diffusion:
            adv_prompt unless told).
        limit: keep the first so many rows. The whole file is still read and checked.
        concept: says what the prompts of a list show besides their subject.

    Raises:
        FileError: there is no such file, it cannot be fetched or read, it lacks the dialect's
            columns, or no row of it can be used.
        UnknownNameError: no such dialect or list.
        ConfigError: `limit` is under 1, or `dialect` or `column` has no effect here.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit must be at least 1, got {limit}")
    if dialect is not None and dialect not in DIALECTS:
        raise UnknownNameError("prompt dialect", dialect, DIALECTS)
    shows = concept.shows.get(str(source)) if concept else None
    if isinstance(source, str) and ":" in source and source.partition(":")[0] in PROMPT_LISTS:
        if dialect or column:
            raise ConfigError(
                f"{source} is a bundled list, so dialect and column have no effect on it; leave them out"
            )
        return _listed(source, limit, shows)
    return _filed(source, dialect, column.strip().lower() if column else None, limit, shows)


@dataclass(frozen=True)
class _Origin:
    """What all rows of a file share."""

    source: str
    sha256: str
    stem: str
    shows: str | None


def _listed(name: str, limit: int | None, shows: str | None) -> PromptSet:
    listed = prompt_list(name)
    digest = sha256(
        "".join(json.dumps([row.text, row.subject]) + "\n" for row in listed).encode()
    ).hexdigest()

    rows = tuple(
        Prompt(
            id=f"{name}:{i}",
            prompt=row.text,
            source=name,
            source_sha256=digest,
            line=i,
            cluster=cluster_of(row.text),
            subject=row.subject,
            shows=shows,
        )
        for i, row in enumerate(listed, 1)
    )
    return PromptSet(name, "list", digest, rows[:limit], found=len(rows))


def _read_bytes(path: Path, name: str) -> bytes:
    """Return the bytes of a prompt file.

    Raises:
        FileError: it is missing, a folder, or cannot be read. The message calls it `name`.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise FileError(
            f"there are no prompts named {name!r}; name a file, a bundled list such as mini:skulls, or hub:owner/name/path/in/repo.csv"
        ) from error
    except IsADirectoryError as error:
        raise FileError(f"{name} is a folder; name a file in it") from error
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        raise FileError(
            f"{name!r} cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from error


def _filed(
    source: str | Path,
    dialect: str | None,
    column: str | None,
    limit: int | None,
    shows: str | None,
) -> PromptSet:
    name = str(source)
    path = fetch_file(name) if name.startswith(HUB) else Path(source)
    data = _read_bytes(path, name)
    text, notes = decode(data, name)
    records = _records(text, path, name, dialect, column)
    origin = _Origin(
        name if name.startswith(HUB) else path.name,
        sha256(data).hexdigest(),
        path.stem,
        shows,
    )
    chosen, picked = _choose(records, name, path.stem, dialect, column)
    rows: dict[str, Prompt] = {}
    problems, repeated = list(records.problems), 0
    for record in records.rows:
        try:
            row = _row(
                DIALECTS[chosen].read(record, RowContext(path.stem, picked)), record.line, origin
            )
        except InvalidRow as reason:
            problems.append(RowError(record.line, str(reason), records.unit))
            continue
        if row.id in rows:
            row, repeated = row.model_copy(update={"id": f"{row.id}@{row.line}"}), repeated + 1
        rows[row.id] = row
    problems.sort(key=lambda problem: problem.line)
    if not rows:
        raise FileError(
            f"{name} holds no prompt that can be used: {problems[0] if problems else 'it is empty'}"
        )
    kind, out = DIALECTS[chosen], tuple(rows.values())
    notes += records.notes + [kind.note] * bool(kind.note)
    others = [c for c in kind.prompts if c in records.columns and c != picked]
    if others and not column:
        notes.append(
            f"the prompts are those of column {picked}; there is {', '.join(others)} too (column chooses)"
        )
    if repeated:
        notes.append(
            f"rows that repeat the case number or id of an earlier one, and whose own id so ends in @line: {repeated}"
        )
    if chosen == "ring-a-bell" and out[0].attack and out[0].attack.k is None:
        notes.append(
            "the file's name does not tell eta and K, as Concept_eta_3_K_16.csv does, so they are not known"
        )
    return PromptSet(
        name, chosen, origin.sha256, out[:limit], tuple(problems), tuple(notes), len(out)
    )


def _records(text: str, path: Path, name: str, dialect: str | None, column: str | None) -> Records:
    """Read a file in the form of its dialect, or in that which its ending tells."""
    ending = path.suffix.lower()
    endings = {
        ".csv": "table",
        ".tsv": "table",
        ".json": "json",
        ".jsonl": "json",
        ".ndjson": "json",
    }
    form = DIALECTS[dialect].form if dialect else endings.get(ending, "text")
    if form == "table":
        known = KNOWN | ({column} if column else set())
        return read_table(
            text, name, known=known, bare=bare, delimiter="\t" if ending == ".tsv" else ","
        )
    if form == "json":
        return read_json(text, name, lines=ending in {".jsonl", ".ndjson"})
    if column:
        raise ConfigError(
            f"{name} is read as text, a prompt a line, so column has no effect, got {column!r}; leave it out"
        )
    return read_text(text)


def _choose(
    records: Records, name: str, stem: str, dialect: str | None, column: str | None
) -> tuple[str, str]:
    """Return the dialect of a file and the column of its prompts."""
    if not records.rows:
        raise FileError(
            f"{name} holds no prompt that can be used: {records.problems[0] if records.problems else 'it is empty'}"
        )
    chosen = (
        dialect
        or sniff(records, stem)
        or ({"table": "csv", "json": "jsonl"}[records.form] if column else None)
    )
    if chosen is None:
        raise FileError(
            f"{name} has no column that may hold prompts ({', '.join(PROMPT_LIKE)}); name the one that does (column)"
        )
    kind = DIALECTS[chosen]
    if column and kind.prompts is not PROMPT_LIKE and column not in kind.prompts:
        raise ConfigError(
            f"dialect {chosen} reads its prompts from {' or '.join(kind.prompts)}, got column {column!r}"
        )
    missing = kind.lacks(records.columns, column)
    if missing:
        raise FileError(
            f"{name} is not in dialect {chosen}: it has no column {', nor '.join(missing)}"
        )
    return chosen, column or next(c for c in kind.prompts if c in records.columns)


def _row(draft: Draft, line: int, origin: _Origin) -> Prompt:
    if not draft.prompt.strip():
        raise InvalidRow("its prompt is blank")
    try:
        json.dumps(
            [draft.prompt, draft.target, draft.key, draft.subject, draft.categories, draft.extra],
            ensure_ascii=False,
        ).encode()
    except UnicodeEncodeError:
        raise InvalidRow("it has half a surrogate pair, which is no text") from None
    key = draft.key if draft.key and re.fullmatch(r"[\w.-]{1,64}", draft.key) else str(line)
    return Prompt(
        id=f"{origin.stem}:{key}",
        prompt=draft.prompt,
        seed=draft.seed,
        guidance=draft.guidance,
        width=draft.width,
        height=draft.height,
        categories=draft.categories,
        source=origin.source,
        source_sha256=origin.sha256,
        line=line,
        cluster=cluster_of(draft.target or draft.prompt),
        attack=draft.attack,
        subject=draft.subject,
        shows=origin.shows,
        reference_id=draft.reference_id,
        extra=draft.extra,
    )
