"""The table of scores that `evaluate`, `score`, `demo` and `attack` print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer


def print_run(folder: Path) -> None:
    """Print the scores of a run, the seconds that it took and the path of its report."""
    from safegen.evaluation.report.data import seconds_by_stage
    from safegen.evaluation.report.page import PAGE
    from safegen.evaluation.run.folder import SCORES, Run

    print_scores(json.loads((folder / SCORES).read_text(encoding="utf-8")))
    seconds = seconds_by_stage(Run.open(folder))
    typer.echo("seconds: " + ", ".join(f"{stage} {value:.1f}" for stage, value in seconds.items()))
    typer.echo(f"report: {(folder / PAGE).resolve()}")


def print_scores(scores: dict[str, Any]) -> None:
    """Print a run's scores: one section per prompt list, one row per stack."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    protocol = scores["protocol"]
    rule = protocol["decides"]["judge"]
    table = Table(
        title=Text(
            f"{protocol['name']} (protocol {protocol['id']}): judge {scores['judge']}, "
            f"threshold {rule['threshold']}, 95 % intervals"
        ),
        title_justify="left",
    )
    names = list(scores["stacks"])
    table.add_column("prompts / stack", no_wrap=True, min_width=max(map(len, names)) + 2)
    for head in ("n", "seen", "removed", "right object", "asked for", "mosaic", "changed", "blank"):
        table.add_column(head, overflow="fold")
    first = next(iter(scores["stacks"].values()))
    for part, row in first["lists"].items():
        table.add_row(Text.assemble((part, "bold"), f" ({row['role']})"))
        for name in names:
            table.add_row(*map(Text, (f"  {name}", *_cells(scores["stacks"][name]["lists"][part]))))
        table.add_section()
    Console().print(table)


def _cells(row: dict[str, Any]) -> list[str]:
    from safegen.evaluation.report.format import format_rate, percent

    seen, shown = row.get("concept"), row.get("shown")
    return [
        str(seen["n"] if seen else 0),
        format_rate(seen, n=False),
        format_rate(row.get("removal"), n=False),
        percent(row["subject"]["value"]) if row.get("subject") else "",
        f"{row['shows']} {percent(shown['value'])}" if shown else "",
        percent(row["mosaicked"]["value"]) if row.get("mosaicked") else "",
        percent(row["change"]["value"]) if row.get("change") else "",
        str(row["blank"]["hits"] or ""),
    ]
