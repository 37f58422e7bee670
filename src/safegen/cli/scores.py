"""The table of scores that `evaluate`, `score`, `demo` and `attack` print."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from safegen.cli.console import echo
from safegen.core.text import escape_control

WIDTH = 80
"""Columns of the text below the table."""
HEADS = (
    "",
    "n",
    "seen %",
    "removed %",
    "object %",
    "asked for %",
    "mosaic %",
    "changed %",
    "blank",
)


def print_run(folder: Path) -> None:
    """Print the scores of a run, the seconds that it took and the path of its report."""
    from safegen.evaluation.report.data import seconds_by_stage
    from safegen.evaluation.report.page import PAGE
    from safegen.evaluation.run.folder import SCORES, Run
    from safegen.evaluation.scoring.records import read_scores

    print_scores(read_scores(folder / SCORES))
    seconds = seconds_by_stage(Run.open(folder))
    echo("seconds: " + ", ".join(f"{stage} {value:.1f}" for stage, value in seconds.items()))
    echo(f"report: {(folder / PAGE).resolve()}")


def print_scores(scores: dict[str, Any]) -> None:
    """Print a run's scores: a block for each prompt list, a row for each stack."""
    protocol, stacks = scores["protocol"], scores["stacks"]
    threshold = protocol["decides"]["judge"]["threshold"]
    echo(f"{protocol['name']}, protocol {protocol['id']}, 95 % intervals in brackets")
    echo(f"judge {scores['judge']}, threshold {threshold}")
    echo()
    lists = next(iter(stacks.values()))["lists"]
    blocks = {
        f"{part} ({row['role']})": [
            [f"  {name}", *_cells(stack["lists"][part])] for name, stack in stacks.items()
        ]
        for part, row in lists.items()
    }
    blocks = {
        escape_control(title): [list(map(escape_control, row)) for row in block]
        for title, block in blocks.items()
    }
    rows = [HEADS, *(row for block in blocks.values() for row in block)]
    used = [i for i in range(len(HEADS)) if any(row[i] for row in rows[1:])]
    widths = {i: max(len(row[i]) for row in rows) for i in used}
    heading = "  ".join(HEADS[i].ljust(widths[i]) for i in used)
    echo(heading.rstrip())
    for title, block in blocks.items():
        echo(title)
        for row in block:
            echo("  ".join(row[i].ljust(widths[i]) for i in used).rstrip())
    for line in textwrap.wrap(_describe_judge(scores), WIDTH, break_long_words=False):
        echo(escape_control(line))
    echo()


def _describe_judge(scores: dict[str, Any]) -> str:
    """Return what is known of the errors of the judge that every rate rests on."""
    from safegen.metrics.judge_error import describe_agreement

    rule = scores["protocol"]["decides"]["judge"]
    return describe_agreement(scores["judge"], rule["labels"], rule["threshold"])


def _cells(row: dict[str, Any]) -> list[str]:
    """Return the figures of a stack on a list, in the order of `HEADS`."""
    seen, shows = row.get("concept"), row.get("shows")
    attribute = _number(row.get("shown"))
    return [
        str(seen["n"] if seen else 0),
        _interval(seen),
        _interval(row.get("removal")),
        _number(row.get("subject")),
        f"{shows} {attribute}" if attribute else "",
        _number(row.get("mosaicked")),
        _number(row.get("change")),
        str(row["blank"]["hits"] or ""),
    ]


def _number(rate: dict[str, Any] | None) -> str:
    return f"{100 * rate['value']:.1f}".removesuffix(".0") if rate else ""


def _interval(rate: dict[str, Any] | None) -> str:
    if not rate or rate["low"] is None:  # one prompt has no spread
        return _number(rate)
    return f"{_number(rate)} ({100 * rate['low']:.0f}-{100 * rate['high']:.0f})"
