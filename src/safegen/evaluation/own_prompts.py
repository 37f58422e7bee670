"""Protocols on a user's own prompts, without a protocol file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from safegen.core.concept import Concept
from safegen.core.errors import ConfigError, FileError, UnknownNameError, explain
from safegen.core.files import exists
from safegen.core.generation import GenerationConfig
from safegen.core.hub import HUB
from safegen.core.settings import MAX_NAME
from safegen.data.prompts.prompts import FOUND, read_prompts
from safegen.evaluation.protocol import CONCEPT_METRICS, Protocol
from safegen.evaluation.samples import ROLES, Role, hash_prompts, is_bundled, read_prompt_list
from safegen.evaluation.schema import JudgeRule, PromptList
from safegen.evaluation.scoring.verdict_metrics import CONCEPT_ROLES
from safegen.judges import choose_judge

ROLE_COLUMN = "role"
"""Column of a prompt file that gives each row's role."""
RowSeeds = Literal["rows"]


def prompt_protocol(
    concept: Concept,
    lists: Sequence[PromptList],
    *,
    judge: JudgeRule | None = None,
    seeds: Sequence[int] | RowSeeds = (1,),
    generation: GenerationConfig,
) -> Protocol:
    """Return the protocol that measures a concept on prompt lists.

    Args:
        concept: gives the judge, its labels and its threshold, and the negative prompt's words.
        lists: lists from `read_lists` or `concept_lists`.
        judge: judge to use instead of the concept's.
        seeds: seeds for each prompt, or `rows` for the seeds of the rows.
        generation: how images are generated.

    Raises:
        ConfigError: there are no lists or no seeds, or a seed is given twice.
    """
    rule = judge or concept_judge(concept)
    try:
        return Protocol(
            name=concept.name,
            concept=concept.name,
            words=concept.words,
            lists=tuple(lists),
            seeds=seeds if isinstance(seeds, str) else tuple(seeds),
            generation=generation,
            judge=rule,
            metrics=CONCEPT_METRICS,
        )
    except ValidationError as error:
        raise ConfigError(f"protocol: {explain(error, Protocol)}") from error


def concept_judge(
    concept: Concept,
    name: str | None = None,
    *,
    labels: Sequence[str] = (),
    threshold: float | None = None,
    options: Mapping[str, object] | None = None,
) -> JudgeRule:
    """Return the rule of a concept's judge, or of another one.

    Args:
        concept: gives what is not given; another judge has a threshold of its own.
        name: another judge.
        labels: labels that mean the concept.
        threshold: lowest score of a detection that counts.
        options: further options of the judge.

    Raises:
        ConfigError: a judge with labels of its own is given without labels, or the threshold is
            below the stored scores.
    """
    choice = choose_judge(concept, name, labels=labels, threshold=threshold, options=options)
    try:
        return JudgeRule.model_validate(choice._asdict())
    except ValidationError as error:
        raise ConfigError(f"judge.{explain(error, JudgeRule)}") from error


def concept_lists(concept: Concept, *, limit: int | None = None) -> list[PromptList]:
    """Return the prompt lists of a concept, from its role `explicit` to `benign`.

    Args:
        concept: the concept.
        limit: first prompts of each list to keep; all if None.

    Raises:
        ConfigError: the concept has no lists.
    """
    lists = [
        _make_list(role, source, name=source, limit=limit, shows=concept.shows.get(source))
        for role in ROLES
        for source in concept.lists.get(role, ())
    ]
    if not lists:
        raise ConfigError(
            f"concept {concept.name!r} must have prompt lists, got none. "
            "Give prompts with --prompts FILE"
        )
    return lists


def read_lists(
    prompts: Sequence[str],
    concept: Concept,
    *,
    limit: int | None = None,
    row_seeds: bool = False,
    column: str | None = None,
    unsafe: bool = False,
) -> list[PromptList]:
    """Return the prompt lists of some files.

    The role of a list is the part before `=`; else that of the column `role`, which splits a file
    into one list per role; else `attack` for prompts that `safegen attack` found, that of the
    concept's own list, or `explicit`.

    Args:
        prompts: `FILE`, `ROLE=FILE`, `mini:LIST` or `hub:owner/name/path.csv` each.
        concept: gives the roles of its own lists and what they show.
        limit: first prompts of each list to keep; all if None.
        row_seeds: whether rows have seeds of their own.
        column: column that holds the prompts.
        unsafe: keep the texts of prompts that ask for the concept out of the run and its report.

    Raises:
        UnknownNameError: no such role or bundled list.
        FileError: a file is missing, cannot be read, or has a row without a known role.
    """
    lists: list[PromptList] = []
    names: set[str] = set()
    for text in prompts:
        role, source = _split_role(text)
        for part, select in _roles(source, role, concept, column).items():
            is_unsafe = unsafe and part in CONCEPT_ROLES and not is_bundled(source)
            lists.append(
                _make_list(
                    part,
                    source,
                    name=_unused_name(source, part if select else "", names),
                    limit=limit,
                    shows=concept.shows.get(source),
                    select=select,
                    row_seeds=row_seeds,
                    column="" if is_bundled(source) else column or "",
                    unsafe=is_unsafe,
                )
            )
    return lists


def limit_lists(protocol: Protocol, limit: int) -> Protocol:
    """Return a protocol with the first prompts of each of its lists; it has an ID of its own.

    Raises:
        ConfigError: a list has no file yet.
    """
    lists = []
    for part in protocol.lists:
        first = part.model_copy(update={"prompts": min(limit, part.prompts or limit)})
        rows = first.read(protocol_seed=protocol.protocol_seed).rows
        lists.append(first.model_copy(update={"prompts": len(rows), "sha256": hash_prompts(rows)}))
    return protocol.model_copy(update={"lists": tuple(lists)})


def _split_role(text: str) -> tuple[Role | None, str]:
    """Return the role and the source of `ROLE=FILE`, or no role and the source."""
    head, equals, source = text.partition("=")
    for role in ROLES:
        if equals and head == role:
            if not source:
                raise ConfigError(f"--prompts must be FILE or ROLE=FILE, got {text!r}")
            return role, source
    if equals and not exists(Path(text)) and not text.startswith(HUB):
        raise UnknownNameError(
            "role", head, ROLES, "NAME=FILE is for a list of a --protocol that needs a file."
        )
    return None, text


def _roles(
    source: str, role: Role | None, concept: Concept, column: str | None
) -> dict[Role, dict[str, str]]:
    """Return the roles of a source, and the column and value that select the rows of each."""
    if role is not None:
        return {role: {}}
    if is_bundled(source):
        own = [r for r in ROLES if source in concept.lists.get(r, ())]
        return {own[0] if own else "explicit": {}}
    found = read_prompts(source, column=column)
    if found.dialect == FOUND:
        return {"attack": {}}
    values = [row.extra.get(ROLE_COLUMN) for row in found.rows]
    if not any(values):
        return {"explicit": {}}
    for row, value in zip(found.rows, values, strict=True):
        if value not in ROLES:
            raise FileError(
                f"{source}: the role of row {row.line} must be {', '.join(ROLES)}, got "
                f"{(value or '')[:40]!r}. Correct it, or rename the column"
            )
    return {r: {ROLE_COLUMN: r} for r in ROLES if r in values}


def _unused_name(source: str, role: str, names: set[str]) -> str:
    """Return the name of a list from its file and role, unlike the names so far."""
    stem = source if is_bundled(source) else Path(source).stem
    first = f"{stem} {role}".strip()[: MAX_NAME - 6]
    name, number = first, 1
    while name in names:
        number += 1
        name = f"{first}-{number}"
    names.add(name)
    return name


def _make_list(
    role: Role,
    source: str,
    *,
    name: str,
    limit: int | None,
    shows: str | None,
    select: Mapping[str, str] | None = None,
    row_seeds: bool = False,
    column: str = "",
    unsafe: bool = False,
) -> PromptList:
    """Return a list with the hash and the number of its prompts."""
    settings = {"select": dict(select or {}), "column": column, "unsafe": unsafe}
    found = read_prompt_list(source, protocol_seed=0 if row_seeds else None, **settings)  # type: ignore[arg-type]
    rows = found.rows[:limit]
    try:
        return PromptList(
            role=role,
            name=name,
            source=source,
            prompts=len(rows),
            sha256=hash_prompts(rows),
            shows=shows,
            left_out=tuple(map(str, found.problems)),
            notes=found.notes,
            **settings,  # type: ignore[arg-type]
        )
    except ValidationError as error:
        raise ConfigError(f"{source}: {explain(error, PromptList)}") from error
