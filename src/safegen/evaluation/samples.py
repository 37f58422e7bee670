"""Samples of an evaluation: the prompts of its lists, their seeds, and their hashes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, ClassVar, Literal, Self, get_args

from pydantic import ConfigDict, Field, model_validator

from safegen.core.errors import ConfigError, FileError
from safegen.core.generation import GenerationConfig, Sample
from safegen.core.registry import PROMPT_LISTS
from safegen.core.settings import Count, Name
from safegen.data.prompts.prompt import Prompt, seed_for
from safegen.data.prompts.prompts import PromptSet, read_prompts

Role = Literal["explicit", "innocent", "attack", "neighbour", "other", "benign"]
MEANING: dict[str, str] = {
    "explicit": "prompts that name the concept",
    "innocent": "prompts that imply the concept without naming it",
    "attack": "prompts that an attack found",
    "neighbour": "prompts for something harmless that looks like the concept",
    "other": "prompts for another concept, which is not removed",
    "benign": "prompts unrelated to the concept",
}
ROLES: tuple[Role, ...] = get_args(Role)


class EvalSample(Sample):
    """A sample with what its image is judged by."""

    model_config: ClassVar[ConfigDict] = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True
    )

    id: str = ""
    """Name of the prompt: its list and its position in the list."""
    index: Count = 0
    num_images_per_prompt: Literal[1] = 1
    list_name: Name
    """Name of the prompt list."""
    role: Role
    """Role of the prompt list."""
    subject: str | None = None
    """Object that a faithful image shows."""
    background: str | None = None
    """Background that a faithful image shows."""
    shows: str | None = None
    """Label that a faithful image shows besides its subject."""
    cluster: str = ""
    """Samples with one cluster are resampled together; the prompt if empty."""
    prompt_sha256: str = Field(default="", pattern="^([0-9a-f]{64})?$")
    """SHA-256 of the prompt, which identifies it where the text is left out."""

    @model_validator(mode="before")
    @classmethod
    def _hash_prompt(cls, values: Any) -> Any:
        if isinstance(values, dict) and not values.get("prompt_sha256") and "prompt" in values:
            return values | {"prompt_sha256": sha(str(values["prompt"]))}
        return values

    @property
    def group(self) -> str:
        """Group that the sample is resampled with."""
        return self.cluster or self.prompt

    def key(self, stack_hash: str, generation: GenerationConfig) -> str:
        """Return the name of the image: a SHA-256 over everything that decides it.

        An attack that changes nothing asks for an image of the attacked list, under another name.
        """
        return image_keys([self], stack_hash, generation)[0]

    def compact(self, **update: Any) -> Self:
        """Return the sample in less memory, with some values replaced; it must be valid."""
        return self.model_construct(_FIELDS, **(self.__dict__ | update))


_FIELDS = set(EvalSample.model_fields)


def image_keys(
    samples: Iterable[EvalSample], stack_hash: str, generation: GenerationConfig
) -> list[str]:
    """Return the name of each sample's image of a stack; see `EvalSample.key`."""
    shared = f"{canonical(stack_hash)},{_generation_json(generation)}"
    keys = []
    for s in samples:
        more = (["attack"] if s.role == "attack" else []) + request_parts(s)
        rest = f",{canonical(more)[1:-1]}" if more else ""
        keys.append(sha(f'["{s.prompt_sha256}",{s.seed},{s.index},{shared}{rest}]'))
    return keys


@lru_cache(maxsize=16)
def _generation_json(generation: GenerationConfig) -> str:
    return canonical(generation.model_dump(mode="json"))


def read_prompt_list(
    source: str,
    *,
    prompts: int | None = None,
    select: Mapping[str, str] | None = None,
    protocol_seed: int | None = None,
    dialect: str | None = None,
    column: str | None = None,
    unsafe: bool = False,
) -> PromptSet:
    """Return the prompts of a bundled list, of a file, or of a file on the hub.

    Args:
        source: `mini:LIST`, a path, or `hub:owner/name/path/in/repo.csv`.
        prompts: number of prompts to keep after `select`; all if None.
        select: a column and the value that it must hold; of `categories`, one of the labels.
        protocol_seed: keep each prompt's seed, and give one by `seed_for` to prompts without. If
            None, seeds are dropped.
        dialect: a name of `DIALECTS`; detected from the columns if None.
        column: column that holds the prompt, for dialects with a choice.
        unsafe: drop the subjects and backgrounds of a file, which may be as unsafe as its prompts.

    Raises:
        UnknownNameError: no such list or dialect.
        FileError: the file is missing or cannot be read, lacks a column of `select`, or has no row
            with that value.
        ConfigError: the dialect or column has no effect, or a bundled list has fewer prompts.
    """
    source_set = read_prompts(source, dialect=dialect or None, column=column or None)
    rows = list(source_set.rows)
    for name, value in (select or {}).items():
        cells = [_cell(row, name) for row in rows]
        if not any(cells):
            raise FileError(
                f"{source} must have the column {name!r} to select rows by. Use the intended file."
            )
        rows = [row for row, cell in zip(rows, cells, strict=True) if value in cell]
        if not rows:
            raise FileError(
                f"{source} must have a row with {name} {value!r}, got none. Use the intended file."
            )
    bundled = is_bundled(source)
    if bundled and prompts is not None and prompts > len(rows):
        raise ConfigError(f"the prompt list {source} has {len(rows)} prompts, got {prompts}")
    selected = []
    hidden = {"subject": None, "background": None} if unsafe and not bundled else {}
    for row in rows[:prompts]:
        seed = row.seed if protocol_seed is not None else None
        if protocol_seed is not None and seed is None:
            seed = seed_for(row.id, protocol_seed)
        new = {"seed": seed} | hidden
        is_new = any(getattr(row, name) != value for name, value in new.items())
        selected.append(row.model_copy(update=new) if is_new else row)
    return replace(source_set, rows=tuple(selected))


def is_bundled(source: str) -> bool:
    """Return whether a source is a prompt list of the package, which has no file."""
    return ":" in source and source.partition(":")[0] in PROMPT_LISTS


def _cell(row: Prompt, column: str) -> tuple[str, ...]:
    """Return the values of a prompt's column that can be selected."""
    if column == "categories":
        return row.categories
    is_field = column in ("subject", "background")
    value = getattr(row, column) if is_field else row.extra.get(column)
    return () if value is None else (value,)


def hash_prompts(rows: Sequence[Prompt]) -> str:
    """Return a SHA-256 over a list's prompts, in order.

    It covers the text, subject, background, seed, cluster, start and guidance scale of each.
    """
    return hash_lines(
        (
            sha(row.prompt),
            row.subject,
            row.seed,
            row.cluster,
            *request_parts(row),
            *background_parts(row),
        )
        for row in rows
    )


def request_parts(row: Prompt | Sample) -> list[object]:
    """Return what decides an image besides text and seed: nothing for an ordinary prompt."""
    start, scale = row.start, row.guidance_scale
    parts: list[object] = [] if start is None else [start.kind, start.sha256, start.strength]
    parts += [] if scale is None else ["guidance_scale", scale]
    negative = row.negative_prompt if isinstance(row, Sample) else None
    return parts if negative is None else [*parts, "negative_prompt", negative]


def background_parts(row: Prompt | EvalSample) -> list[object]:
    """Return the background that a prompt names, as a part of its hash: nothing without one."""
    return [] if row.background is None else ["background", row.background]


def hash_lines(lines: Iterable[object]) -> str:
    """Return a SHA-256 over plain values, one line of canonical JSON each."""
    digest = hashlib.sha256()
    for line in lines:
        digest.update(f"{canonical(line)}\n".encode())
    return digest.hexdigest()


canonical = json.JSONEncoder(sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode
"""Function that returns JSON with sorted keys and no spaces: equal values give equal text."""


def sha(text: str) -> str:
    """Return the SHA-256 of a text's UTF-8 bytes."""
    return hashlib.sha256(text.encode()).hexdigest()
