"""The `attack` commands: `relearn`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from safegen.cli.options import (
    Config,
    Device,
    Dtype,
    ModelArg,
    Pickle,
    Threads,
    resumable,
    set_threads,
)
from safegen.cli.progress import show_progress
from safegen.cli.scores import print_run
from safegen.core.errors import ConfigError, explain
from safegen.core.settings import MAX_BATCH, MAX_COUNT, MAX_RANK, MAX_SEEDS, MAX_STEPS

app = typer.Typer(no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Keep `relearn` a subcommand while it is the only attack."""


class DataChoice(StrEnum):
    """Images that the fine-tune learns from."""

    benign = "benign"
    concept = "concept"


@app.command()
def relearn(
    model: ModelArg,
    out: Annotated[Path, typer.Option(help="Directory of the run; re-run to resume.")],
    patch: Annotated[list[Path], typer.Option(help="Patch of the edit (repeatable).")],
    concept: Annotated[str, typer.Option(help="Concept that was removed: a name or a TOML file.")],
    data: Annotated[
        DataChoice, typer.Option(help="Fine-tune on harmless images, or on the concept's.")
    ] = DataChoice.benign,
    updates: Annotated[
        list[int] | None,
        typer.Option(
            min=1, max=MAX_COUNT, help="Evaluate after N updates (repeatable). [default: 200]"
        ),
    ] = None,
    triplets: Annotated[
        Path | None, typer.Option(help="Triplets with the images. [default: bundled ones]")
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder of images with captions (a.png, a.txt).")
    ] = None,
    modular: Annotated[
        bool, typer.Option("--modular", help="Also fine-tune the base and add the edit to it.")
    ] = False,
    rank: Annotated[int, typer.Option(min=1, max=MAX_RANK, help="Rank of the LoRA.")] = 16,
    lr: Annotated[float, typer.Option(min=1e-12, max=10, help="Learning rate.")] = 5e-4,
    batch: Annotated[int, typer.Option(min=1, max=MAX_BATCH, help="Images per update.")] = 8,
    prompts: Annotated[int, typer.Option(min=1, max=MAX_COUNT, help="Prompts of each list.")] = 24,
    seeds: Annotated[
        int, typer.Option(min=1, max=MAX_SEEDS, help="Seeds of each prompt: 1 to N.")
    ] = 1,
    steps: Annotated[int, typer.Option(min=1, max=MAX_STEPS, help="Denoising steps.")] = 25,
    role: Annotated[
        list[str] | None,
        typer.Option(help="Role of the prompt lists (repeatable), as explicit or benign."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of the fine-tune.")] = 0,
    device: Device = "cpu",
    dtype: Dtype = "fp32",
    threads: Threads = None,
    allow_pickle: Pickle = False,
    config: Config = None,
) -> None:
    """Fine-tune an edited model and measure whether the concept comes back."""
    from pydantic import ValidationError

    from safegen.attacks.finetune import FineTuneConfig
    from safegen.attacks.relearn import RelearnConfig, load_dataset
    from safegen.attacks.relearn import relearn as run_attack
    from safegen.core.concept import load_concept
    from safegen.core.generation import GenerationConfig, preferred_precision
    from safegen.stack import Stack
    from safegen.stack_loader import StackLoader

    try:
        settings: dict[str, Any] = {"roles": tuple(role)} if role else {}
        relearn_config = RelearnConfig(
            data=data.value,
            finetune=FineTuneConfig(
                updates=tuple(updates or (200,)), rank=rank, lr=lr, batch=batch, seed=seed
            ),
            modular=modular,
            prompts=prompts,
            seeds=tuple(range(1, seeds + 1)),
            generation=GenerationConfig(
                num_inference_steps=steps, precision=preferred_precision(device)
            ),
            **settings,
        )
    except ValidationError as error:
        raise ConfigError(explain(error)) from error
    set_threads(threads)
    removed = load_concept(concept)
    dataset = load_dataset(removed, data.value, triplets=triplets, images=images)
    stack = Stack(name="edited", model=model, config=config, patches=tuple(patch))
    loader = StackLoader(device=device, dtype=dtype, allow_pickle=allow_pickle)
    with resumable(out), show_progress() as progress:
        run = run_attack(
            stack, removed, dataset, relearn_config, out, loader=loader, progress=progress
        )
    print_run(run.folder)
