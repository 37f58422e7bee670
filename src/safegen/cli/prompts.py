"""The `prompts` command: show."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from safegen.cli.console import echo

if TYPE_CHECKING:
    from safegen.data.prompts.prompt import Prompt

app = typer.Typer(no_args_is_help=True, help="Inspect prompt files and lists.")


@app.callback()
def _group() -> None:
    """Keep `show` a subcommand while it is the only one."""


@app.command()
def show(
    source: Annotated[
        str,
        typer.Argument(
            help="Prompt file (CSV, TSV, JSON, JSONL, text), mini:LIST, or hub:owner/name/FILE."
        ),
    ],
    limit: Annotated[int, typer.Option(min=0, help="Prompts to print; all are checked.")] = 5,
    dialect: Annotated[
        str | None, typer.Option(help="Format of the file. Default: detected from its columns.")
    ] = None,
    column: Annotated[str | None, typer.Option(help="Column with the prompts.")] = None,
    reveal: Annotated[
        bool, typer.Option("--reveal", help="Print the prompts, which may be unsafe.")
    ] = False,
) -> None:
    """Show the format, counts, unusable rows and first prompts of a source."""
    from safegen.data.prompts.prompts import read_prompts

    prompts = read_prompts(source, dialect=dialect, column=column)
    counts = prompts.counts()
    echo(f"{prompts.source}: dialect {prompts.dialect}, SHA-256 of the file {prompts.sha256[:16]}")
    rest = f"{counts['without_seed']} without a seed, {counts['skipped']} skipped"
    echo(f"{counts['prompts']} prompts in {counts['clusters']} clusters, {rest}")
    for line in _hashes(source, dialect, column):
        echo(line)
    for note in prompts.notes:
        echo(f"note: {note}")
    for problem in prompts.problems:
        echo(f"skipped {problem}")
    for prompt in prompts.rows[:limit]:
        echo(_line(prompt, reveal=reveal))


def _hashes(source: str, dialect: str | None, column: str | None) -> list[str]:
    """Return the lines of a protocol's list with the hash of the prompts."""
    from safegen.evaluation.samples import hash_prompts, read_prompt_list

    hashes = [
        hash_prompts(
            read_prompt_list(source, protocol_seed=seed, dialect=dialect, column=column).rows
        )
        for seed in (None, 0)
    ]
    return [f'sha256 = "{hashes[0]}"', f'with seeds = "rows": sha256 = "{hashes[1]}"']


def _line(prompt: Prompt, *, reveal: bool) -> str:
    """Return one line for a prompt; without `reveal` it does not hold the text."""
    attack, attack_words = prompt.attack, list[str]()
    if attack:
        values = {"eta": attack.eta, "k": attack.k}
        attack_words = [attack.name, *([attack.variant] if attack.variant else [])]
        attack_words += [f"{name} {value:g}" for name, value in values.items() if value is not None]
    settings = {
        "seed": prompt.seed,
        "guidance": prompt.guidance,
        "size": f"{prompt.width}x{prompt.height}" if prompt.width and prompt.height else "",
        "attack": " ".join(attack_words),
        "categories": ", ".join(prompt.categories),
    }
    parts = [f"{name} {value}" for name, value in settings.items() if value not in (None, "")]
    parts.append(repr(prompt.prompt) if reveal else f"{len(prompt.prompt.split())} words")
    return f"{prompt.id}: {'; '.join(parts)}"
