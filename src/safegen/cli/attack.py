"""`safegen resilience`: whether an edit lasts when the edited model is fine-tuned."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from safegen.cli.options import Config, Device, Dtype, ModelArg, Pickle, Threads, load_model
from safegen.cli.progress import show_progress
from safegen.core.errors import ConfigError, explain


class On(StrEnum):
    """Whose fine-tune it is."""

    benign = "benign"
    concept = "concept"


def resilience(
    model: ModelArg,
    out: Annotated[
        Path, typer.Option(help="New folder for all that is found; a stopped test's goes on.")
    ],
    patch: Annotated[
        list[Path], typer.Option(help="The edit: a patch of MODEL; may be given more than once.")
    ],
    concept: Annotated[
        str, typer.Option(help="Concept that was removed: a built-in one or a TOML file.")
    ],
    on: Annotated[
        On, typer.Option(help="Fine-tune on harmless pictures, or on the concept's own.")
    ] = On.benign,
    updates: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            help="Look after so many updates of the fine-tune; may be given more than once; 200 unless told.",
        ),
    ] = None,
    triplets: Annotated[
        Path | None,
        typer.Option(
            help="Take the pictures from these triplets; the concept's bundled ones unless told."
        ),
    ] = None,
    pictures: Annotated[
        Path | None,
        typer.Option(
            help="Take pictures from this folder, each with its caption beside it (a.png, a.txt)."
        ),
    ] = None,
    apart: Annotated[
        bool,
        typer.Option(
            "--apart",
            help="Also fine-tune the untouched model: alone, and with the patch's change added to it.",
        ),
    ] = False,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the fine-tuned LoRA.")] = 16,
    lr: Annotated[float, typer.Option(help="Its learning rate.")] = 5e-4,
    batch: Annotated[int, typer.Option(min=1, help="Pictures in an update.")] = 8,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts of each list.")] = 24,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds for each prompt, 1 and following.")] = 1,
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Denoising steps of a picture.")] = 25,
    role: Annotated[
        list[str] | None,
        typer.Option(
            help="Lists to draw: explicit, innocent, neighbour, other, benign; repeat it."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Decides the fine-tune's draws.")] = 0,
    device: Device = "cpu",
    dtype: Dtype = "fp32",
    threads: Threads = None,
    allow_pickle: Pickle = False,
    config: Config = None,
) -> None:
    """Fine-tune an edited model and judge it again: does the edit last, or does the concept come back."""
    from pydantic import ValidationError

    from safegen.attacks.finetune import FineTune
    from safegen.attacks.kept import RESULTS, refuse_finished
    from safegen.attacks.relearn import Resilience, material_for
    from safegen.attacks.relearn import resilience as test
    from safegen.core.concept import load_concept
    from safegen.core.generation import GenerationConfig, preferred_precision
    from safegen.patches.patch import Patch

    refuse_finished(out)
    try:
        tuning = FineTune(
            updates=tuple(updates or (200,)), rank=rank, lr=lr, batch=batch, seed=seed
        )
        more: dict[str, Any] = {"roles": tuple(role)} if role else {}
        generation_config = GenerationConfig(
            num_inference_steps=steps, precision=preferred_precision(device)
        )
        settings = Resilience(
            on=on.value,
            finetune=tuning,
            apart=apart,
            prompts=prompts,
            seeds=tuple(range(1, seeds + 1)),
            generation=generation_config,
            **more,
        )
    except ValidationError as error:
        raise ConfigError(explain(error)) from error
    known, read = load_concept(concept), [Patch.load(path) for path in patch]
    material = material_for(known, on.value, triplets=triplets, pictures=pictures)
    loaded = load_model(model, device, dtype, threads, allow_pickle, config)
    with show_progress() as progress:
        found = test(loaded, read, known, material, settings, out=out, progress=progress)
    _show(found.summary())
    typer.echo(
        f"\n{out / RESULTS}: every figure with its n and interval; grid.png shows the pictures"
    )


def _show(summary: dict[str, Any]) -> None:
    """Print what is seen on each list, a row a side."""
    from rich.console import Console
    from rich.table import Table

    def rate(r: dict[str, Any] | None) -> str:
        return (
            f"{100 * r['value']:.0f} % ({100 * r['low']:.0f} to {100 * r['high']:.0f})" if r else ""
        )

    name, on = summary["concept"]["name"], summary["settings"]["on"]
    table = Table(
        title=f"{name} after fine-tuning on {summary['data']['pictures']} {on} pictures (95 %)",
        title_justify="left",
    )
    table.add_column(
        "model", no_wrap=True, min_width=max(map(len, summary["sides"]))
    )  # rich would cut names before it wraps figures
    for entry in summary["lists"].values():
        table.add_column(f"{entry['role']}\n{name} seen", overflow="fold")
        table.add_column("right object", overflow="fold")
    for side in summary["sides"]:
        rows = [entry["sides"][side] for entry in summary["lists"].values()]
        table.add_row(
            side, *(cell for row in rows for cell in (rate(row["concept"]), rate(row["subject"])))
        )
    Console().print(table)
    n = {entry["sides"]["base"]["concept"]["n"] for entry in summary["lists"].values()}
    typer.echo(f"n = {', '.join(map(str, sorted(n)))} pictures a list")
