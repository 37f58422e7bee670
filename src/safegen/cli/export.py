"""The `export` command."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from safegen.cli.console import echo
from safegen.cli.options import (
    Config,
    Metrics,
    ModelArg,
    NoCard,
    Patches,
    Pickle,
    check_outputs,
    load_model,
)


class Format(StrEnum):
    """Layout of an exported model."""

    single_file = "single-file"
    diffusers = "diffusers"


def export(
    ctx: typer.Context,
    model: ModelArg,
    out: Annotated[Path, typer.Option(help="New .safetensors file, or new folder.")],
    patch: Patches = None,
    format_: Annotated[
        Format,
        typer.Option("--format", help="single-file for A1111 and ComfyUI, or a diffusers folder."),
    ] = Format.single_file,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Type of the weights: fp16, bf16 or fp32. Default: fp16 in a single file, that of "
            "MODEL's files in a folder."
        ),
    ] = None,
    metrics: Metrics = None,
    no_card: NoCard = False,
    config: Config = None,
    allow_pickle: Pickle = False,
) -> None:
    """Write a model with its patches as one checkpoint file or as a diffusers folder.

    A1111, ComfyUI and InvokeAI open the file; `from_pretrained` opens the folder. The file of SD 3
    and FLUX holds the transformer alone: put it in ComfyUI's `models/diffusion_models`.
    """
    is_file = format_ is Format.single_file
    check_outputs(ctx, out, no_card or not is_file)
    from safegen.models.loading import find_dtype
    from safegen.patches.patch import Patch
    from safegen.workflows.export import TRANSFORMER_ALONE, check_suffix, export_dtype
    from safegen.workflows.export import export as export_model

    check_suffix(out, format_.value)
    patches = [Patch.load(path) for path in patch or []]
    stored = find_dtype(model, allow_pickle=allow_pickle, config=config)
    # in another type, patches would be rounded twice
    same = stored is not None and stored == export_dtype(stored, format_.value, dtype)
    loaded = load_model(model, "cpu", "auto" if same else "fp32", None, allow_pickle, config)
    export_model(
        loaded,
        out,
        format=format_.value,
        patches=patches,
        dtype=dtype,
        card=not no_card,
        metrics=metrics or (),
    )
    files = [out] if is_file else [path for path in out.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files) / 1e6
    echo(f"{out}: {size:.1f} MB, {len(patches)} patch{'es' * (len(patches) != 1)} applied")
    for change in patches:
        echo(f"patch {change.hash[:12]}: {change.describe_change(loaded)}")
    if is_file and loaded.denoiser_name == "transformer":
        echo(TRANSFORMER_ALONE)
    if not is_file:
        pipeline = type(loaded.pipeline).__name__
        echo(f"load it with {pipeline}.from_pretrained({str(out)!r})")
