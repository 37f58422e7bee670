"""Train the miniature model from random weights."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from safegen.core.errors import SafegenError
from safegen.mini import bundle
from tools.mini.clip import train_clip
from tools.mini.denoiser import polish_denoiser, train_denoiser
from tools.mini.flow import train_flow
from tools.mini.held_out_judge import train_held_out_judge
from tools.mini.judge import train_judge
from tools.mini.pack import build_triplets, pack_weights
from tools.mini.scenes import draw_scenes
from tools.mini.vae import train_vae

STAGES: dict[str, Callable[..., None]] = {
    "world": draw_scenes,
    "clip": train_clip,
    "vae": train_vae,
    "unet": train_denoiser,
    "polish": polish_denoiser,
    "judge": train_judge,
    "held-out-judge": train_held_out_judge,
    "flow": train_flow,
    "pack": pack_weights,
    "triplets": build_triplets,
}
COMPILABLE = ("unet", "polish", "flow")
"""Stages that accept --compile."""
WRITE_BUNDLE = ("pack", "triplets")
"""Stages that write the shipped files."""
TINY: dict[str, dict[str, Any]] = {
    "world": {"n": 96, "objects": ("castle", "bus")},
    "clip": {"steps": 2},
    "vae": {"steps": 2, "test_scenes": 8},
    "unet": {"steps": 2},
    "polish": {"steps": 2},
    "flow": {"steps": 2},
    "judge": {"steps": 2, "reconstructed": 8},
    "held-out-judge": {"steps": 2, "scenes": 32, "reconstructed": 8, "objects": ("castle", "bus")},
    "triplets": {"n": 8},
}
"""Settings with which a stage runs in seconds."""

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def main(
    work: Annotated[Path, typer.Option(help="Directory for checkpoints, log.jsonl and results.")],
    stages: Annotated[str, typer.Option(help="Comma-separated stages.")] = ",".join(STAGES),
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Compile the denoiser; needs a C++ compiler.")
    ] = False,
    output: Annotated[
        Path, typer.Option(help="Directory that pack and triplets write to.")
    ] = bundle.HERE,
    tiny: Annotated[bool, typer.Option(help="Run a few steps on a few scenes, as a test.")] = False,
) -> None:
    """Train the miniature model from random weights. Re-run the same command to resume."""
    names = stages.split(",")
    if unknown := [name for name in names if name not in STAGES]:
        raise typer.BadParameter(f"no stage named {unknown[0]!r}. Known: {', '.join(STAGES)}")
    if tiny and output.resolve() == bundle.HERE.resolve() and set(WRITE_BUNDLE) & set(names):
        raise typer.BadParameter(
            "--tiny would replace the shipped files by untrained ones. Add --output DIR"
        )
    torch.set_num_threads(threads)
    try:
        work.mkdir(parents=True, exist_ok=True)
        for name in names:
            settings = dict(TINY.get(name, {})) if tiny else {}
            if name in COMPILABLE:
                settings["compiled"] = compiled
            if name in WRITE_BUNDLE:
                settings["output"] = output
            start = time.time()
            STAGES[name](work, **settings)
            print(f"{name}: {time.time() - start:.0f} s", flush=True)
    except (SafegenError, OSError) as error:  # OSError: an earlier stage did not run, a full disk
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from error


if __name__ == "__main__":
    app()
