"""The `concept` command: new."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from safegen.cli.console import echo, echo_status
from safegen.core.concept import write_template

app = typer.Typer(no_args_is_help=True, help="Describe a concept of your own.")


@app.callback()
def _group() -> None:
    """Keep `new` a subcommand while it is the only one."""


@app.command()
def new(
    name: Annotated[str, typer.Argument(help="Name of the concept: letters, digits, . _ -")],
    out: Annotated[Path | None, typer.Option(help="New file. Default: NAME.toml.")] = None,
) -> None:
    """Write a concept file with an explanation of every setting, to be completed."""
    path = out or Path(f"{name}.toml")
    write_template(name, path)
    echo(str(path))
    echo_status(f"complete it, then: safegen edit MODEL --method uce --concept {path} --out PATCH")
