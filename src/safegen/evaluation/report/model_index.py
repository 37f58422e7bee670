"""Metrics of a patch or model in the results of a run, for its model card and metadata."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from safegen.core.documents import validate
from safegen.core.errors import ConfigError, FileError
from safegen.core.settings import Name
from safegen.core.text import escape_control
from safegen.evaluation.report.format import format_rate, markdown_text
from safegen.evaluation.run.folder import SCORES, Run
from safegen.evaluation.run.records import StackEntry
from safegen.evaluation.run.scores import ListScores, RemovalScores, read_scores

if TYPE_CHECKING:
    from huggingface_hub import EvalResult


class MetricsTable(BaseModel):
    """Metrics in the metadata of a file: `about`, and for each list its removal and its stacks."""

    model_config = ConfigDict(frozen=True)

    about: str
    lists: dict[Name, dict[Name, Any]] = Field(min_length=1)

    @model_validator(mode="after")
    def _check_lists(self) -> Self:
        first = next(iter(self.lists.values()))
        for name, row in self.lists.items():
            if row.keys() != first.keys() or not {"removal", "this"} <= row.keys():
                raise ValueError(f"{name!r} must have removal, and the stacks of the first list")
            for stack, values in row.items():
                if stack != "removal":
                    ListScores.model_validate(values)
                elif values is not None:
                    RemovalScores.model_validate(values)
        return self


@dataclass(frozen=True)
class ModelIndex:
    """Metrics of a model on the prompt lists of a run."""

    about: str
    """Protocol, judge, stack and model that the metrics are of."""
    stacks: Sequence[str]
    """Columns: `base`, `this`, and stacks that attack it."""
    rows: Sequence[tuple[str, Mapping[str, Any] | None, Sequence[Mapping[str, Any]]]]
    """List with its role, removal, and the scores of each stack."""

    def to_dict(self) -> dict[str, Any]:
        """Return the metrics as plain values, for the metadata of a file."""
        lists = {
            name: {"removal": removal} | dict(zip(self.stacks, scores, strict=True))
            for name, removal, scores in self.rows
        }
        return {"about": self.about, "lists": lists}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelIndex:
        """Return the metrics that `to_dict` gave.

        Raises:
            FileError: the values are something else.
        """
        table = validate(MetricsTable, values, "metrics")
        lists = {name: dict(row) for name, row in table.lists.items()}
        rows = [(name, row.pop("removal"), list(row.values())) for name, row in lists.items()]
        return cls(table.about, list(next(iter(lists.values()))), rows)

    def to_table(self) -> list[list[str]]:
        """Return the cells of the card's table, its heading first."""
        table = [["prompts", *(f"seen, {name}" for name in self.stacks), "removed"]]
        table[0] += [f"generated as asked, {name}" for name in self.stacks]
        for name, removal, scores in self.rows:
            rates = [*(row.get("concept") for row in scores), removal]
            rates += [row.get("shown") or row.get("subject") for row in scores]
            table.append([name, *map(format_rate, rates)])
        return [list(map(markdown_text, row)) for row in table]

    def to_eval_results(self) -> list[EvalResult]:
        """Return the rates of this model for the hub's table of results."""
        from huggingface_hub import EvalResult

        results, this = [], list(self.stacks).index("this")
        for name, removal, scores in self.rows:
            for metric, rate in (
                ("concept rate", scores[this].get("concept")),
                ("removal", removal),
            ):
                if rate and rate.get("value") is not None:
                    results.append(
                        EvalResult(
                            task_type="text-to-image",
                            dataset_type="safegen",
                            dataset_name=escape_control(name),
                            dataset_config=escape_control(name),
                            metric_type=metric.replace(" ", "_"),
                            metric_name=metric,
                            metric_value=rate["value"],
                        )
                    )
        return results


def read_metrics(
    path: Path, patches: Sequence[str], base: str | None = None, *, model: str | None = None
) -> ModelIndex:
    """Return the metrics of the stack of a run that has exactly these patches.

    Stacks that are tested against this one, as those of an attack, are columns too.

    Args:
        path: folder of a run, or its scores file.
        patches: hashes of the patches, in order.
        base: hash of the base weights in fp32; an fp32 run on others is refused.
        model: name of the model in the run; any when not given.

    Raises:
        FileError: there are no scores, or they cannot be read.
        ConfigError: the run has no stack of these patches alone, or only on other weights.
    """
    file = path / SCORES if path.is_dir() else path
    if not os.path.lexists(file):
        raise FileError(f"{path} has no {SCORES}. Name the folder of a run.")
    run, scores = Run.open(file.parent), read_scores(file)
    if not run.card.device.endswith("fp32"):
        base = None  # weights loaded as fp16 or bf16 have another hash
    entry = _find_stack(file, run.stacks, list(patches), base, model)
    attacks = [e.name for e in run.stacks if e.reference == entry.name]
    stacks = {"base": entry.baseline, "this": entry.name} | {name: name for name in attacks}
    if missing := [name for name in stacks.values() if name not in scores["stacks"]]:
        raise FileError(f"{file} has no figures of the stack {missing[0]!r} of its run")
    lists = [scores["stacks"][name]["lists"] for name in stacks.values()]
    protocol = scores["protocol"]
    about = (
        f"Protocol {protocol['name']} (ID {protocol['id']}), judge {scores['judge']}, "
        f"stack {entry.name}, model {entry.model}"
    )
    rows = [
        (f"{part} ({row['role']})", row.get("removal"), [scores[part] for scores in lists])
        for part, row in scores["stacks"][entry.name]["lists"].items()
    ]
    return ModelIndex(about, list(stacks), rows)


def _find_stack(
    file: Path,
    entries: Sequence[StackEntry],
    patches: list[str],
    base: str | None,
    model: str | None,
) -> StackEntry:
    """Return the card's entry of the stack that has exactly these patches and nothing else."""
    plain = [
        e for e in entries if not (e.guards or e.loras or e.blank) and e.negative_prompt is None
    ]
    found = [e for e in plain if [p.hash for p in e.patches] == patches]
    found = [e for e in found if model in (None, e.model)]
    if not found:
        held = "; ".join(
            f"{e.name} ({e.model}): {', '.join(p.hash[:12] for p in e.patches) or 'none'}"
            for e in plain
        )
        names = " then ".join(digest[:12] for digest in patches)
        wanted = (f"patch {names}" if patches else "no patch") + (f" on {model}" if model else "")
        raise ConfigError(f"{file} has no stack of {wanted} alone. It has {held}.")
    for entry in found:
        if base is None or entry.base == base:
            return entry
    raise ConfigError(
        f"{file} has metrics of these patches on other weights ({found[0].base[:12]}) than this "
        f"model's ({base[:12] if base else None}). Evaluate them on this model."
    )
