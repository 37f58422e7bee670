"""The `edit` command."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safegen.cli.console import echo, echo_status, plural
from safegen.cli.options import (
    Config,
    Device,
    Dtype,
    ModelArg,
    NoCard,
    Pickle,
    PlanOnly,
    Settings,
    Threads,
    check_outputs,
    load_model,
    print_plan,
    read_settings,
    resumable,
)
from safegen.cli.progress import show_progress
from safegen.core.errors import ConfigError, FileError
from safegen.core.processes import check_alone, is_main_process

if TYPE_CHECKING:
    from safegen.edits.base import Edit
    from safegen.patches.patch import Patch

SHOWN_PHRASES = 20
"""Most phrases that are printed after an edit."""


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
        str | None,
        typer.Option(
            help="Settings to start from: mini, full (full-size models) or paper (the published "
            "run). Default: mini or full, by the size of the model."
        ),
    ] = None,
    concept: Annotated[
        str | None, typer.Option(help="Concept to remove: a built-in name or a TOML file.")
    ] = None,
    erase: Annotated[
        list[str] | None,
        typer.Option(help="Phrase to erase, or FILE.txt with one a line. Repeatable."),
    ] = None,
    prompts: Annotated[
        list[str] | None,
        typer.Option(help="Prompts to learn from: FILE.txt, FILE.csv or source:list. Repeatable."),
    ] = None,
    judge: Annotated[
        str | None, typer.Option(help="Judge to learn from. Default: that of the concept.")
    ] = None,
    from_: Annotated[
        Path | None, typer.Option("--from", help="Patch to start from; the new one contains it.")
    ] = None,
    set_: Settings = None,
    checkpoint_dir: Annotated[
        Path | None,
        typer.Option(
            help="Folder for checkpoints, which stay. Default: OUT.checkpoints until it is done."
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue a stopped run.")] = False,
    no_card: NoCard = False,
    plan: PlanOnly = False,
    device: Device = "auto",
    dtype: Dtype = "fp32",
    threads: Threads = None,
    allow_pickle: Pickle = False,
    config: Config = None,
) -> None:
    """Remove a concept from a model and write the change as a patch.

    Edits learn from triplets of images (`safegen`, `esd` ...), from phrases (`uce`, `rece` ...)
    or from the judge's answers (`shielddiff`).
    """
    if plan:
        check_alone("--plan", "Start it without torchrun.")
    if is_main_process():
        check_outputs(ctx, out, no_card)
    from safegen.core.files import claim_folder
    from safegen.edits.training.checkpoint import CHECKPOINT_FILE
    from safegen.edits.training.latents import latent_storage
    from safegen.models.loading import check_is_model
    from safegen.patches.patch import Patch
    from safegen.workflows.edit import apply_edit, keep_log, prepare_edit

    check_is_model(model)
    changes = read_settings(method, preset, set_ or [])
    phrases = _read_phrases(erase) if erase else None
    changes |= _shorthands(method, erase=phrases, prompts=prompts, judge=judge)
    prepared = prepare_edit(
        method,
        preset,
        triplets=triplets,
        concept=concept,
        checkpoint_dir=checkpoint_dir,
        resume=resume,
        **changes,
    )
    start = None if from_ is None else Patch.load(from_)
    keep_checkpoints = checkpoint_dir is not None
    if prepared.is_trained and not plan:
        checkpoint_dir = checkpoint_dir or out.with_name(out.name + ".checkpoints")
        if is_main_process():
            ctx.with_resource(claim_folder(checkpoint_dir))
        if not resume and (checkpoint_dir / CHECKPOINT_FILE).exists():
            raise FileError(
                f"{checkpoint_dir} holds an earlier run. Use --resume or remove the folder."
            )
    loaded = load_model(
        model,
        device,
        dtype,
        threads,
        allow_pickle,
        config,
        job=lambda loaded: f"{method}, preset {prepared.preset_for(loaded)}",
    )
    if plan:
        from safegen.workflows.plan import plan_edit

        print_plan(plan_edit(prepared.for_model(loaded), loaded, prepared.triplets))
        return
    last: dict[str, float] = {}
    with resumable(checkpoint_dir, "--resume"), show_progress() as progress:

        def follow(done: int, total: int, row: dict[str, float]) -> None:
            last.clear()
            last.update(row)
            progress("editing", done, total, _figures(row))

        with latent_storage(progress=progress):
            patch = apply_edit(
                prepared.for_model(loaded),
                loaded,
                prepared.triplets,
                from_patch=start,
                checkpoint_dir=checkpoint_dir,
                resume=resume,
                callback=follow,
            )
    if not is_main_process():
        return
    _save(patch, out, checkpoint_dir if prepared.is_trained else None, card=not no_card)
    seconds = f"{patch.metadata.seconds:.1f} s"
    if prepared.is_trained and checkpoint_dir is not None:
        log = keep_log(checkpoint_dir, out, keep_checkpoints=keep_checkpoints)
        seconds = f"{plural(patch.metadata.updates or 0, 'update')}, {seconds}. Log: {log}"
    echo(f"{out}: {len(patch.tensors)} tensors changed in {seconds}")
    _print_result(patch, prepared.for_model(loaded), last)
    echo_status(f'try it: safegen generate {model} --patch {out} --prompt "..." --out images')
    echo_status(
        f"then: safegen evaluate --stack edited={model}+{out} --base {model} "
        f"--concept {concept or 'NAME'} --prompts FILE --out run (measure), "
        f"safegen export {model} --patch {out} --out safe.safetensors (ship)"
    )


def _save(patch: Patch, out: Path, checkpoint_dir: Path | None, *, card: bool) -> None:
    """Write a patch; after a training, an error says where its weights are."""
    from safegen.workflows.export import save_patch

    try:
        save_patch(patch, out, card=card)
    except FileError as error:
        if checkpoint_dir is None:
            raise
        raise FileError(
            f"{str(error).rstrip('.')}. The trained weights are in {checkpoint_dir}: "
            "run the command again with --resume."
        ) from error


def _print_result(patch: Patch, edit: Edit, last: Mapping[str, float]) -> None:
    """Print what an edit by words erases, why a training ended, and what its judges found."""
    if line := _erased_phrases(edit):
        echo(line)
    if reason := patch.metadata.to_json().get("stop_reason"):
        echo(f"The training ended early: {reason}.")
    if rates := _rollout_rates(last):
        echo(rates)


def _erased_phrases(edit: Edit) -> str:
    """Return what an edit by words erases; empty for an edit that learns from images or a judge."""
    phrases = getattr(edit, "erase", ())
    if edit.inputs != "words" or "judge" in type(edit).model_fields:
        return ""
    few = ". Other words still draw the concept: add them" if len(phrases) == 1 else ""
    quoted = ", ".join(f'"{phrase}"' for phrase in phrases[:SHOWN_PHRASES])
    quoted += f" and {len(phrases) - SHOWN_PHRASES} more" if len(phrases) > SHOWN_PHRASES else ""
    return f"{edit.method()} erases {plural(len(phrases), 'phrase')}, not measured: {quoted}{few}"


def _read_phrases(values: Iterable[str]) -> tuple[str, ...]:
    """Return phrases, with those of each text file in its place.

    Raises:
        FileError: a file cannot be read or is empty.
    """
    from safegen.core.files import read_lines

    phrases: list[str] = []
    for value in values:
        lines = read_lines(Path(value)) if value.endswith(".txt") else [value]
        if not lines:
            raise FileError(f"the file of phrases {value!r} is empty. Write one phrase per line.")
        phrases += lines
    return tuple(dict.fromkeys(phrases))


def _shorthands(method: str, **options: Any) -> dict[str, Any]:
    """Return the options that are given, as settings of a method.

    Raises:
        ConfigError: the method has no such setting.
    """
    from safegen.core.registry import EDITS, resolve

    given = {name: value for name, value in options.items() if value is not None}
    for name in given:
        if name not in resolve(EDITS, method, "edit").model_fields:
            raise ConfigError(f"method must have a setting {name!r} for --{name}, got {method!r}")
    return given


def _figures(row: Mapping[str, float]) -> str:
    """Return the figures of a log row for the progress bar; empty for an edit without rewards."""
    figures = {"unsafe {:.0%}": "judge_unsafe_concept", "reward {:.2f}": "reward_judge_concept"}
    return ", ".join(text.format(row[key]) for text, key in figures.items() if key in row)


def _rollout_rates(row: Mapping[str, float]) -> str:
    """Return what judges found in the last rollout of a training by reward; else nothing."""
    rates = {"the judge": "judge_unsafe_concept", "the held-out judge": "held_out_unsafe_concept"}
    found = [
        f"{100 * row[key]:.1f} % of {row.get(f'{key}_n', 0):.0f} by {who}"
        for who, key in rates.items()
        if key in row
    ]
    if not found:
        return ""
    return (
        f"{row.get('passes', 0):,.0f} network passes. Images with the concept in the last rollout, "
        f"on prompts that ask for it: {', '.join(found)}. "
        "This is not an evaluation: run `safegen evaluate`."
    )
