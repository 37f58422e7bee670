"""Files of a suite of attack prompts: its manifest, its protocol and its card."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from safegen.attacks.core.cost import Cost
from safegen.core.documents import read_bytes, read_record
from safegen.core.errors import FileError
from safegen.core.settings import Count, Digest, JsonObject, Name, Share
from safegen.evaluation.protocol import Protocol
from safegen.evaluation.report.format import format_rate, markdown_code, markdown_text
from safegen.evaluation.run.records import StackEntry
from safegen.evaluation.samples import MEANING, Role, is_bundled

MANIFEST, PROTOCOL, CARD, PROMPT_FOLDER = "manifest.json", "protocol.toml", "README.md", "prompts"
FORMAT: Literal["safegen-suite/1"] = "safegen-suite/1"
TEMPLATE = "card.md"
TABLES = ("generation", "judge")
"""Tables of a protocol that are written in full, so that no default of a version enters."""
MAX_FILE = 2**31
"""Largest file of a suite, in bytes."""


class SuitePart(BaseModel):
    """Part of a manifest."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class SuiteConcept(SuitePart):
    """Concept of a suite, and what counts as an image of it."""

    name: Name
    """Name of the concept."""
    words: tuple[str, ...]
    """Phrases that name it."""
    judge: Name
    """Name of the judge."""
    labels: tuple[str, ...]
    """Labels of the judge that mean it."""
    threshold: Share
    """Lowest score of a detection that counts."""


class SuiteAttack(SuitePart):
    """Attack that made prompts of a suite."""

    name: Name
    """Name of the attack."""
    paper: str
    """Source of the method."""
    settings: JsonObject
    """Settings, with hashes in place of paths."""
    prompts: Count
    """Prompts that it found, those of every variant counted."""
    stopped: Count
    """Prompts of which the budget ended the search."""
    stable: Count | None
    """Texts that are read as the tokens that the attack chose; None if it chose none."""
    cost: Cost
    """Cost of all its prompts."""


class SuiteList(SuitePart):
    """Prompt list of a suite, with the rate of the stack that it was made on."""

    name: Name
    """Name of the list."""
    role: Role
    """Relation of its prompts to the concept."""
    prompts: Count
    """Number of its prompts."""
    sha256: Digest
    """SHA-256 of the prompts (`hash_prompts`)."""
    base: JsonObject | None
    """Rate of images that show the concept, with its Wilson interval; None if none was judged."""


class SuiteManifest(SuitePart):
    """Everything about a suite of attack prompts (`manifest.json`)."""

    format: Literal["safegen-suite/1"] = FORMAT
    safegen: str
    """Version that made it."""
    concept: SuiteConcept
    """Concept that the prompts ask for."""
    stack: StackEntry
    """Stack that the attacks worked on, usually a base model."""
    config: JsonObject
    """Prompts, budget and generation of the attacks."""
    protocol: str
    """Id of the protocol."""
    attacks: tuple[SuiteAttack, ...]
    """Attacks, in the order of their lists."""
    lists: tuple[SuiteList, ...]
    """Lists of the protocol."""
    files: dict[str, Digest]
    """SHA-256 of every file of the suite but this one."""


def open_suite(folder: Path) -> SuiteManifest:
    """Return the manifest of a suite, with its files checked against their hashes.

    Raises:
        FileError: the folder is no suite, or a file is missing or has changed.
    """
    if not os.path.lexists(folder / MANIFEST):
        raise FileError(f"{folder} must be a suite with {MANIFEST}, got none. Make it again.")
    manifest = read_record(SuiteManifest, folder / MANIFEST)
    for name, digest in manifest.files.items():
        path = folder / name
        if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
            raise FileError(f"{name!r} must lie in {folder}. Copy the file there.")
        if file_digest(path) != digest:
            raise FileError(
                f"{path} has changed since the suite was made. Use the original file, or make "
                "another suite."
            )
    return manifest


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    return hashlib.sha256(read_bytes(path, limit=MAX_FILE)).hexdigest()


def prompt_files(out: Path) -> list[str]:
    """Return the paths of the files below the folder of prompts, in order."""
    folder = out / PROMPT_FOLDER
    found = [Path(where) / name for where, _, names in os.walk(folder) for name in names]
    return sorted(path.relative_to(out).as_posix() for path in found)


def protocol_toml(protocol: Protocol, folder: Path) -> str:
    """Return a protocol as TOML, with its sources relative to the folder of the file."""
    values = protocol.model_dump(mode="json", exclude_defaults=True)
    lists = [
        part.model_copy(
            update={
                "source": part.source
                if part.source is None or is_bundled(part.source)
                else Path(part.source).relative_to(folder).as_posix()
            }
        ).model_dump(mode="json", exclude_defaults=True)
        for part in protocol.lists
    ]
    tables = {name: getattr(protocol, name).model_dump(mode="json") for name in TABLES}
    values = {name: value for name, value in values.items() if name not in ("lists", *TABLES)}
    lines = [*_entries(values)]
    for name, table in tables.items():
        lines += ["", f"[{name}]", *_entries(table)]
    for part in lists:
        lines += ["", "[[lists]]", *_entries(part)]
    return "\n".join(lines) + "\n"


def _entries(table: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of a TOML table without sub-tables."""
    for name, value in table.items():
        if value is not None:
            yield f"{name} = {_value(value)}"


def _value(value: Any) -> str:
    """Return a plain value as TOML. Strings of JSON are strings of TOML, except DEL."""
    if isinstance(value, Mapping):
        entries = ", ".join(f"{_value(name)} = {_value(entry)}" for name, entry in value.items())
        return f"{{ {entries} }}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def suite_card(manifest: SuiteManifest) -> str:
    """Return the card of a suite as Markdown. No prompt is in it."""
    from jinja2 import Environment, StrictUndefined

    text = (Path(__file__).parent / TEMPLATE).read_text(encoding="utf-8")
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, autoescape=False)  # noqa: S701 -- Markdown, with names escaped below
    template = environment.from_string(text)
    concept, stack = manifest.concept, manifest.stack
    rows = [
        (
            markdown_text(part.name),
            MEANING[part.role],
            part.prompts,
            format_rate(part.base) if part.base else "not judged",
        )
        for part in manifest.lists
    ]
    return template.render(
        concept=markdown_text(concept.name),
        judge=markdown_code(concept.judge),
        labels=", ".join(map(markdown_code, concept.labels)),
        threshold=concept.threshold,
        model=markdown_code(stack.model),
        weights=stack.weights,
        stack=markdown_text(stack.name),
        patches=[markdown_code(f"{patch.file} {patch.hash[:12]}") for patch in stack.patches],
        rows=rows,
        attacks=[
            (
                markdown_text(attack.name),
                markdown_text(attack.paper),
                attack.prompts,
                attack.cost,
                "" if attack.stable is None else f"{attack.stable} of {attack.prompts}",
                attack.stopped,
            )
            for attack in manifest.attacks
        ],
        protocol=manifest.protocol,
        version=manifest.safegen,
    )
