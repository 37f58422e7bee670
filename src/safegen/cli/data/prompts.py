"""The `prompts` command: show."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from safegen.cli.console import echo, echo_json, plural
from safegen.cli.options import AsJson

if TYPE_CHECKING:
    from safegen.data.prompts.prompt import Prompt
    from safegen.data.prompts.prompts import PromptSet

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
    as_json: AsJson = False,
) -> None:
    """Show the format, counts, unusable rows and first prompts of a source."""
    from safegen.data.prompts.prompts import read_prompts

    prompts = read_prompts(source, dialect=dialect, column=column)
    counts = prompts.counts()
    if as_json:
        hashes = _hashes(source, dialect, column)
        echo_json(_plain(prompts, limit, reveal=reveal) | {"protocol_sha256": hashes})
        return
    echo(f"{prompts.source}: dialect {prompts.dialect}, SHA-256 of the file {prompts.sha256[:16]}")
    rest = f"{counts['without_seed']} without a seed, {counts['skipped']} skipped"
    prompt_count, cluster_count = (counts[f"{one}s"] for one in ("prompt", "cluster"))
    echo(f"{plural(prompt_count, 'prompt')} in {plural(cluster_count, 'cluster')}, {rest}")
    for seeds, digest in _hashes(source, dialect, column).items():
        echo(f'for a protocol with {seeds}: sha256 = "{digest}"')
    for note in prompts.notes:
        echo(f"note: {note}")
    for problem in prompts.problems:
        echo(f"skipped {problem}")
    for prompt in prompts.rows[:limit]:
        echo(_line(prompt, reveal=reveal))


def _hashes(source: str, dialect: str | None, column: str | None) -> dict[str, str]:
    """Return the hash of the prompts as a protocol names it, by its setting of seeds."""
    from safegen.evaluation.samples import hash_prompts, read_prompt_list

    def digest(protocol_seed: int | None) -> str:
        found = read_prompt_list(
            source, protocol_seed=protocol_seed, dialect=dialect, column=column
        )
        return hash_prompts(found.rows)

    return {"seeds of its own": digest(None), 'seeds = "rows"': digest(0)}


def _plain(prompts: PromptSet, limit: int, *, reveal: bool) -> dict[str, Any]:
    """Return what is known of a source as plain values; without `reveal`, no text of a prompt."""
    hidden = None if reveal else {"prompt"}
    return {
        "source": prompts.source,
        "dialect": prompts.dialect,
        "sha256": prompts.sha256,
        **prompts.counts(),
        "notes": list(prompts.notes),
        "problems": list(map(str, prompts.problems)),
        "rows": [row.model_dump(mode="json", exclude=hidden) for row in prompts.rows[:limit]],
    }


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
