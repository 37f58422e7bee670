"""The `make-safe` command."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safegen.cli.console import echo, echo_json, echo_status
from safegen.cli.options import (
    AsJson,
    Config,
    Device,
    Dtype,
    ModelArg,
    Pickle,
    PlanOnly,
    Settings,
    Threads,
    prepare_generation,
    print_plan,
    read_settings,
    resumable,
)
from safegen.cli.progress import show_progress
from safegen.core.device import AUTO
from safegen.core.settings import MAX_COUNT

if TYPE_CHECKING:
    from safegen.workflows.removal.check import CheckResult

NOT_SHIPPED = 3
"""Exit status if the check does not find the concept removed."""
ADVICE = {
    "remains": "Train longer (--set training.updates=N), give images of your own, or more of "
    "them (--unsafe DIR, --benign DIR), or try another --method.",
    "remains, words": "Leave --words out, so that the edit learns from images, or add words that "
    "name the concept to its TOML file.",
    "not-measured": "Without images of it, nothing shows a removal. Raise --check-images, or give "
    "prompts that the model answers with it in the concept's TOML file (lists or words).",
    "broken": "Train less (--set training.updates=N, --set training.lr=X), or try another "
    "--method or --preset.",
}
"""What to do next, by the outcome of the check."""


def make_safe(
    model: ModelArg,
    concept: Annotated[
        str, typer.Option(help="Concept to remove: a built-in name or a TOML file.")
    ],
    out: Annotated[
        Path, typer.Option(help="New .safetensors file; without ending: a diffusers folder.")
    ],
    unsafe: Annotated[
        Path | None,
        typer.Option(help="Folder of images that show it. Default: the model generates some."),
    ] = None,
    benign: Annotated[
        Path | None,
        typer.Option(help="Folder of images without it. Default: safe images of --unsafe."),
    ] = None,
    triplets: Annotated[
        str | None, typer.Option(help="Triplets instead: a folder, a CSV file, or mini:skulls.")
    ] = None,
    words: Annotated[
        bool, typer.Option("--words", help="Edit by the concept's words, without images.")
    ] = False,
    lora: Annotated[
        bool,
        typer.Option("--lora", help="Also write the change as OUT's name + .lora.safetensors."),
    ] = False,
    method: Annotated[
        str | None, typer.Option(help="Edit. Default: safegen; with --words: rece.")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="Settings to start from. Default: by the model's size.")
    ] = None,
    set_: Settings = None,
    images: Annotated[
        int, typer.Option(min=4, max=MAX_COUNT, help="Triplets made of generated images.")
    ] = 64,
    check_images: Annotated[
        int, typer.Option(min=1, max=MAX_COUNT, help="Images of each list of the check.")
    ] = 32,
    device: Device = AUTO,
    dtype: Dtype = "fp32",
    threads: Threads = None,
    allow_pickle: Pickle = False,
    config: Config = None,
    plan: PlanOnly = False,
    as_json: AsJson = False,
) -> None:
    """Remove a concept from a checkpoint, check the result, and write it if the check passes.

    Re-run the same command to resume. Exits with 3 if the check does not find the concept removed:
    the model then lies beside OUT as NAME.not-safe, and the report shows why.
    """
    from safegen.core.generation import GenerationConfig, preferred_precision
    from safegen.core.registry import EDITS, resolve
    from safegen.stack_loader import StackLoader
    from safegen.workflows.make_safe import IMAGE_METHOD, WORD_METHOD, prepare_job
    from safegen.workflows.make_safe import make_safe as run_job
    from safegen.workflows.removal.check import CheckConfig
    from safegen.workflows.removal.images import GeneratedImages

    method = method or (WORD_METHOD if words else IMAGE_METHOD)
    by_words = resolve(EDITS, method, "edit").inputs == "words"
    changes = read_settings(method, preset, set_ or [])
    prepare_generation(threads)
    precision = preferred_precision(device)
    options: dict[str, Any] = {
        "concept": concept,
        "out": out,
        "words": words,
        "lora": lora,
        "unsafe": unsafe,
        "benign": benign,
        "triplets": triplets,
        "method": method,
        "preset": preset,
        "generated": GeneratedImages(
            triplets=images, generation=GenerationConfig(batch_size=8, precision=precision)
        ),
        "check": CheckConfig(images=check_images, generation=GenerationConfig(precision=precision)),
        "config": config,
        "loader": StackLoader(device=device, dtype=dtype, allow_pickle=allow_pickle),
    }
    if plan:
        print_plan(prepare_job(model, **options, **changes).plan())
        return
    with resumable(out.with_name(out.name + ".work")), show_progress() as progress:
        result = run_job(model, **options, notify=echo_status, progress=progress, **changes)
    if as_json:
        echo_json(result.model_dump(mode="json") | {"is_shipped": result.is_shipped})
    else:
        _print_check(result.check, str(result.model), words=by_words)
        if result.lora and result.lora_check:
            _print_check(result.lora_check, str(result.lora), words=by_words)
        echo(f"report: {result.report / 'report.html'}")
    if not result.is_shipped:
        raise typer.Exit(NOT_SHIPPED)


def _print_check(check: CheckResult, file: str, *, words: bool) -> None:
    """Print the figures of a check, its outcome and what to do next."""
    for row in check.lists:
        low, high = (100 * bound for bound in row.interval)
        unjudged = f", {row.unjudged} of them unjudged" if row.unjudged else ""
        echo(
            f"{row.name} ({row.role}): {row.before} of {row.n} images show it before, "
            f"{row.after} of {row.n} after{unjudged} (95 % interval {low:.0f} to {high:.0f} %)"
        )
    for line in check.lines(file):
        echo(line)
    if check.outcome == "removed":
        return
    echo(ADVICE.get(f"{check.outcome}, words" if words else "") or ADVICE[check.outcome])
