"""`safegen triplets`: make them, check them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from safegen.cli.progress import show_progress
from safegen.core.errors import ConfigError
from safegen.data.triplets.censor import Censor, Style

app = typer.Typer(
    no_args_is_help=True,
    help="Make and check triplets: unsafe, censored and benign pictures to edit with.",
)

CENSOR = Censor()
HELP = {name: field.description for name, field in Censor.model_fields.items()}

Label = Annotated[
    list[str] | None,
    typer.Option(
        "--label",
        help="A label of the judge that means unsafe; repeat it. Default: all its own unsafe ones.",
    ),
]
Threshold = Annotated[
    float | None,
    typer.Option(help="Least score of a detection that counts. Default: the judge's own."),
]


@app.command()
def make(
    *,
    unsafe: Annotated[Path, typer.Option(help="Folder of unsafe pictures.")],
    judge: Annotated[str, typer.Option(help="Name of the judge that finds what to cover.")],
    out: Annotated[Path, typer.Option(help="Folder to write; it must not exist.")],
    benign: Annotated[
        Path | None,
        typer.Option(help="Folder of benign pictures. Default: the unsafe folder's safe ones."),
    ] = None,
    label: Label = None,
    threshold: Threshold = None,
    style: Annotated[Style, typer.Option(help=HELP["style"])] = CENSOR.style,
    tile: Annotated[float, typer.Option(help=HELP["tile"])] = CENSOR.tile,
    padding: Annotated[float, typer.Option(help=HELP["padding"])] = CENSOR.padding,
) -> None:
    """Censor unsafe pictures, pair them with benign ones and write a folder of triplets."""
    from safegen.data.triplets.make import make_triplets
    from safegen.judges import load_judge

    settings = Censor(style=style, tile=tile, padding=padding)
    eye = load_judge(judge, labels=label or (), threshold=threshold)
    with show_progress() as progress:
        result = make_triplets(
            unsafe,
            benign,
            eye,
            out,
            settings,
            labels=eye.labels,
            threshold=eye.threshold,
            progress=progress,
        )
    for problem in result.skipped:
        typer.echo(f"skipped {problem}")
    typer.echo(
        f"{len(result.triplets)} triplets in {out}, {len(result.skipped)} images skipped, hash {result.triplets.hash[:16]}"
    )


@app.command()
def check(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="DIR",
            help="Folder of triplets, or a .csv in the dialect of the published code.",
        ),
    ],
    judge: Annotated[
        str | None,
        typer.Option(help="Name of a judge that must find the censored and benign pictures safe."),
    ] = None,
    label: Label = None,
    threshold: Threshold = None,
) -> None:
    """List what is wrong with triplets, one line each; exits with 1 if anything is."""
    from safegen.data.triplets.check import check_triplets
    from safegen.data.triplets.triplets import Triplets
    from safegen.judges import load_judge

    if not judge and (label or threshold is not None):
        raise ConfigError(
            f"--label and --threshold have no effect without --judge, got {label or threshold}; name a judge"
        )
    problems = check_triplets(
        path, load_judge(judge, labels=label or (), threshold=threshold) if judge else None
    )
    for problem in problems:
        typer.echo(str(problem))
    if problems:
        raise typer.Exit(1)
    good = Triplets.load(path)
    looked = (
        "nothing wrong"
        if judge
        else "nothing wrong that shows without a judge (--judge looks whether the censored ones are safe)"
    )
    typer.echo(f"{len(good)} triplets, {looked}, hash {good.hash[:16]}")
