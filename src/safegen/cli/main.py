"""The command-line app: the table of all commands; each command lives in a file of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple

import typer

from safegen.cli import attack, demo, edit, export, generate, make_safe, patch, serve
from safegen.cli.console import echo
from safegen.cli.data import concept, prompts, triplets
from safegen.cli.info import doctor, show
from safegen.cli.info.checks import with_checks
from safegen.cli.measure import evaluate, merge, report
from safegen.cli.options import show_warnings, silence_libraries
from safegen.cli.processes import with_processes
from safegen.cli.verbosity import add_output_options, reset_verbosity


class Command(NamedTuple):
    """Entry of the table of commands: a command, or a group of commands, and its help."""

    function: Callable[..., Any] | typer.Typer
    """The command, or the app of a group."""
    page: str
    """Page of the documentation, below docs/."""
    examples: tuple[str, ...] = ()
    """Two commands that work, without `safegen`."""
    name: str | None = None
    """Name of a group, or of a command that is not called as its function."""
    below: Mapping[str, tuple[str, ...]] = {}
    """Examples of the commands of a group, by their name."""


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
        Command(doctor.doctor, "index.md", ("doctor", "doctor --json")),
        Command(show.list_, "index.md", ("list methods", "list presets --json"), name="list"),
        Command(show.show, "index.md", ("show esd", "show mini --kind judges"), name="show"),
    ),
    "Edit": (
        Command(
            make_safe.make_safe,
            "how-to/make-safe.md",
            (
                "make-safe mini --concept skulls --out safe.safetensors",
                "make-safe my.safetensors --concept nudity --words --out safe.safetensors",
            ),
        ),
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
        Command(
            serve.serve,
            "how-to/serve.md",
            (
                "serve --stack mini+p.safetensors --guard judge-filter --concept skulls",
                "serve --upstream http://127.0.0.1:7860 --upstream-kind a1111 "
                "--guard prompt-filter --guard judge-filter --concept skulls",
            ),
        ),
        Command(
            patch.app,
            "how-to/export.md",
            name="patch",
            below={
                "info": ("patch info p.safetensors", "patch info p.safetensors --json"),
                "diff": ("patch diff p.safetensors q.safetensors",),
                "merge": (
                    "patch merge p.safetensors q.safetensors --out both.safetensors",
                    "patch merge p.safetensors q.safetensors --overlap add --model mini "
                    "--out both.safetensors",
                ),
                "rebase": ("patch rebase mini my-fine-tune p.safetensors --out q.safetensors",),
                "from-model": ("patch from-model my-folder mini --out p.safetensors",),
                "card": (
                    "patch card p.safetensors --metrics run",
                    "patch card p.safetensors --out card.md",
                ),
                "extract-lora": (
                    "patch extract-lora mini p.safetensors --out lora.safetensors",
                    "patch extract-lora mini p.safetensors --rank 32 --out lora.safetensors",
                ),
                "from-lora": ("patch from-lora mini lora.safetensors --out p.safetensors",),
            },
        ),
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
            merge.merge,
            "how-to/shards.md",
            ("merge part-1 part-2 --out run", "merge part-* --out run"),
        ),
        Command(
            report.score,
            "how-to/rescore-and-rejudge.md",
            ("score run", "score run --threshold 0.7"),
        ),
        Command(
            report.report,
            "how-to/evaluate-and-compare.md",
            ("report run --csv results.csv --plots plots", "report run-1 run-2 --out comparison"),
        ),
        Command(
            report.results, "how-to/evaluate-and-compare.md", ("results run", "results run-1 run-2")
        ),
        Command(
            report.verify,
            "how-to/evaluate-and-compare.md",
            ("verify run", "verify safegen-demo --json"),
        ),
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
        Command(
            triplets.app,
            "tutorials/own-concept.md",
            name="triplets",
            below={
                "make": (
                    "triplets make --unsafe my-unsafe --benign my-benign --judge mini --out t",
                    "triplets make --unsafe my-unsafe --judge nudenet --style blur --out t",
                ),
                "merge": (
                    "triplets merge part-1 part-2 --unsafe my-unsafe --benign my-benign --out t",
                ),
                "check": ("triplets check t", "triplets check t --judge mini"),
            },
        ),
        Command(
            concept.app,
            "tutorials/own-concept.md",
            name="concept",
            below={"new": ("concept new smoke", "concept new smoke --out concepts/smoke.toml")},
        ),
        Command(
            prompts.app,
            "reference/prompts.md",
            name="prompts",
            below={
                "show": (
                    "prompts show mini:skulls --reveal",
                    "prompts show my.csv --column prompt --limit 20",
                )
            },
        ),
    ),
}
"""Commands by panel of the help, in the order in which they are listed."""


def epilog(page: str, examples: tuple[str, ...] = ()) -> str:
    """Return the end of a command's help: its examples and its page."""
    lines = [f"`safegen {example}`" for example in examples]
    return "\n\n".join([*(["Examples:", *lines] if lines else []), f"Documentation: docs/{page}"])


def add_group(group: typer.Typer, command: Command, panel: str) -> None:
    """Add a group of commands to the app, with the options and the examples of each."""
    for info in group.registered_commands:
        function = info.callback
        assert function is not None
        name = info.name or function.__name__
        info.callback = add_output_options(with_checks(function))
        info.epilog = epilog(command.page, command.below.get(name, ()))
    end = epilog(command.page)
    app.add_typer(group, name=command.name, rich_help_panel=panel, epilog=end)


app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Remove a visual concept from a text-to-image model, measure the result, and export it.",
)
for panel, commands in COMMANDS.items():
    for command in commands:
        if isinstance(command.function, typer.Typer):
            add_group(command.function, command, panel)
        else:
            register = app.command(
                command.name, rich_help_panel=panel, epilog=epilog(command.page, command.examples)
            )
            register(add_output_options(with_processes(with_checks(command.function))))


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        from safegen._version import __version__

        echo(__version__)
        raise typer.Exit
    reset_verbosity()
    silence_libraries()
    show_warnings()
