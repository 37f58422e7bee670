"""The `demo` command."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from safegen.cli.console import echo_status
from safegen.cli.options import (
    Device,
    Settings,
    Threads,
    print_model,
    read_settings,
    resumable,
    set_threads,
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

    set_threads(threads)
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
    for line in next_steps(out, concept):
        echo_status(line)


def next_steps(out: Path, concept: str) -> list[str]:
    """Return what a user can do with the patch of a demo: for each a line, then its command."""
    from safegen.evaluation.run.folder import PATCHES
    from safegen.workflows.demo import EDITED

    patch = str(out / PATCHES / f"{EDITED}.safetensors")
    stacks = ["--stack", "mini", "--stack", f"edited=mini+{patch}"]
    prompt = f"a castle covered in {concept}"
    protocol = {"fire": "mini-smoke-fire"}.get(concept, "mini-smoke")
    steps = {
        "draw a prompt of your own (mini knows 32 objects; `safegen prompts show mini:benign "
        "--reveal` shows some)": [
            *("generate", "mini", "--patch", patch),
            *("--prompt", prompt, "--out", f"{out}-images"),
        ],
        "write the model as one file for A1111 and ComfyUI": [
            *("export", "mini", "--patch", patch, "--out", f"{out}-model.safetensors")
        ],
        "compare it with its base and with cheap baselines": [
            *("evaluate", "--protocol", protocol, *stacks, "--out", f"{out}-run")
        ],
        "check every hash and score of this run": ["verify", str(out)],
    }
    lines = ["", "what next"]
    for text, words in steps.items():
        lines += [f"  {text}:", f"    {shlex.join(['safegen', *words])}"]
    return lines
