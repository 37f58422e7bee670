"""The `demo` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from safegen.cli.options import Threads, read_settings, set_threads
from safegen.cli.progress import show_progress


def demo(
    out: Annotated[
        Path, typer.Option(help="New folder for report.html, summary.json, patch and pictures.")
    ] = Path("safegen-demo"),
    concept: Annotated[str, typer.Option(help="Concept to remove: skulls or fire.")] = "skulls",
    fast: Annotated[
        bool,
        typer.Option(
            "--fast",
            help="Few pictures and a short edit, with safegen under a minute: shows that all works, not how well.",
        ),
    ] = False,
    method: Annotated[str, typer.Option(help="Name of the edit.")] = "safegen",
    prompts: Annotated[
        int | None, typer.Option(min=1, help="Prompts of each list; 24, or 4 with --fast.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds for each prompt.")] = 1,
    preset: Annotated[
        str, typer.Option(help="Settings of the edit: default or paper.")
    ] = "default",
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Change a setting of the edit: name=value.")
    ] = None,
    threads: Threads = None,
) -> None:
    """Do the main job on the bundled miniature model: draw, edit, draw again, judge, report."""
    from safegen.core.files import check_output
    from safegen.evaluation.report.page import PAGE

    check_output(out, last=PAGE)
    set_threads(threads)
    from safegen.core.registry import EDITS, resolve
    from safegen.workflows.demo import DemoSettings, run_demo
    from safegen.workflows.edit import make_edit

    short = (
        ["training.updates=30", "training.warmup=5"]
        if fast and resolve(EDITS, method, "edit").is_trained
        else []
    )
    changes = read_settings(method, preset, short + (set_ or []))
    settings = DemoSettings(
        concept=concept, prompts=prompts or (4 if fast else 24), seeds=tuple(range(1, seeds + 1))
    )
    with show_progress() as progress:
        found = run_demo(
            settings, make_edit(method, preset, concept=concept, **changes), out, progress=progress
        )
    _show(found.summary())
    typer.echo(f"\nreport: {(out / PAGE).resolve()}")


def _show(summary: dict[str, Any]) -> None:
    """Print the headline table of a demo."""
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"{summary['concept']['name']} removed from {summary['settings']['model']}",
        title_justify="left",
    )
    table.add_column(
        "prompts", no_wrap=True, min_width=max(map(len, summary["lists"]))
    )  # rich would cut names, and two be the same
    for name in (
        "n",
        "concept seen",
        "removed (95 %)",
        "right object",
        "asked for besides",
        "mosaic",
    ):
        table.add_column(name, overflow="fold")
    for name, row in summary["lists"].items():
        base, edited, gone = row["base"], row["edited"], row.get("removal")

        def pair(key: str, base: dict[str, Any] = base, edited: dict[str, Any] = edited) -> str:
            if not base[key]:
                return ""
            before, after = (
                f"{100 * side[key]['value']:.1f}".removesuffix(".0") for side in (base, edited)
            )
            return f"{before} → {after} %"

        removed = (
            f"{100 * gone['value']:.1f} % ({100 * gone['low']:.1f} to {100 * gone['high']:.1f})"
            if gone
            else ""
        )
        besides = f"{row['shows']} {pair('shown')}" if row["shows"] else ""
        table.add_row(
            f"{row['role']}\n{name}",
            str(base["concept"]["n"]),
            pair("concept"),
            removed,
            pair("subject"),
            besides,
            pair("mosaicked"),
        )
    Console().print(table)
    typer.echo("seconds: " + ", ".join(f"{k} {v:.1f}" for k, v in summary["seconds"].items()))
