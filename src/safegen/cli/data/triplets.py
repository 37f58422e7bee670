"""The `triplets` commands: make, merge, check."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safegen.cli.console import echo, echo_json, plural
from safegen.cli.options import AsJson, ShardText, read_shard, warn_unused
from safegen.cli.progress import show_progress
from safegen.data.triplets.censor import Censor, Style

if TYPE_CHECKING:
    from safegen.data.triplets.make import MakeResult

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
    shard: ShardText = None,
    as_json: AsJson = False,
) -> None:
    """Censor unsafe images, pair them with benign images and write triplets."""
    config, part = Censor(style=style, tile=tile, padding=padding), read_shard(shard)
    from safegen.data.triplets.make import make_triplets
    from safegen.judges import load_judge

    loaded = load_judge(judge, labels=label or (), threshold=threshold)
    rules: dict[str, Any] = {"labels": loaded.labels, "threshold": loaded.threshold}
    if part:
        from safegen.data.triplets.shards import make_triplet_shard

        with show_progress() as progress:
            count = make_triplet_shard(
                unsafe, benign, loaded, out, part, config, progress=progress, **rules
            )
        if as_json:
            echo_json({"folder": str(out), "shard": str(part), "detections": count})
            return
        echo(
            f"shard {part}: {plural(count, 'image')} judged in {out}. "
            "Merge all shards: safegen triplets merge PART... --unsafe DIR --out DIR"
        )
        return
    with show_progress() as progress:
        result = make_triplets(unsafe, benign, loaded, out, config, progress=progress, **rules)
    _print_result(result, out, as_json)


@app.command()
def merge(
    parts: Annotated[list[Path], typer.Argument(metavar="PART...", help="Folders of all shards.")],
    unsafe: Annotated[Path, typer.Option(help="Folder of unsafe images that the shards judged.")],
    out: Annotated[Path, typer.Option(help="New folder for the triplets.")],
    benign: Annotated[
        Path | None, typer.Option(help="Folder of benign images, if the shards had one.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write the triplets that one process would have made, from the shards of `make --shard`."""
    from safegen.data.triplets.shards import merge_triplets

    with show_progress() as progress:
        result = merge_triplets(parts, unsafe, benign, out, progress=progress)
    _print_result(result, out, as_json)


def _print_result(result: MakeResult, out: Path, as_json: bool) -> None:
    """Print how many triplets were made, and which images were skipped."""
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
