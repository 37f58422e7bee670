"""The `demo` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from safegen.cli.console import echo_status
from safegen.cli.options import (
    Device,
    Settings,
    Threads,
    prepare_generation,
    print_model,
    read_settings,
    resumable,
)
from safegen.cli.progress import show_progress
from safegen.cli.scores import print_run
from safegen.core.settings import MAX_COUNT, MAX_SEEDS


def demo(
    out: Annotated[Path, typer.Option(help="Directory of the run; re-run to resume.")] = Path(
        "safegen-demo"
    ),
    concept: Annotated[str, typer.Option(help="Concept to remove: skulls or fire.")] = "skulls",
    fast: Annotated[
        bool, typer.Option("--fast", help="Few images, short edit: a smoke test of one minute.")
    ] = False,
    method: Annotated[str, typer.Option(help="Name of the edit.")] = "safegen",
    prompts: Annotated[
        int | None,
        typer.Option(min=1, max=MAX_COUNT, help="Prompts of each list. [default: 24; --fast: 4]"),
    ] = None,
    seeds: Annotated[
        int, typer.Option(min=1, max=MAX_SEEDS, help="Seeds of each prompt: 1 to N.")
    ] = 1,
    preset: Annotated[str, typer.Option(help="Settings: mini or paper.")] = "mini",
    set_: Settings = None,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Remove a concept from the bundled miniature model, measure and report."""
    from safegen.core.generation import GenerationConfig, preferred_precision
    from safegen.core.registry import EDITS, resolve
    from safegen.stack_loader import StackLoader
    from safegen.workflows.demo import DemoConfig, run_demo
    from safegen.workflows.edit import make_edit

    prepare_generation(threads)
    is_short = fast and resolve(EDITS, method, "edit").is_trained
    short = ["training.updates=30", "training.warmup=5"] if is_short else []
    changes = read_settings(method, preset, short + (set_ or []))
    config = DemoConfig(
        generation=GenerationConfig(precision=preferred_precision(device)),
        concept=concept,
        prompts=prompts or (4 if fast else 24),
        seeds=tuple(range(1, seeds + 1)),
    )
    edit = make_edit(method, preset, concept=concept, **changes)
    with resumable(out), show_progress() as progress:
        run = run_demo(
            config,
            edit,
            out,
            loader=StackLoader(device=device, on_load=print_model),
            progress=progress,
        )
    print_run(run.folder)
    for line in next_lines(out):
        echo_status(line)


def next_lines(out: Path) -> list[str]:
    """Return what to do with a demo, as its report says: a line, then its command, for each."""
    from safegen.core.documents import read_json_object
    from safegen.evaluation.report.html.next_steps import next_steps
    from safegen.evaluation.report.page import NUMBERS

    data = read_json_object(out / NUMBERS)
    (run,) = data["runs"].values()
    lines = ["", "what next"]
    for step in next_steps(data | {"runs": {str(out): run}}):
        lines += [f"  {step.title}:", f"    {step.command}"]
        lines += [f"    {step.note}"] if step.note else []
    return lines
