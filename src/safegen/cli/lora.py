"""The `patch extract-lora` and `patch from-lora` commands."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safegen.cli.console import echo
from safegen.cli.options import Config, NoCard, Pickle, check_outputs, warn_unused
from safegen.core.files import display_name
from safegen.core.settings import MAX_RANK

if TYPE_CHECKING:
    from safegen.patches.patch import Patch

BaseArg = Annotated[
    str, typer.Argument(help="Base model of the patch or the LoRA.", metavar="MODEL")
]


class Keys(StrEnum):
    """Names of the weights in a LoRA file."""

    kohya = "kohya"
    diffusers = "diffusers"


def extract_lora(
    ctx: typer.Context,
    model: BaseArg,
    patch: Annotated[Path, typer.Argument(help="Patch file.")],
    out: Annotated[Path, typer.Option(help="New .safetensors file for the LoRA.")],
    rank: Annotated[int, typer.Option(min=1, max=MAX_RANK, help="Largest rank.")] = 16,
    keys: Annotated[
        Keys, typer.Option(help="Key names: kohya (A1111, ComfyUI, InvokeAI) or diffusers.")
    ] = Keys.kohya,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="Prompt to measure the loss with. Default: the erased phrase."),
    ] = None,
    skip_quality: Annotated[
        bool, typer.Option("--skip-quality", help="Do not measure the quality loss.")
    ] = False,
    no_card: NoCard = False,
    config: Config = None,
    allow_pickle: Pickle = False,
) -> None:
    """Convert a patch to a LoRA and measure what the limited rank loses."""
    check_outputs(ctx, out, no_card)
    if prompt and skip_quality:
        warn_unused("--prompt", "with --skip-quality")
    from safegen.evaluation.report.model_card import CardSubject, model_card, write_with_card
    from safegen.models.loading import load
    from safegen.patches import lora as loras
    from safegen.patches.patch import Patch

    loaded = Patch.load(patch)
    dtype = "auto" if skip_quality else "fp32"  # images need fp32; differences are in fp64 anyway
    base = load(model, dtype=dtype, config=config, allow_pickle=allow_pickle)
    lora = loras.extract_lora(loaded, base, rank)
    prompts = [] if skip_quality else prompt or [_erased_phrase(loaded)]
    loss = loras.effect_loss(lora, loaded, base, prompts=prompts) if prompts else None
    quality, energy = _describe_loss(prompts, loss), f"{100 * lora.retained_energy:.1f} %"
    note = f"Rank {lora.rank}, {keys} keys. It keeps {energy} of the squared change; {quality}."
    subject = CardSubject(
        "lora",
        out.name,
        display_name(model),
        base.hash,
        [(loaded.hash, loaded.metadata.to_json())],
        [note],
    )
    metadata: dict[str, Any] = {
        "base": base.hash,
        "patch": loaded.hash,
        "metadata": loaded.metadata.to_json(),
        "effect_loss": loss,
        "prompts": prompts,
    }
    write_with_card(
        out,
        None if no_card else model_card(subject),
        lambda: loras.save_lora(lora, base, out, keys=keys.value, **metadata),
    )
    weakest = min(lora.energy_by_weight, key=lambda name: lora.energy_by_weight[name])
    echo(f"{out}: {len(lora.factors)} modules of rank {lora.rank} keep {energy} (energy)")
    echo(f"least: {100 * lora.energy_by_weight[weakest]:.1f} % of {weakest}")
    echo(f"quality: {quality}")
    if lora.left_out:
        echo(
            f"left out, since a LoRA cannot hold them: {len(lora.left_out)} biases and norms, "
            f"{lora.left_out[0]} first"
        )


def from_lora(
    ctx: typer.Context,
    model: BaseArg,
    lora: Annotated[Path, typer.Argument(help="LoRA file with kohya or diffusers keys.")],
    out: Annotated[Path, typer.Option(help="New .safetensors file for the patch.")],
    scale: Annotated[
        float, typer.Option(min=-1000, max=1000, help="Strength of the LoRA; 1 is as trained.")
    ] = 1.0,
    no_card: NoCard = False,
    config: Config = None,
    allow_pickle: Pickle = False,
) -> None:
    """Convert the denoiser's part of a LoRA to a patch, for `patch merge --overlap add`."""
    check_outputs(ctx, out, no_card)
    from safegen.models.loading import load
    from safegen.patches.lora_reader import load_lora
    from safegen.workflows.export import save_patch

    patch = load_lora(lora, load(model, config=config, allow_pickle=allow_pickle), scale=scale)
    save_patch(patch, out, card=not no_card)
    left_out = patch.metadata.to_json().get("left_out")
    note = f"; left out, since a patch cannot hold them: {left_out}" if left_out else ""
    echo(f"{out}: {len(patch.tensors)} tensors{note}")


def _describe_loss(prompts: list[str], loss: float | None) -> str:
    if not prompts:
        return "quality was not measured"
    measured = ", ".join(repr(text) for text in prompts)
    effect = (
        "no prediction changes"
        if loss is None
        else f"it loses {100 * loss:.1f} % of the patch's effect"
    )
    return f"{effect} (predictions for {measured})"


def _erased_phrase(patch: Patch) -> str:
    """Return the first phrase that a patch or one of its parts erases, or an empty prompt."""
    for metadata in (patch.metadata, *(part.metadata for part in patch.metadata.parts)):
        phrases = metadata.settings.get("erase")
        if isinstance(phrases, list | tuple) and phrases:
            return str(phrases[0])
    return ""
