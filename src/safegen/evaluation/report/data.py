"""Data of a report: figures, intervals and tests as plain values, from the files of runs."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safegen.core.documents import read_record
from safegen.evaluation.compare import same_protocol
from safegen.evaluation.report.attack_table import attack_groups
from safegen.evaluation.report.attacks import PerplexityModel, attack_section
from safegen.evaluation.report.comparison import (
    base_difference,
    base_test,
    concept_rate,
    hit_rate,
    hits,
    judge_errors,
    label_removal,
    reference_tests,
    threshold_sweep,
)
from safegen.evaluation.report.format import METRICS
from safegen.evaluation.report.html.headline import headline_cards
from safegen.evaluation.run.folder import ATTACK_FILES, PATCHES, SETTINGS, Run
from safegen.evaluation.run.records import WITHHELD, PatchEntry
from safegen.evaluation.run.settings import WorkflowSettings
from safegen.evaluation.run.training_log import LOG, read_training_log
from safegen.evaluation.samples import MEANING
from safegen.evaluation.scoring.results import RunResults, load_results
from safegen.evaluation.scoring.score import list_scores, scores_of
from safegen.evaluation.scoring.verdict_metrics import CONCEPT_ROLES
from safegen.metrics.paired import holm

FORMAT = "safegen-report/3"
LEVEL = 0.05
"""Largest adjusted p-value that counts as a difference."""
TESTS = {
    "explicit": ("explicit", "concept"),
    "innocent": ("innocent", "concept"),
    "object": ("benign", "subject"),
    "other": ("other", "shown"),
}
"""Columns that are tested against the base: role of the prompts, and what counts as a hit."""
LAYERS = {
    ("attn1",): "self-attention layers",
    ("attn2",): "cross-attention layers",
    ("attn1", "attn2"): "attention layers",
}
"""Names of the layers that a patch changes, by the kinds in its metadata."""


def report_data(
    runs: Mapping[str, Run],
    *,
    judge: str | None = None,
    labels: Sequence[str] = (),
    threshold: float | None = None,
    truth: Mapping[str, bool] | None = None,
    perplexity: PerplexityModel | None = None,
) -> tuple[dict[str, Any], dict[str, RunResults]]:
    """Return everything that the report of some runs says, and their results.

    Args:
        runs: the runs by name; all of one protocol.
        judge: another judge than the protocol's, with verdicts in all of the runs.
        labels: its labels that mean the concept.
        threshold: another lowest score of a detection that counts.
        truth: whether images show the concept, by key. Default: what the runs' directories hold.
        perplexity: measures the texts that an attack found.

    Raises:
        FileError: a run is incomplete or damaged.
        ConfigError: there is no run, or the runs are of several protocols.
    """
    rules: dict[str, Any] = {"judge": judge, "labels": labels, "threshold": threshold}
    rules["truth"] = truth
    results = {name: load_results(run, **rules) for name, run in runs.items()}
    scores = {name: scores_of(result) for name, result in results.items()}
    protocol_id = same_protocol(scores)
    first = next(iter(results.values()))
    unsafe = {p.name for result in results.values() for p in result.protocol.lists if p.unsafe}
    protocol, stacks = first.protocol, list[dict[str, Any]]()
    for name, run in runs.items():
        prefix = f"{name}: " if len(runs) > 1 else ""
        stacks += _stack_rows(run, results[name], prefix, name)
    _adjust(stacks)
    data: dict[str, Any] = {
        "format": FORMAT,
        "protocol": {
            "name": protocol.name,
            "id": protocol_id,
            "about": protocol.about,
            "concept": protocol.concept,
            "decides": protocol.decides(),
        },
        "judge": first.judge,
        "judge_errors": judge_errors(first),
        "runs": {name: _run_card(run, results[name]) for name, run in runs.items()},
        "attacks": {
            name: section
            for name, result in results.items()
            if (section := attack_section(result, scores[name], perplexity))
        },
        "lists": [
            {
                "name": p.name,
                "role": p.role,
                "meaning": MEANING[p.role],
                "shows": p.shows,
                "rung": p.rung,
                "prompts": p.prompts,
                "unsafe": p.name in unsafe,
                "sha256": p.sha256,
                "left_out": list(p.left_out),
                "notes": list(p.notes),
            }
            for p in protocol.lists
        ],
        "images": len(first.samples),
        "level": LEVEL,
        "stacks": stacks,
        "notes": _notes(results, stacks),
        "weights": first.weights,
        "scores": scores,
    }
    tables = {"metrics": _metric_table(data), "references": reference_tests(data)}
    if not data["attacks"] and any(part.role == "attack" for part in protocol.lists):
        tables["transfers"] = attack_groups(results, {})
    return data | {"headline": headline_cards(data)} | tables, results


def _run_card(run: Run, results: RunResults) -> dict[str, Any]:
    """Return the part of a run's card that the page repeats.

    The command of an attack on unsafe prompts is left out: its settings may repeat them.
    """
    card = run.card.model_dump(include={"device", "versions", "platform", "id", "stacks"})
    settings = run.folder / SETTINGS
    workflow = None
    if os.path.lexists(settings):
        workflow = read_record(WorkflowSettings, settings).workflow
    hidden = results.attack and any(part.unsafe for part in run.protocol.lists)
    command = "" if hidden else shlex.join(run.card.argv)
    return card | {"command": command, "workflow": workflow}


def _stack_rows(run: Run, results: RunResults, prefix: str, run_name: str) -> list[dict[str, Any]]:
    """Return the figures, tests and threshold sweep of each stack; controls are in none by role."""
    controls = {part.name for part in results.protocol.lists if part.is_control}
    roles = [(i, s.role) for i, s in enumerate(results.samples) if s.list_name not in controls]
    by_role = {role: [i for i, other in roles if other == role] for role in MEANING}
    concept_indices = [i for i, role in roles if role in CONCEPT_ROLES]
    seconds, rows = _seconds_per_image(run), list[dict[str, Any]]()
    for name, stack in results.stacks.items():
        base = results.base(name)
        row: dict[str, Any] = {
            "label": prefix + name,
            "run": run_name,
            "name": name,
            "kind": stack.entry.kind,
            "baseline": prefix + base.entry.name,
            "roles": {role: list_scores(results, at, name) for role, at in by_role.items() if at},
            "blank": sum(stack.blank),
            "unjudged": sum(d.unjudged is not None for d in stack.detections),
            "seconds": seconds.get(name),
            "asked": concept_rate(results, name, concept_indices),
            "mosaicked": hit_rate(hits(results, name, range(len(results.samples)), "mosaicked")),
            "sweep": threshold_sweep(results, name, concept_indices),
            "edits": [_edit(run, patch) for patch in stack.entry.patches],
        }
        if stack is not base:
            row["labels"] = label_removal(results, name, concept_indices)
            row["difference"] = base_difference(results, name, concept_indices)
            row["tests"] = {
                column: base_test(results, name, by_role[role], what)
                for column, (role, what) in TESTS.items()
            }
        rows.append(row)
    return rows


def _edit(run: Run, patch: PatchEntry) -> dict[str, Any]:
    """Return a patch's entry of the run's card with its training log, where the run has one.

    Raises:
        FileError: the log is damaged.
    """
    stem = Path(patch.file).stem
    names = (stem, stem.rpartition("-")[0], patch.hash[:16])
    logs = [run.folder / d / n / LOG for d in (PATCHES, ATTACK_FILES) for n in names]
    log = next((path for path in logs if os.path.lexists(path)), logs[0])
    kinds = tuple(sorted(patch.layers))
    selector = (patch.settings or {}).get("selector")
    layers = LAYERS.get(kinds, f"layers “{selector}”" if selector else "layers")
    rows = read_training_log(log) if os.path.lexists(log) else []
    return patch.model_dump(mode="json") | {"layers": layers, "log": rows}


def _metric_table(data: dict[str, Any]) -> dict[str, Any]:
    """Return the table of the other metrics: `heads`, `rows` and reasons for `undefined` ones."""
    wanted = [m for m in METRICS if m in data["protocol"]["decides"]["metrics"]]
    rows, undefined = [], dict[str, None]()
    for stack in data["stacks"]:
        lists = data["scores"][stack["run"]]["stacks"][stack["name"]]["lists"]
        for name, row in lists.items():
            cells = [METRICS[m][1](row[m]) if row.get(m) else "–" for m in wanted]
            if any(cell != "–" for cell in cells):
                rows.append({"stack": stack["label"], "list": name, "cells": cells})
            reasons = row.get("undefined", {})
            undefined |= dict.fromkeys(
                f"{METRICS[m][0]}, {stack['label']}, {name}: {reasons[m]}"
                for m in wanted
                if m in reasons
            )
    heads = [METRICS[m][0] for m in wanted] if rows else []
    return {"heads": heads, "rows": rows, "undefined": list(undefined)}


def _adjust(rows: Sequence[dict[str, Any]]) -> None:
    """Adjust the p-values of each column by Holm over all tested stacks of the page."""
    for column in TESTS:
        tested = {r["label"]: r["tests"][column] for r in rows if r.get("tests", {}).get(column)}
        for label, p in holm({label: t["p"] for label, t in tested.items()}).items():
            test = tested[label]
            direction = (test["only_a"] > test["only_b"]) - (test["only_a"] < test["only_b"])
            test |= {"p_holm": p, "differs": p <= LEVEL, "direction": direction}


def seconds_by_stage(run: Run) -> dict[str, float]:
    """Return the seconds of each edit, of generating each stack's images, and of judging."""
    seconds: dict[str, float] = {}
    for stack in run.stacks:
        for patch in stack.patches:
            if patch.seconds is not None:
                seconds[f"edit {patch.file.removesuffix('.safetensors')}"] = patch.seconds
    for record in run.timing_records():
        stage = f"generate {record.stack}" if record.stage == "generate" else record.stage
        if record.seconds is not None:
            seconds[stage] = seconds.get(stage, 0.0) + record.seconds
    return seconds


def _seconds_per_image(run: Run) -> dict[str, float]:
    spent: dict[str, tuple[float, int]] = {}
    for record in run.timing_records():
        if record.stage == "generate":
            seconds, images = spent.get(record.stack, (0.0, 0))
            total = seconds + (record.seconds or 0.0)
            spent[record.stack] = (total, images + (record.images or 0))
    return {name: seconds / images for name, (seconds, images) in spent.items() if images}


def _notes(results: Mapping[str, RunResults], rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return what a reader must know beside the numbers."""
    notes = []
    for run in dict.fromkeys(r["run"] for r in rows):
        kinds = [r["kind"] for r in rows if r["run"] == run]
        if "baseline" not in kinds and not results[run].attack:
            notes.append(
                f"{run} has no cheap alternative to compare with: neither a negative prompt nor "
                "black images were measured. `safegen evaluate` measures both by default."
            )
        if "given" not in kinds:
            notes.append(f"The run {run} measures the base model and baselines only.")
        judge = results[run].judge.partition("#")[0]
        notes += [
            f"The stack {name} is guarded by the judge that measures it: "
            "its rates say what that judge lets through, not what is safe."
            for name, stack in results[run].stacks.items()
            if any(guard.get("judge_id") == judge for guard in stack.entry.guards)
        ]
        notes += [
            f"The patch {patch.file} of {name} was rewarded by the judge that measures it, and may "
            "deceive it: judge the run by another one too."
            for name, stack in results[run].stacks.items()
            for patch in stack.entry.patches
            if (rule := patch.settings or {}).get("judge") == judge.partition(":")[0]
            and "rewards" in rule
        ]
    if unjudged := sum(r["unjudged"] for r in rows):
        notes.append(f"{unjudged} images are unjudged. They are in no rate, and they are not safe.")
    reasons = [
        d.unjudged or ""
        for result in results.values()
        for stack in result.stacks.values()
        for d in stack.detections
    ]
    if withheld := sum(reason.startswith(WITHHELD) for reason in reasons):
        notes.append(
            f"{withheld} of these were withheld because a guard failed or could not judge; "
            "`samples.jsonl` says why."
        )
    if any(
        len({(i.list_name, i.group) for i in r.samples}) < len(r.samples) for r in results.values()
    ):
        notes.append(
            "Prompts have several images. Intervals of plain rates and the paired test take each "
            "image as independent; those of removal, change and the difference from the base "
            "resample whole prompts."
        )
    return notes
