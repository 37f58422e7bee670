"""`safegen patch`: info, diff, merge, carry, card, extract-lora, from-lora.

And `safegen export`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from safegen.cli.options import (
    Config,
    Metrics,
    ModelArg,
    NoCard,
    Pickle,
    one_line_warnings,
    refuse_idle_metrics,
)
from safegen.core.errors import ConfigError, FileError
from safegen.core.files import display_name

if TYPE_CHECKING:
    from safegen.patches.lora import KeyFormat
    from safegen.patches.patch import Patch

app = typer.Typer(
    no_args_is_help=True, help="Look into patches, compare and merge them, turn them into LoRAs."
)

PatchArg = Annotated[Path, typer.Argument(help="A patch file.")]
Model = Annotated[
    str, typer.Argument(help="The model that the patch was made on.", metavar="MODEL")
]


@app.command()
def info(
    patch: PatchArg,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Say what a patch changes and where it comes from."""
    from safegen.patches.patch import Patch

    found = Patch.load(patch)
    numbers = sum(v.numel() for v in found.tensors.values())
    if as_json:
        facts = {
            "hash": found.hash,
            "tensors": {k: list(v.shape) for k, v in found.tensors.items()},
            "metadata": found.metadata.to_json(),
        }
        typer.echo(json.dumps(facts, indent=1))
        return
    typer.echo(
        f"{patch}: {len(found.tensors)} tensors, {numbers:,} numbers, {patch.stat().st_size / 1e6:.1f} MB, hash {found.hash[:12]}"
    )
    typer.echo("changes: " + ", ".join(f"{n} of {kind}" for kind, n in found.layer_counts.items()))
    for key, value in found.metadata.to_json().items():
        typer.echo(
            f"{key}: {value if isinstance(value, str | int | float | bool) else json.dumps(value)}"
        )


@app.command()
def diff(first: PatchArg, second: Annotated[Path, typer.Argument(help="Another.")]) -> None:
    """Say how two patches differ; exit code 1 when they do."""
    from safegen.patches.arithmetic import compare
    from safegen.patches.patch import Patch

    found = compare(Patch.load(first), Patch.load(second))
    if found["same"]:
        typer.echo("the patches change the same weights to the same values")
        return
    typer.echo(
        f"only in {first}: {found['only_first']} weights; only in {second}: {found['only_second']}; in both: {found['both']}"
    )
    if found["distance"] is not None:
        typer.echo(
            f"of both, {found['unequal']} are unequal; distance {found['distance']:.3g} of the first's size"
        )
    if found["shapes"]:
        typer.echo(
            f"of another shape: {', '.join(found['shapes'][:3])} ({len(found['shapes'])} in all)"
        )
    if found["base"] is False:
        typer.echo("they were made on different weights")
    raise typer.Exit(1)


@app.command()
def merge(
    patches: Annotated[
        list[Path], typer.Argument(help="Patch files, in the order in which they are put on.")
    ],
    out: Annotated[Path, typer.Option(help="New .safetensors file for the merged patch.")],
    overlap: Annotated[
        str,
        typer.Option(
            help="For weights that several change: refuse, add (the changes; needs --model) or last."
        ),
    ] = "refuse",
    model: Annotated[
        str | None,
        typer.Option(help="With --overlap add, the model that the patches were made on."),
    ] = None,
    no_card: NoCard = False,
    config: Config = None,
    allow_pickle: Pickle = False,
) -> None:
    """Make one patch of several."""
    if overlap not in ("refuse", "add", "last"):
        raise ConfigError(f"overlap must be refuse, add or last, got {overlap!r}")
    if model is not None and overlap != "add":
        raise ConfigError("model has no effect without --overlap add; leave it out")
    if config is not None and model is None:
        raise ConfigError("config has no effect without --model; leave it out")
    _refuse_taken(out, no_card)
    from safegen.models.loading import load
    from safegen.patches.arithmetic import Overlap, overlapping
    from safegen.patches.arithmetic import merge as do
    from safegen.patches.patch import Patch
    from safegen.workflows.edit import save_patch

    read = [Patch.load(path) for path in patches]
    base = load(model, config=config, allow_pickle=allow_pickle) if model else None
    with one_line_warnings():
        merged = do(read, overlap=cast(Overlap, overlap), model=base)
    save_patch(merged, out, card=not no_card)
    twice, how = len(overlapping(read)), merged.metadata.overlap or "made one on the other"
    typer.echo(
        f"{out}: {len(merged.tensors)} tensors of {len(read)} patches"
        + (f", {twice} overlapping: {how}" if twice else "")
    )


@app.command()
def carry(
    patch: PatchArg,
    base: Annotated[
        str, typer.Argument(help="The model that the patch was made on.", metavar="BASE")
    ],
    target: Annotated[
        str,
        typer.Argument(
            help="Another fine-tune of it, for which the new patch is.", metavar="TARGET"
        ),
    ],
    out: Annotated[Path, typer.Option(help="New .safetensors file for the carried patch.")],
    no_card: NoCard = False,
    config: Config = None,
    allow_pickle: Pickle = False,
) -> None:
    """Carry a patch's change over to another fine-tune of its base, whose own values the patch itself would overwrite."""
    _refuse_taken(out, no_card)
    from safegen.core.files import exists

    files = [name for name in (base, target) if exists(name, file=True)]
    if config is not None and not files:
        raise ConfigError(
            f"config has no effect on {base!r} and {target!r}, which are no one-file checkpoints; leave it out"
        )
    from safegen.models.loading import load
    from safegen.patches.arithmetic import rebase as do
    from safegen.patches.patch import Patch
    from safegen.workflows.edit import save_patch

    read = Patch.load(patch)
    models = [
        load(name, config=config if name in files else None, allow_pickle=allow_pickle)
        for name in (base, target)
    ]
    carried = do(read, *models)
    save_patch(carried, out, card=not no_card)
    far = {what: f"{100 * value:.3g} %" for what, value in carried.metadata.moved.items()}
    said = (
        f"; the edit moves them by {far['change']}, the fine-tune had by {far['fine_tune']}"
        if far
        else ""
    )
    typer.echo(
        f"{out}: {len(carried.tensors)} tensors{said}; nothing says that the edit works there: measure it (safegen evaluate)"
    )


@app.command("card")
def card_(
    patch: PatchArg,
    metrics: Metrics = None,
    out: Annotated[
        Path | None, typer.Option(help="File to write anew; PATCH.md unless told.")
    ] = None,
) -> None:
    """Write a patch's model card anew: with the figures that were measured since."""
    if out is not None and out.suffix != ".md":
        raise ConfigError(
            f"out must end in .md, since a card is Markdown and is written anew over what is there, got {str(out)!r}"
        )
    from safegen.core.files import atomic_write
    from safegen.evaluation.report.model_card import CardSubject, card_path, model_card
    from safegen.patches.patch import Patch

    text = model_card(CardSubject.of_patch(Patch.load(patch), patch.name), metrics or ())
    with atomic_write(out or card_path(patch), replace=True) as tmp:
        tmp.write_text(text, encoding="utf-8")
    typer.echo(str(out or card_path(patch)))


@app.command("extract-lora")
def extract_lora(
    patch: PatchArg,
    model: Model,
    out: Annotated[Path, typer.Option(help="New .safetensors file for the LoRA.")],
    rank: Annotated[int, typer.Option(help="Rank, at most.")] = 16,
    keys: Annotated[
        str,
        typer.Option(
            help="kohya (A1111, ComfyUI; InvokeAI if keys or values of attn2 change) or diffusers."
        ),
    ] = "kohya",
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            help="What is drawn to see what the rank loses; repeat it. The first word that the patch erases, or a blank text, unless told."
        ),
    ] = None,
    no_quality: Annotated[
        bool,
        typer.Option(
            "--no-quality",
            help="Do not look: three drawings of 8 steps a prompt, minutes at full size on a processor.",
        ),
    ] = False,
    no_card: NoCard = False,
    config: Config = None,
    allow_pickle: Pickle = False,
) -> None:
    """Turn a patch into a LoRA, and say how much of its change the rank holds and how much of its effect the rank loses."""
    if keys not in ("kohya", "diffusers"):
        raise ConfigError(f"keys must be kohya or diffusers, got {keys!r}")
    if rank < 1:
        raise ConfigError(f"the rank of a LoRA must be >= 1, got {rank}")
    if prompt and no_quality:
        raise ConfigError("prompt has no effect with --no-quality; leave one of them out")
    _refuse_taken(out, no_card)
    from safegen.evaluation.report.model_card import CardSubject, model_card, write_with_card
    from safegen.models.loading import load
    from safegen.patches.lora import effect_loss, save_lora
    from safegen.patches.lora import extract_lora as extract
    from safegen.patches.patch import Patch

    read, loaded = Patch.load(patch), load(model, config=config, allow_pickle=allow_pickle)
    with one_line_warnings():
        found = extract(read, loaded, rank)
        drawn = [] if no_quality else prompt or _words(read)
        lost = effect_loss(found, read, loaded, prompts=drawn) if drawn else None
    effect = (
        "not measured"
        if not drawn
        else "no prediction changes"
        if lost is None
        else f"loses {100 * lost:.1f} % of the patch's effect"
    )
    effect += (
        f" (predictions while {', '.join(repr(text) if text else 'a blank text' for text in drawn)} is drawn)"
        if drawn
        else ""
    )
    facts: dict[str, Any] = {
        "base": loaded.hash,
        "patch": read.hash,
        "metadata": read.metadata.to_json(),
    }
    facts |= {"effect_loss": lost, "prompts": drawn}
    share = f"Rank {found.rank}, in {keys}'s keys; it holds {100 * found.retained_energy:.1f} % of the patch's squared change; {effect}."
    subject = CardSubject(
        "lora",
        out.name,
        display_name(model),
        loaded.hash,
        [(read.hash, read.metadata.to_json())],
        [share],
    )
    write_with_card(
        out,
        None if no_card else model_card(subject),
        lambda: save_lora(found, loaded, out, keys=cast("KeyFormat", keys), **facts),
    )
    worst = min(found.energy_by_weight, key=lambda name: found.energy_by_weight[name])
    typer.echo(
        f"{out}: {len(found.factors)} modules of rank {found.rank} hold {100 * found.retained_energy:.1f} % of the change (its energy)"
    )
    typer.echo(f"least: {100 * found.energy_by_weight[worst]:.1f} % of {worst}")
    typer.echo(f"quality: {effect}")
    if found.left_out:
        typer.echo(
            f"left out, since a LoRA cannot hold them: {len(found.left_out)} biases and norms, {found.left_out[0]} first"
        )


def _words(patch: Patch) -> list[str]:
    """Return the first word that a patch, or one that it was merged of, erases.

    A blank text where all learnt from pictures.
    """
    for metadata in (patch.metadata, *(part.metadata for part in patch.metadata.parts)):
        words = metadata.settings.get("erase")
        if isinstance(words, list | tuple) and words:
            return [str(words[0])]
    return [""]


@app.command("from-lora")
def from_lora(
    lora: Annotated[Path, typer.Argument(help="A LoRA file, kohya's keys or diffusers'.")],
    model: Model,
    out: Annotated[Path, typer.Option(help="New .safetensors file for the patch.")],
    scale: Annotated[float, typer.Option(help="Its strength; 1 is as trained.")] = 1.0,
    no_card: NoCard = False,
    config: Config = None,
    allow_pickle: Pickle = False,
) -> None:
    """Turn the denoiser's part of a LoRA into a patch, to be merged with others: `patch merge --overlap add`."""
    _refuse_taken(out, no_card)
    from safegen.models.loading import load
    from safegen.patches.lora_reader import load_lora
    from safegen.workflows.edit import save_patch

    loaded = load(model, config=config, allow_pickle=allow_pickle)
    with one_line_warnings():
        patch = load_lora(lora, loaded, scale=scale)
    save_patch(patch, out, card=not no_card)
    left = patch.metadata.to_json().get("left_out")
    typer.echo(
        f"{out}: {len(patch.tensors)} tensors"
        + (f"; left out, since a patch cannot hold them: {left}" if left else "")
    )


def export(
    model: ModelArg,
    out: Annotated[Path, typer.Option(help="New .safetensors file.")],
    patch: Annotated[
        list[Path] | None,
        typer.Option(help="A patch to put on the model first; may be given more than once."),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Type of the weights in the file: fp16, bf16 or fp32.")
    ] = "fp16",
    metrics: Metrics = None,
    no_card: NoCard = False,
    config: Config = None,
    allow_pickle: Pickle = False,
) -> None:
    """Write a model as one file in the original layout, which A1111, ComfyUI and InvokeAI open."""
    if out.suffix != ".safetensors":
        raise ConfigError(
            f"out must end in .safetensors, which is what is written, got {str(out)!r}"
        )
    _refuse_taken(out, no_card)
    refuse_idle_metrics(metrics, no_card)
    from safegen.models.loading import load
    from safegen.patches.patch import Patch
    from safegen.workflows.edit import export as do

    read = [Patch.load(path) for path in patch or []]
    loaded = load(model, config=config, allow_pickle=allow_pickle)
    with one_line_warnings():
        do(loaded, out, patches=read, dtype=dtype, card=not no_card, metrics=metrics or ())
    typer.echo(f"{out}: {out.stat().st_size / 1e6:.1f} MB, {dtype}, {len(read)} patches in it")


def _refuse_taken(out: Path, no_card: bool) -> None:
    if out.exists():
        raise FileError(f"{out} exists already; name another file or remove it")
    if not no_card:
        from safegen.evaluation.report.model_card import check_card_path

        check_card_path(out)
