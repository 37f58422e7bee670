"""Attacks against stacks over several runs: any-of-N rates, and the union of attacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from safegen.core.errors import ConfigError
from safegen.evaluation.compare import differences, join_gaps
from safegen.evaluation.report.attacks import PerplexityModel, attack_section
from safegen.evaluation.run.attack_records import AttackRun, Tier, VariantImages
from safegen.evaluation.run.folder import Run
from safegen.evaluation.samples import canonical, sha
from safegen.evaluation.scoring.attack_metrics import attempt_scores, stack_outcomes
from safegen.evaluation.scoring.results import RunResults, load_results
from safegen.evaluation.scoring.score import scores_of
from safegen.metrics.asr import AttemptOutcome, attack_success_any

FORMAT = "safegen-attacks/1"
TIERS: tuple[Tier, ...] = ("static", "adaptive")
ANY = "any attack"
"""Label of the union over both tiers."""


@dataclass(frozen=True)
class _Cell:
    """Attack of one run on one stack, as one cell of the table."""

    run: str
    results: RunResults
    attack: AttackRun
    stack: str
    """Stack of the images: the attacked one, or one that the attack made of it."""
    form: VariantImages
    column: str
    """Label of the attack and its form."""
    settings: str
    """Hash of the settings of the attack, which part columns of one label."""

    @property
    def stack_hash(self) -> str:
        """Hash of the attacked stack, which is a row of the table."""
        return self.results.stacks[self.attack.stack].entry.hash

    def outcomes(self) -> dict[str, list[AttemptOutcome]]:
        """Return the outcomes of the images of each attacked prompt."""
        table: dict[str, list[AttemptOutcome]] = {}
        images = self.form.images
        found = stack_outcomes(self.results, self.stack, images)
        for prompt, outcome in zip(images.values(), found, strict=True):
            table.setdefault(prompt, []).append(outcome)
        return table


def compare_attacks(
    runs: Mapping[str, Run], *, perplexity: PerplexityModel | None = None, **rules: Any
) -> dict[str, Any]:
    """Return the table of attacks against stacks as plain values.

    Runs on other prompts stand in another table: rates and unions never join them.

    Args:
        runs: runs of attacks by name.
        perplexity: measures the texts that the attacks found.
        rules: arguments of `load_results`.

    Raises:
        FileError: a run is incomplete or damaged.
        ConfigError: a run made no attack, two runs differ in judge, seeds or generation, or one
            attack was run on one stack twice with equal settings.
    """
    results = {name: load_results(run, **rules) for name, run in runs.items()}
    _check_comparable(results)
    sections, groups = {}, dict[str, list[str]]()
    for name, result in results.items():
        sections[name] = attack_section(result, scores_of(result), perplexity)
        groups.setdefault(canonical(_lists(result)), []).append(name)
    first = next(iter(results.values()))
    return {
        "format": FORMAT,
        "protocol": {
            "name": first.protocol.name,
            "concept": first.protocol.concept,
            "decides": _common(first),
        },
        "judge": first.judge,
        "runs": sections,
        "groups": [
            _group({name: results[name] for name in names}, sections) for names in groups.values()
        ],
    }


def _lists(results: RunResults) -> list[dict[str, Any]]:
    """Return what decides the attacked lists of a run."""
    written = results.attack.found_lists if results.attack else frozenset()
    lists: list[dict[str, Any]] = results.protocol.decides()["lists"]
    return [part for part in lists if part["name"] not in written]


def _common(results: RunResults) -> dict[str, Any]:
    """Return everything but the prompts that decides whether an image shows the concept."""
    decides = results.protocol.decides()
    keys = ("format", "seeds", "generation", "judge")
    return {key: decides[key] for key in keys} | {"judge id": results.judge}


def _check_comparable(results: Mapping[str, RunResults]) -> None:
    (first, a), *others = results.items()
    for name, result in results.items():
        if result.attack is None:
            raise ConfigError(
                f"runs of attacks are compared with each other alone, got {name}, which made none. "
                "Report it apart."
            )
    for name, b in others:
        if gaps := differences(_common(a), _common(b)):
            raise ConfigError(
                f"{first} and {name} cannot be compared. They differ in {join_gaps(gaps)}"
            )


def _group(results: Mapping[str, RunResults], sections: Mapping[str, Any]) -> dict[str, Any]:
    """Return the table of the attacks on the same prompts."""
    cells = [cell for name, result in results.items() for cell in _cells(name, result)]
    columns = _columns(cells)
    rows: dict[str, list[_Cell]] = {}
    for cell in cells:
        rows.setdefault(cell.stack_hash, []).append(cell)
    names = [row[0].attack.stack for row in rows.values()]
    first = next(iter(results.values()))
    attack = first.attack
    assert attack is not None
    return {
        "lists": [
            {"name": p.name, "role": p.role, "prompts": p.prompts, "sha256": p.sha256}
            for p in first.protocol.lists
            if p.name not in attack.found_lists
        ],
        "runs": list(results),
        "columns": columns,
        "rows": [
            {
                "stack": name if names.count(name) == 1 else f"{name} {digest[:6]}",
                "hash": digest,
                "before": _before(row[0]),
                "cells": [_cell(column, row, cells, sections) for column in columns],
            }
            for (digest, row), name in zip(rows.items(), names, strict=True)
        ],
    }


def _cells(name: str, results: RunResults) -> list[_Cell]:
    """Return the cells of a run: one per form of the attack and per stack that it made."""
    attack = results.attack
    assert attack is not None
    chosen = attack.settings
    # a hash: the settings may repeat an unsafe prompt
    settings = sha(canonical([chosen.attack, chosen.config.repeat, chosen.config.budget]))[:16]
    cells = []
    for stack in attack.attacked:
        part = stack.removeprefix(attack.stack).strip("-_.") if len(attack.changed) > 1 else ""
        for form in attack.variants:
            if not form.is_control:
                column = f"{form.label}: {part}" if part else form.label
                cells.append(_Cell(name, results, attack, stack, form, column, settings))
    return cells


def _columns(cells: Sequence[_Cell]) -> list[dict[str, Any]]:
    """Return the columns: static attacks and their union, adaptive ones, and the union of all."""
    columns: list[dict[str, Any]] = []
    for tier in TIERS:
        own = dict.fromkeys((c.column, c.settings) for c in cells if c.attack.settings.tier == tier)
        names = [name for name, _ in own]
        for number, (name, settings) in enumerate(own):
            label = name if names.count(name) == 1 else f"{name} {names[:number].count(name) + 1}"
            columns.append(
                {"label": label, "tier": tier, "union": False, "column": name, "settings": settings}
            )
        if len(own) > 1:
            columns.append({"label": f"any {tier}", "tier": tier, "union": True})
    if {column["tier"] for column in columns} == set(TIERS):
        columns.append({"label": ANY, "tier": None, "union": True})
    return columns


def _before(cell: _Cell) -> dict[str, Any]:
    """Return the rates of all attacked prompts before any attack."""
    images = {
        i: sample.id
        for i, sample in enumerate(cell.results.samples)
        if sample.list_name not in cell.attack.found_lists
    }
    return attempt_scores(cell.results, cell.attack.stack, images)


def _cell(
    column: Mapping[str, Any],
    row: Sequence[_Cell],
    cells: Sequence[_Cell],
    sections: Mapping[str, Any],
) -> dict[str, Any] | None:
    """Return a cell of the table; None if the attack was not run on the stack.

    Raises:
        ConfigError: several runs fit.
    """
    if column["union"]:
        tiers = TIERS if column["tier"] is None else (column["tier"],)
        chosen = [cell for cell in row if cell.attack.settings.tier in tiers]
        total = {(c.column, c.settings) for c in cells if c.attack.settings.tier in tiers}
        return (
            union_scores([cell.outcomes() for cell in chosen])
            | {"attacks": len(chosen), "of": len(total)}
            if chosen
            else None
        )
    fits = [c for c in row if (c.column, c.settings) == (column["column"], column["settings"])]
    if len(fits) > 1:
        raise ConfigError(
            "one attack with equal settings must have one run on a stack, got "
            f"{fits[0].run} and {fits[1].run}. Leave one out."
        )
    if not fits:
        return None
    (cell,), section = fits, sections[fits[0].run]
    row_of = (cell.stack, cell.form.label)
    figures = next(r for r in section["after"] if (r["stack"], r["list"]) == row_of)
    return {"run": cell.run, "cost": section["cost"]} | {
        key: figures.get(key)
        for key in ("image", "prompt", "agreement", "undefined", "per_success")
    }


def union_scores(attacks: Sequence[Mapping[str, Sequence[AttemptOutcome]]]) -> dict[str, Any]:
    """Return the share of attacked prompts that at least one attack breaks.

    Only prompts that every attack reached count. A prompt is a cluster.

    Args:
        attacks: outcomes of the images of each attacked prompt, by attack.
    """
    common = [prompt for prompt in attacks[0] if all(prompt in attack for attack in attacks)]
    pairs = [
        (prompt, outcome) for prompt in common for attack in attacks for outcome in attack[prompt]
    ]
    try:
        success = attack_success_any([o for _, o in pairs], [p for p, _ in pairs])
    except ValueError as error:
        return {"prompt": None, "undefined": {"prompt": str(error)}}
    return {"prompt": success.to_json()}
