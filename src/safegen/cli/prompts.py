"""The commands about prompts: show."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from safegen.data.prompts.prompt import Prompt

app = typer.Typer(no_args_is_help=True, help="Look into files and lists of prompts.")


@app.callback()
def _group() -> None:
    """Keep `show` a word of its own while it is the only command."""


@app.command()
def show(
    source: Annotated[
        str,
        typer.Argument(
            help="A file (CSV, TSV, JSON, JSONL, text), mini:LIST, or hub:owner/name/path/in/repo.csv."
        ),
    ],
    limit: Annotated[int, typer.Option(min=0, help="Rows to print; all are read and checked.")] = 5,
    dialect: Annotated[
        str | None, typer.Option(help="Dialect of the file; told by its columns when not given.")
    ] = None,
    column: Annotated[
        str | None, typer.Option(help="Column that holds the prompts, where there is a choice.")
    ] = None,
    reveal: Annotated[
        bool,
        typer.Option(
            "--reveal", help="Print the texts, which may be unsafe, and not only the ids."
        ),
    ] = False,
) -> None:
    """Say what a source of prompts holds: its dialect, counts, every row that cannot be used, and the first rows."""
    os.environ.setdefault(
        "HF_HUB_DISABLE_PROGRESS_BARS", "1"
    )  # before the hub's client is imported
    from safegen.data.prompts.prompts import read_prompts

    found = read_prompts(source, dialect=dialect, column=column)
    counts = found.counts()
    typer.echo(f"{found.source}: dialect {found.dialect}, SHA-256 {found.sha256[:16]}")
    rest = f"{counts['without_seed']} without a seed, {counts['skipped']} skipped"
    typer.echo(f"{counts['prompts']} prompts in {counts['clusters']} clusters, {rest}")
    for note in found.notes:
        typer.echo(f"note: {note}")
    for problem in found.problems:
        typer.echo(f"skipped {problem}")
    for row in found.rows[:limit]:
        typer.echo(_line(row, reveal=reveal))


def _line(row: Prompt, *, reveal: bool) -> str:
    """Return a row in one line; without `reveal` nothing in it is the prompt's text."""
    size = f"{row.width}x{row.height}" if row.width and row.height else ""
    attack = ""
    if row.attack:
        settings = [
            f"{name} {value:g}"
            for name, value in (("eta", row.attack.eta), ("k", row.attack.k))
            if value is not None
        ]
        attack = " ".join(
            [row.attack.name, *([row.attack.variant] if row.attack.variant else []), *settings]
        )
    facts = {
        "seed": row.seed,
        "guidance": row.guidance,
        "size": size,
        "attack": attack,
        "categories": ", ".join(row.categories),
    }
    told = "; ".join(f"{name} {value}" for name, value in facts.items() if value not in (None, ""))
    text = repr(row.prompt) if reveal else f"{len(row.prompt.split())} words"
    line = f"{row.id}: {told}{'; ' if told else ''}{text}"
    return "".join(
        c if c.isprintable() else "?" for c in line
    )  # a file must not steer the terminal
