"""The `triplets` commands: make, check."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from safegen.cli.console import echo, echo_json, plural
from safegen.cli.options import AsJson, warn_unused
from safegen.cli.progress import show_progress
from safegen.data.triplets.censor import Censor, Style

app = typer.Typer(
    no_args_is_help=True, help="Make and check triplets of <unsafe, censored, benign> images."
)

CENSOR = Censor()
HELP = {name: field.description for name, field in Censor.model_fields.items()}

Label = Annotated[
    list[str] | None,
    typer.Option(
        "--label", help="Judge label that means unsafe. Repeatable. Default: all its unsafe labels."
    ),
]
Threshold = Annotated[
    float | None,
    typer.Option(
        min=0.2, max=1, help="Lowest score of a detection that counts. Default: the judge's."
    ),
]


@app.command()
def make(
    *,
    unsafe: Annotated[Path, typer.Option(help="Folder of unsafe images.")],
    judge: Annotated[str, typer.Option(help="Judge that finds what to censor.")],
    out: Annotated[Path, typer.Option(help="New folder for the triplets.")],
    benign: Annotated[
        Path | None, typer.Option(help="Folder of benign images. Default: safe images of --unsafe.")
    ] = None,
    label: Label = None,
    threshold: Threshold = None,
    style: Annotated[Style, typer.Option(help=HELP["style"])] = CENSOR.style,
    tile: Annotated[float, typer.Option(help=HELP["tile"])] = CENSOR.tile,
    padding: Annotated[float, typer.Option(help=HELP["padding"])] = CENSOR.padding,
    as_json: AsJson = False,
) -> None:
    """Censor unsafe images, pair them with benign images and write triplets."""
    config = Censor(style=style, tile=tile, padding=padding)
    from safegen.data.triplets.make import make_triplets
    from safegen.judges import load_judge

    loaded = load_judge(judge, labels=label or (), threshold=threshold)
    with show_progress() as progress:
        result = make_triplets(
            unsafe,
            benign,
            loaded,
            out,
            config,
            labels=loaded.labels,
            threshold=loaded.threshold,
            progress=progress,
        )
    if as_json:
        echo_json(
            {
                "folder": str(out),
                "triplets": len(result.triplets),
                "hash": result.triplets.hash,
                "skipped": list(map(str, result.skipped)),
            }
        )
        return
    for problem in result.skipped:
        echo(f"skipped {problem}")
    echo(
        f"{plural(len(result.triplets), 'triplet')} in {out}, "
        f"{plural(len(result.skipped), 'image')} skipped, "
        f"hash {result.triplets.hash[:16]}"
    )


@app.command()
def check(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="DIR", help="Folder of triplets, or a CSV file of the published code."
        ),
    ],
    judge: Annotated[
        str | None, typer.Option(help="Judge that must find the censored and benign images safe.")
    ] = None,
    label: Label = None,
    threshold: Threshold = None,
    as_json: AsJson = False,
) -> None:
    """List problems of triplets, one per line. Exits with 1 if there are any."""
    from safegen.data.triplets.check import check_triplets
    from safegen.data.triplets.triplets import Triplets
    from safegen.judges import load_judge

    if not judge and (label or threshold is not None):
        warn_unused("--label or --threshold", "without --judge")
    loaded = load_judge(judge, labels=label or (), threshold=threshold) if judge else None
    problems = check_triplets(path, loaded)
    if as_json:
        triplets = None if problems else Triplets.load(path)
        count, hash_ = (len(triplets), triplets.hash) if triplets else (None, None)
        echo_json({"triplets": count, "hash": hash_, "problems": list(map(str, problems))})
        raise typer.Exit(1 if problems else 0)
    for problem in problems:
        echo(str(problem))
    if problems:
        raise typer.Exit(1)
    triplets = Triplets.load(path)
    note = "" if judge else " (without --judge, censoring is not checked)"
    echo(f"{plural(len(triplets), 'triplet')}, no problems{note}, hash {triplets.hash[:16]}")
