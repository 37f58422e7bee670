"""The `patch` commands: info, diff, merge, rebase, card, from-model, extract-lora, from-lora."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from safegen.cli import lora
from safegen.cli.console import echo, echo_json
from safegen.cli.options import AsJson, Config, Metrics, NoCard, Pickle, check_outputs, warn_unused
from safegen.core.errors import ConfigError

app = typer.Typer(
    no_args_is_help=True, help="Inspect, compare and merge patches; convert them to LoRAs."
)
app.command("extract-lora")(lora.extract_lora)
app.command("from-lora")(lora.from_lora)

PatchArg = Annotated[Path, typer.Argument(help="Patch file.")]
OutPatch = Annotated[Path, typer.Option(help="New .safetensors file for the patch.")]


class Overlap(StrEnum):
    """What `merge` does with weights that several patches change."""

    refuse = "refuse"
    add = "add"
    last = "last"


@app.command()
def info(patch: PatchArg, as_json: AsJson = False) -> None:
    """Show what a patch changes and how it was made."""
    from safegen.patches.patch import Patch

    loaded = Patch.load(patch)
    if as_json:
        values = {
            "hash": loaded.hash,
            "tensors": {name: list(value.shape) for name, value in loaded.tensors.items()},
            "metadata": loaded.metadata.to_json(),
        }
        echo_json(values)
        return
    numbers = sum(value.numel() for value in loaded.tensors.values())
    size = f"{patch.stat().st_size / 1e6:.1f} MB"
    echo(
        f"{patch}: {len(loaded.tensors)} tensors, {numbers:,} numbers, {size}, "
        f"hash {loaded.hash[:12]}"
    )
    layers = ", ".join(f"{count} of {kind}" for kind, count in loaded.layer_counts.items())
    echo(f"changes: {layers}")
    for key, value in loaded.metadata.to_json().items():
        text = value if isinstance(value, str | int | float | bool) else json.dumps(value)
        echo(f"{key}: {text}")


@app.command("from-model")
def from_model(
    ctx: typer.Context,
    edited: Annotated[
        str,
        typer.Argument(metavar="EDITED", help="Edited model, or a file with its denoiser alone."),
    ],
    base: Annotated[str, typer.Argument(metavar="BASE", help="Model that it was made of.")],
    out: OutPatch,
    no_card: NoCard = False,
    config: Config = None,
    allow_pickle: Pickle = False,
) -> None:
    """Make a patch of an edited model: the weights that differ from its base."""
    check_outputs(ctx, out, no_card)
    from safegen.workflows.export import save_patch
    from safegen.workflows.patch_from_model import patch_from_model

    patch = patch_from_model(edited, base, allow_pickle=allow_pickle, config=config)
    save_patch(patch, out, card=not no_card)
    echo(f"{out}: {patch.metadata.description}")


@app.command()
def diff(
    first: PatchArg,
    second: Annotated[Path, typer.Argument(help="Another patch file.")],
    as_json: AsJson = False,
) -> None:
    """Show how two patches differ. Exits with 1 if they do."""
    from safegen.patches.arithmetic import compare
    from safegen.patches.patch import Patch

    result = compare(Patch.load(first), Patch.load(second))
    if as_json:
        echo_json(result)
        raise typer.Exit(0 if result["same"] else 1)
    if result["same"]:
        echo("the patches change the same weights to the same values")
        return
    echo(
        f"only in {first}: {result['only_first']} weights; only in {second}: "
        f"{result['only_second']}; in both: {result['both']}"
    )
    if result["distance"] is not None:
        echo(
            f"of both, {result['unequal']} are unequal; "
            f"distance {result['distance']:.3g} of the first's size"
        )
    if result["shapes"]:
        names = ", ".join(result["shapes"][:3])
        echo(f"of another shape: {names} ({len(result['shapes'])} in all)")
    if result["base"] is False:
        echo("they were made on different weights")
    raise typer.Exit(1)


@app.command()
def merge(
    ctx: typer.Context,
    patches: Annotated[
        list[Path], typer.Argument(help="Patch files, in the order in which they apply.")
    ],
    out: OutPatch,
    overlap: Annotated[
        Overlap,
        typer.Option(help="For weights in several patches: refuse, add (needs --model) or last."),
    ] = Overlap.refuse,
    model: Annotated[
        str | None, typer.Option(help="Base model of the patches, for --overlap add.")
    ] = None,
    no_card: NoCard = False,
    config: Config = None,
    allow_pickle: Pickle = False,
) -> None:
    """Merge several patches into one."""
    check_outputs(ctx, out, no_card)
    from safegen.models.loading import load
    from safegen.patches.arithmetic import merge as merge_patches
    from safegen.patches.arithmetic import overlapping
    from safegen.patches.patch import Patch
    from safegen.workflows.export import save_patch

    if config is not None and model is None:
        warn_unused("--config", "without --model")
    loaded = [Patch.load(path) for path in patches]
    base = load(model, config=config, allow_pickle=allow_pickle) if model else None
    merged = merge_patches(loaded, overlap=overlap.value, model=base)
    save_patch(merged, out, card=not no_card)
    shared = len(overlapping(loaded))
    how = merged.metadata.overlap or "each made on the one before"
    note = f", {shared} overlapping: {how}" if shared else ""
    echo(f"{out}: {len(merged.tensors)} tensors of {len(loaded)} patches{note}")


@app.command()
def rebase(
    ctx: typer.Context,
    base: Annotated[str, typer.Argument(help="Model that the patch was made on.", metavar="BASE")],
    target: Annotated[
        str, typer.Argument(help="Fine-tune of BASE that the new patch is for.", metavar="TARGET")
    ],
    patch: PatchArg,
    out: OutPatch,
    no_card: NoCard = False,
    config: Config = None,
    allow_pickle: Pickle = False,
) -> None:
    """Transfer the change of a patch to another fine-tune of its base model.

    The patch itself would overwrite the values of the fine-tune.
    """
    check_outputs(ctx, out, no_card)
    from safegen.core.files import exists
    from safegen.models.loading import load
    from safegen.patches.arithmetic import rebase as rebase_patch
    from safegen.patches.patch import Patch
    from safegen.workflows.export import save_patch

    files = [name for name in (base, target) if exists(name, file=True)]
    if config is not None and not files:
        warn_unused("--config", "on diffusers folders")
    loaded = Patch.load(patch)
    models = [
        load(name, config=config if name in files else None, allow_pickle=allow_pickle)
        for name in (base, target)
    ]
    rebased = rebase_patch(loaded, *models)
    save_patch(rebased, out, card=not no_card)
    moved = {name: f"{100 * value:.3g} %" for name, value in (rebased.metadata.moved or {}).items()}
    note = (
        f"; the edit moves them by {moved['change']}, the fine-tune by {moved['fine_tune']}"
        if moved
        else ""
    )
    echo(f"{out}: {len(rebased.tensors)} tensors{note}")
    echo("measure the edit on the new model: safegen evaluate")


@app.command("card")
def card_(
    patch: PatchArg,
    metrics: Metrics = None,
    out: Annotated[
        Path | None, typer.Option(help="Markdown file to overwrite. Default: PATCH.md.")
    ] = None,
) -> None:
    """Write the model card of a patch again, with new results."""
    if out is not None and out.suffix != ".md":
        raise ConfigError(f"out must end in .md, got {str(out)!r}. A card overwrites its file.")
    from safegen.core.files import atomic_write
    from safegen.evaluation.report.model_card import CardSubject, model_card
    from safegen.patches.patch import Patch

    text = model_card(CardSubject.of_patch(Patch.load(patch), patch.name), metrics or ())
    path = out or patch.with_name(patch.name + ".md")
    with atomic_write(path, replace=True) as temporary:
        temporary.write_text(text, encoding="utf-8")
    echo(str(path))
