"""Results of runs as rows: one for each stack, prompt list and metric, for CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from typing import Any

from safegen.evaluation.compare import same_protocol

FORMAT = "safegen-results/1"
COLUMNS = (
    *("run", "stack", "kind", "base", "list", "role", "metric"),
    *("value", "low", "high", "n", "unjudged"),
)
"""Columns of a row. Rates are proportions from 0 to 1; low and high end the 95 % interval."""
NO_FIGURES = ("role", "shows", "prompts", "images", "paired", "reference", "undefined")
"""Keys of a list's scores that hold no metric."""
FORMULA_STARTS = ("=", "+", "-", "@")
"""First characters that a spreadsheet takes for a formula."""


def result_rows(scores: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the figures of runs of one protocol as rows with the keys of `COLUMNS`.

    Args:
        scores: content of `scores.json` by run name.

    Raises:
        ConfigError: there are no scores, or they differ in protocol, judge or weights.
    """
    same_protocol(scores)
    return [
        {
            "run": run,
            "stack": stack,
            "kind": entry["kind"],
            "base": entry["baseline"],
            "list": name,
            "role": row["role"],
            "metric": metric,
            "value": figure["value"],
            "low": figure.get("low"),
            "high": figure.get("high"),
            "n": figure.get("n", figure.get("prompts")),
            "unjudged": figure.get("unjudged"),
        }
        for run, content in scores.items()
        for stack, entry in content["stacks"].items()
        for name, row in entry["lists"].items()
        for metric, figure in _figures(row)
    ]


def _figures(row: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield each figure of a list with its name; parts of a metric are named METRIC.PART.

    If no image was judged, the rate of the concept has no value and says so.
    """
    if "concept" in row and row["concept"] is None:
        yield "concept", {"value": None, "n": 0, "unjudged": row["images"]}
    for key, value in row.items():
        if key not in NO_FIGURES and isinstance(value, Mapping):
            yield from _parts(key, value)


def _parts(name: str, value: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if "value" in value:
        if value["value"] is not None:
            yield name, value
        return
    for key, part in value.items():
        if isinstance(part, Mapping):
            yield from _parts(f"{name}.{key}", part)


def csv_table(scores: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the rows of some runs as CSV with a header.

    A text that a spreadsheet would take for a formula starts with an apostrophe.

    Raises:
        ConfigError: see `result_rows`.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in result_rows(scores):
        writer.writerow({key: _cell(value) for key, value in row.items()})
    return text.getvalue()


def _cell(value: object) -> object:
    """Return a cell that no spreadsheet takes for a formula."""
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA_STARTS) else value


def json_table(scores: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the rows of some runs as JSON, with their protocol and judge.

    Raises:
        ConfigError: see `result_rows`.
    """
    rows = result_rows(scores)
    first = next(iter(scores.values()))
    content = {
        "format": FORMAT,
        "protocol": first["protocol"],
        "judge": first["judge"],
        "weights": first["weights"],
        "rows": rows,
    }
    return json.dumps(content, indent=1) + "\n"


def join_runs(scores: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the scores of several runs of one protocol as those of one run.

    Stacks are named `RUN: STACK`; a base or baseline that an earlier run has too is left out.

    Raises:
        ConfigError: see `result_rows`.
    """
    same_protocol(scores)
    first = next(iter(scores.values()))
    if len(scores) == 1:
        return dict(first)
    stacks: dict[str, Any] = {}
    known = set[str]()
    for run, content in scores.items():
        for name, entry in content["stacks"].items():
            if entry["kind"] == "given" or entry["hash"] not in known:
                stacks[f"{run}: {name}"] = entry
            known.add(entry["hash"])
    return {**first, "stacks": stacks}
