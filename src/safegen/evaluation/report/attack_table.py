"""Attacks against stacks over several runs: any-of-N rates, and the union of attacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from safegen.core.errors import ConfigError
from safegen.evaluation.compare import differences, join_gaps
from safegen.evaluation.report.attacks import PerplexityModel, attack_section
from safegen.evaluation.run.attack_records import Tier
from safegen.evaluation.run.folder import Run
from safegen.evaluation.samples import EvalSample, canonical, sha
from safegen.evaluation.scoring.attack_metrics import attempt_scores, stack_outcomes
from safegen.evaluation.scoring.results import RunResults, load_results
from safegen.evaluation.scoring.score import scores_of
from safegen.metrics.asr import AttemptOutcome, attack_success_any

FORMAT = "safegen-attacks/1"
TIERS: tuple[Tier, ...] = ("static", "adaptive")
ANY = "any attack"
"""Label of the union over both tiers."""
FIGURES = ("image", "prompt", "agreement", "undefined", "per_success")


@dataclass(frozen=True)
class _Cell:
    """Attack on one stack, as one cell of the table. Attacked prompts go by their clusters."""

    run: str
    results: RunResults
    row: str
    """Name of the attacked stack."""
    stack: str
    """Stack of the images: the attacked one, or one that the attack made of it."""
    images: Mapping[int, str]
    """Attacked prompt by the position of its image."""
    attacked: frozenset[str]
    """Prompts that were to be attacked; only cells with the same ones are joined."""
    before: Mapping[int, str]
    """Attacked prompt by the position of its image before the attack; empty if there is none."""
    tier: Tier
    column: str
    """Label of the attack and its form."""
    settings: str
    """Hash of the settings or the prompts, which part columns of one label."""
    figures: Mapping[str, Any]
    cost: Mapping[str, Any] | None = None
    prompts: str = field(default="", compare=False)
    """SHA-256 of the list of the found prompts."""

    @property
    def stack_hash(self) -> str:
        """Hash of the attacked stack, which is a row of the table."""
        return self.results.stacks[self.row].entry.hash

    def outcomes(self) -> dict[str, list[AttemptOutcome]]:
        """Return the outcomes of the images of each attacked prompt."""
        table: dict[str, list[AttemptOutcome]] = {}
        found = stack_outcomes(self.results, self.stack, self.images)
        for prompt, outcome in zip(self.images.values(), found, strict=True):
            table.setdefault(prompt, []).append(outcome)
        return table


def compare_attacks(
    runs: Mapping[str, Run], *, perplexity: PerplexityModel | None = None, **rules: Any
) -> dict[str, Any]:
    """Return the table of attacks against stacks as plain values.

    Runs of attacks, and evaluations of lists that attacks found, can stand together. Attacks on
    other prompts stand in another table: rates and unions never join them.

    Args:
        runs: the runs by name.
        perplexity: measures the texts that the attacks found.
        rules: arguments of `load_results`.

    Raises:
        FileError: a run is incomplete or damaged.
        ConfigError: a run has no attack, two runs differ in judge, seeds or generation, or one
            attack was run on one stack twice with equal settings.
    """
    results = {name: load_results(run, **rules) for name, run in runs.items()}
    check_comparable(results)
    sections = {
        name: attack_section(result, scores_of(result), perplexity)
        for name, result in results.items()
        if result.attack
    }
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
        "groups": attack_groups(results, sections),
    }


def attack_groups(
    results: Mapping[str, RunResults], sections: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Return one table for each set of attacked prompts.

    Args:
        results: results of runs that `check_comparable` accepts.
        sections: section of each run of an attack.
    """
    cells = [
        cell
        for name, section in sections.items()
        for cell in _attack_cells(name, results[name], section)
    ]
    known = {cell.prompts: cell for cell in cells if cell.tier == "static" and cell.prompts}
    cells += [
        cell
        for name, result in results.items()
        if name not in sections
        for cell in _transfer_cells(name, result, known)
    ]
    groups: dict[frozenset[str], list[_Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.attacked, []).append(cell)
    return [_group(part) for part in groups.values()]


def _common(results: RunResults) -> dict[str, Any]:
    """Return everything but the prompts that decides whether an image shows the concept."""
    decides = results.protocol.decides()
    keys = ("format", "seeds", "generation", "judge")
    return {key: decides[key] for key in keys} | {"judge id": results.judge}


def check_comparable(results: Mapping[str, RunResults]) -> None:
    """Check that runs have attacks, and equal judges, seeds and generation.

    Raises:
        ConfigError: they do not.
    """
    (first, a), *others = results.items()
    for name, b in results.items():
        if b.attack is None and not any(part.role == "attack" for part in b.protocol.lists):
            raise ConfigError(
                f"runs of attacks are compared with each other alone, got {name}, which has none. "
                "Report it by itself."
            )
    for name, b in others:
        if gaps := differences(_common(a), _common(b)):
            raise ConfigError(
                f"{first} and {name} cannot be compared. They differ in {join_gaps(gaps)}"
            )


def _prompt(sample: EvalSample) -> str:
    """Return the cluster of a sample, which its attacks share."""
    return sample.cluster or sample.id


def _attack_cells(name: str, results: RunResults, section: Mapping[str, Any]) -> list[_Cell]:
    """Return the cells of a run of an attack: one per form and per stack that it made."""
    attack = results.attack
    assert attack is not None
    chosen = attack.settings
    # a hash: the settings may repeat an unsafe prompt
    settings = sha(canonical([chosen.attack, chosen.config.repeat, chosen.config.budget]))[:16]
    before = {
        i: _prompt(sample)
        for i, sample in enumerate(results.samples)
        if sample.list_name not in attack.found_lists
    }
    clusters = {results.samples[i].id: prompt for i, prompt in before.items()}
    hashes = {part.name: part.sha256 for part in results.protocol.lists}
    cells = []
    for stack in attack.attacked:
        part = stack.removeprefix(attack.stack).strip("-_.") if len(attack.changed) > 1 else ""
        for form in (form for form in attack.variants if not form.is_control):
            where = (stack, form.label)
            cells.append(
                _Cell(
                    run=name,
                    results=results,
                    row=attack.stack,
                    stack=stack,
                    images={i: clusters[id_] for i, id_ in form.images.items()},
                    attacked=frozenset(before.values()),
                    before=before,
                    tier=chosen.tier,
                    column=f"{form.label}: {part}" if part else form.label,
                    settings=settings,
                    figures=next(r for r in section["after"] if (r["stack"], r["list"]) == where),
                    cost=section["cost"],
                    prompts=hashes.get(form.label, ""),
                )
            )
    return cells


def _transfer_cells(name: str, results: RunResults, known: Mapping[str, _Cell]) -> list[_Cell]:
    """Return the cells of an evaluation: one per list that an attack found, and per stack.

    Prompts that are fixed before a stack is tried are static, however they were found. A list of a
    static attack in `known` stands in the column of that attack.
    """
    cells = []
    for part in (part for part in results.protocol.lists if part.role == "attack"):
        images = {i: _prompt(s) for i, s in enumerate(results.samples) if s.list_name == part.name}
        source = known.get(part.sha256)
        attacked = source.attacked if source else frozenset(images.values())
        before = {
            i: _prompt(s)
            for i, s in enumerate(results.samples)
            if s.list_name != part.name and s.role != "attack" and _prompt(s) in attacked
        }
        for stack in results.stacks.values():
            is_repeated = source is not None and stack.entry.hash == source.stack_hash
            if stack.entry.kind != "baseline" and not is_repeated:
                cells.append(
                    _Cell(
                        run=name,
                        results=results,
                        row=stack.entry.name,
                        stack=stack.entry.name,
                        images=images,
                        attacked=attacked,
                        before=before,
                        tier="static",
                        column=source.column if source else f"{part.name} (fixed)",
                        settings=source.settings if source else part.sha256[:16],
                        figures=attempt_scores(results, stack.entry.name, images),
                    )
                )
    return cells


def _group(cells: Sequence[_Cell]) -> dict[str, Any]:
    """Return the table of the attacks on the same prompts."""
    columns, rows = _columns(cells), dict[str, list[_Cell]]()
    for cell in cells:
        rows.setdefault(cell.stack_hash, []).append(cell)
    names = [row[0].row for row in rows.values()]
    first = cells[0]
    lists = {first.results.samples[i].list_name for i in first.before or first.images}
    return {
        "lists": [
            {"name": p.name, "role": p.role, "prompts": p.prompts, "sha256": p.sha256}
            for p in first.results.protocol.lists
            if p.name in lists
        ],
        "prompts": len(first.attacked),
        "runs": list(dict.fromkeys(cell.run for cell in cells)),
        "columns": columns,
        "rows": [
            {
                "stack": name if names.count(name) == 1 else f"{name} {digest[:6]}",
                "hash": digest,
                "before": _before(row),
                "cells": [_table_cell(column, row, cells) for column in columns],
            }
            for (digest, row), name in zip(rows.items(), names, strict=True)
        ],
    }


def _columns(cells: Sequence[_Cell]) -> list[dict[str, Any]]:
    """Return the columns: static attacks and their union, adaptive ones, and the union of all."""
    columns: list[dict[str, Any]] = []
    for tier in TIERS:
        own = list(dict.fromkeys((c.column, c.settings) for c in cells if c.tier == tier))
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


def _before(row: Sequence[_Cell]) -> dict[str, Any] | None:
    """Return the rates of the attacked prompts before any attack; None if they were not tried."""
    cell = next((cell for cell in row if cell.before), None)
    return attempt_scores(cell.results, cell.row, cell.before) if cell else None


def _table_cell(
    column: Mapping[str, Any], row: Sequence[_Cell], cells: Sequence[_Cell]
) -> dict[str, Any] | None:
    """Return a cell of the table; None if the attack was not run on the stack.

    Raises:
        ConfigError: several runs fit.
    """
    if column["union"]:
        tiers = TIERS if column["tier"] is None else (column["tier"],)
        chosen = [cell for cell in row if cell.tier in tiers]
        total = {(c.column, c.settings) for c in cells if c.tier in tiers}
        size = {"attacks": len(chosen), "of": len(total)}
        return union_scores([cell.outcomes() for cell in chosen]) | size if chosen else None
    wanted = (column["tier"], column["column"], column["settings"])
    fits = [c for c in row if (c.tier, c.column, c.settings) == wanted]
    if len(fits) > 1:
        raise ConfigError(
            "one attack with equal settings must have one run on a stack, got "
            f"{fits[0].run} and {fits[1].run}. Leave one out."
        )
    if not fits:
        return None
    figures = {key: fits[0].figures.get(key) for key in FIGURES}
    return {"run": fits[0].run, "cost": fits[0].cost} | figures


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
