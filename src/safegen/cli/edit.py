"""The `edit` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from safegen.cli.console import echo
from safegen.cli.options import (
    Config,
    Device,
    Dtype,
    ModelArg,
    NoCard,
    Pickle,
    Settings,
    Threads,
    check_outputs,
    load_model,
    read_settings,
)
from safegen.cli.progress import show_progress
from safegen.core.errors import FileError


def edit(
    ctx: typer.Context,
    model: ModelArg,
    out: Annotated[Path, typer.Option(help="New .safetensors file for the patch.")],
    triplets: Annotated[
        Path | None,
        typer.Option(help="Triplets folder, CSV file, or mini:skulls, for edits from images."),
    ] = None,
    method: Annotated[str, typer.Option(help="Name of the edit.")] = "safegen",
    preset: Annotated[
        str, typer.Option(help="Settings to start from: default, or paper (the published run).")
    ] = "default",
    concept: Annotated[
        str | None, typer.Option(help="Concept to remove: a built-in name or a TOML file.")
    ] = None,
    set_: Settings = None,
    checkpoint_dir: Annotated[
        Path | None,
        typer.Option(help="Folder for checkpoints and the log. Default: OUT.checkpoints."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue a stopped run.")] = False,
    no_card: NoCard = False,
    device: Device = "cpu",
    dtype: Dtype = "fp32",
    threads: Threads = None,
    allow_pickle: Pickle = False,
    config: Config = None,
) -> None:
    """Remove a concept from a model and write the change as a patch.

    Edits learn from triplets of images (`safegen`, `esd` ...) or from phrases (`uce`, `rece` ...).
    """
    check_outputs(ctx, out, no_card)
    from safegen.core.files import claim_folder
    from safegen.edits.training.checkpoint import CHECKPOINT_FILE
    from safegen.workflows.edit import prepare_edit
    from safegen.workflows.export import save_patch

    settings, rows = prepare_edit(
        method,
        preset,
        triplets=triplets,
        concept=concept,
        checkpoint_dir=checkpoint_dir,
        resume=resume,
        **read_settings(method, preset, set_ or []),
    )
    if settings.is_trained:
        checkpoint_dir = checkpoint_dir or out.with_name(out.name + ".checkpoints")
        ctx.with_resource(claim_folder(checkpoint_dir))
        if not resume and (checkpoint_dir / CHECKPOINT_FILE).exists():
            raise FileError(
                f"{checkpoint_dir} holds an earlier run. Use --resume or remove the folder."
            )
    loaded = load_model(model, device, dtype, threads, allow_pickle, config)
    with show_progress() as progress:
        patch = settings.apply(
            loaded,
            rows,
            checkpoint_dir=checkpoint_dir,
            resume=resume,
            callback=lambda done, total, _: progress("editing", done, total),
        )
    try:
        save_patch(patch, out, card=not no_card)
    except FileError as error:
        if not settings.is_trained:
            raise
        raise FileError(
            f"{str(error).rstrip('.')}. The trained weights are in {checkpoint_dir}: "
            "run the command again with --resume."
        ) from error
    seconds = f"{patch.metadata.seconds:.1f} s"
    if settings.is_trained:
        seconds = f"{patch.metadata.updates} updates, {seconds}. Log: {checkpoint_dir}"
    echo(f"{out}: {len(patch.tensors)} tensors changed in {seconds}")
