"""The command-line app: the table of all commands; each command lives in a file of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import typer

from safegen.cli import attack, demo, edit, export, generate, patch, prompts, triplets
from safegen.cli.console import echo
from safegen.cli.measure import evaluate, report
from safegen.cli.options import show_warnings, silence_libraries


class Command(NamedTuple):
    """Entry of the table of commands: a command, or a group of commands, and its help."""

    function: Callable[..., Any] | typer.Typer
    """The command, or the app of a group."""
    page: str
    """Page of the documentation, below docs/."""
    examples: tuple[str, ...] = ()
    """Two commands that work, without `safegen`."""
    name: str | None = None
    """Name of a group."""


COMMANDS: dict[str, tuple[Command, ...]] = {
    "Try": (
        Command(
            demo.demo,
            "tutorials/remove-skulls.md",
            ("demo", "demo --concept fire --fast --out fire-demo"),
        ),
        Command(
            generate.generate,
            "how-to/guard-a-pipeline.md",
            (
                'generate mini --prompt "a castle covered in skulls" --out images',
                "generate mini --patch p.safetensors --guard sld-max --concept skulls "
                '--prompt "a castle" --out images',
            ),
        ),
    ),
    "Edit": (
        Command(
            edit.edit,
            "how-to/edit-by-images.md",
            (
                "edit mini --triplets mini:skulls --concept skulls --out p.safetensors",
                "edit mini --method uce --concept skulls --out p.safetensors",
            ),
        ),
    ),
    "Ship": (
        Command(
            export.export,
            "how-to/export.md",
            (
                "export mini --patch p.safetensors --out safe.safetensors",
                "export mini --patch p.safetensors --format diffusers --out safe",
            ),
        ),
        Command(patch.app, "how-to/export.md", name="patch"),
    ),
    "Measure": (
        Command(
            evaluate.evaluate,
            "how-to/evaluate-and-compare.md",
            (
                "evaluate mini --stack edited=mini+p.safetensors --concept skulls --out run",
                "evaluate mini --stack mine=my-folder --prompts my.csv --concept skulls --out run",
            ),
        ),
        Command(
            report.score,
            "how-to/rescore-and-rejudge.md",
            ("score run", "score run --threshold 0.7"),
        ),
        Command(
            report.report,
            "how-to/evaluate-and-compare.md",
            ("report run", "report run-1 run-2 --out comparison"),
        ),
        Command(report.verify, "how-to/evaluate-and-compare.md", ("verify run",)),
        Command(
            attack.attack,
            "how-to/attack.md",
            (
                "attack ring_a_bell --stack mini --concept skulls --out run",
                "attack --suite static --base mini --concept skulls --out suite",
            ),
        ),
    ),
    "Data": (
        Command(triplets.app, "tutorials/own-concept.md", name="triplets"),
        Command(prompts.app, "reference/prompts.md", name="prompts"),
    ),
}
"""Commands by panel of the help, in the order in which they are listed."""


def epilog(command: Command) -> str:
    """Return the end of a command's help: its examples and its page."""
    lines = [f"`safegen {example}`" for example in command.examples]
    examples = ["Examples:", *lines] if lines else []
    return "\n\n".join([*examples, f"Documentation: docs/{command.page}"])


app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Remove a visual concept from a text-to-image model, measure the result, and export it.",
)
for panel, commands in COMMANDS.items():
    for command in commands:
        if isinstance(command.function, typer.Typer):
            app.add_typer(
                command.function, name=command.name, rich_help_panel=panel, epilog=epilog(command)
            )
        else:
            app.command(rich_help_panel=panel, epilog=epilog(command))(command.function)


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
