"""The command-line app; each command lives in a file of its own."""

from __future__ import annotations

from typing import Annotated

import typer

from safegen.cli import (
    attack,
    demo,
    edit,
    evaluate,
    export,
    generate,
    make_safe,
    patch,
    prompts,
    triplets,
)
from safegen.cli.console import echo
from safegen.cli.options import show_warnings, silence_libraries

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Remove a visual concept from a text-to-image model, measure the result, and export it.",
)
for command in (
    demo.demo,
    generate.generate,
    edit.edit,
    make_safe.make_safe,
    attack.attack,
    export.export,
    evaluate.evaluate,
    evaluate.score,
    evaluate.report,
    evaluate.verify,
):
    app.command()(command)
app.add_typer(patch.app, name="patch")
app.add_typer(triplets.app, name="triplets")
app.add_typer(prompts.app, name="prompts")


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        from safegen._version import __version__

        echo(__version__)
        raise typer.Exit
    silence_libraries()
    show_warnings()
