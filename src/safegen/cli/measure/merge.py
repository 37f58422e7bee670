"""The `merge` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from safegen.cli.console import echo
from safegen.cli.progress import show_progress
from safegen.cli.scores import print_run


def merge(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of all shards.")],
    out: Annotated[Path, typer.Option(help="New folder of the whole run.")],
) -> None:
    """Merge the shards of a run into the run that one process would have made, and score it.

    No model is loaded. Every image is checked against its SHA-256. Re-run the same command to
    resume. Shards of an attack become a folder that the attack's command, without --shard, resumes.
    """
    from safegen.attacks.core.shards import is_attack_shard, merge_attacks

    if is_attack_shard(runs[0]):
        count = merge_attacks(runs, out)
        echo(
            f"{count} attacked samples in {out}. Evaluate what was found with the command of the "
            f"shards, without --shard and with --out {out}"
        )
        return
    from safegen.evaluation.run.folder import SCORES
    from safegen.workflows.merge import merge as merge_shards

    with show_progress() as progress:
        run = merge_shards(runs, out=out, progress=progress)
    if (out / SCORES).exists():
        print_run(out)
    else:
        echo(f"not judged yet; judge it with: safegen evaluate --stage judge --out {out}")
    echo(
        f"{len(run.stacks) * len(run.samples)} images by {len(run.stacks)} stacks in {out}, "
        f"protocol {run.protocol.name} ({run.protocol.id})"
    )
