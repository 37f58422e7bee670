"""The `score`, `report`, `results` and `verify` commands, which read finished runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from safegen.cli.console import echo
from safegen.cli.progress import show_progress
from safegen.cli.scores import print_scores
from safegen.core.errors import ConfigError

RunArg = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")]
Judge = Annotated[
    str | None,
    typer.Option(help="Judge to use instead of the concept's or the protocol's, by name or ID."),
]
Label = Annotated[
    list[str] | None,
    typer.Option("--label", help="Judge label that means the concept. Repeatable."),
]
Threshold = Annotated[
    float | None, typer.Option(min=0.2, max=1, help="Lowest score of a detection that counts.")
]
Truth = Annotated[
    Path | None,
    typer.Option(help="CSV of what a person saw in images: columns image and shows (true, false)."),
]


def score(
    run: RunArg,
    threshold: Threshold = None,
    label: Label = None,
    judge: Judge = None,
    truth: Truth = None,
    out: Annotated[
        Path | None, typer.Option(help="New JSON file. Default: a file in RUN, by rules and judge.")
    ] = None,
) -> None:
    """Score a judged run again, under its own rules or others.

    Nothing is generated or judged, and no model is loaded. The truth is stored in RUN, unless --out
    names a file; later scores and reports use it.
    """
    from safegen.core.files import check_output
    from safegen.evaluation.run.folder import TRUTH, Run, write_json
    from safegen.evaluation.run.truth import load_truth, write_truth
    from safegen.evaluation.scoring.score import score_run, scores_file

    if out:
        check_output(out)
    source = Run.open(run)
    known = load_truth(truth, [source]) if truth else None
    scores = score_run(source, judge=judge, labels=label or (), threshold=threshold, truth=known)
    if known and not out:
        write_truth(known, source.folder / TRUTH)
    path = out or scores_file(source, scores)
    write_json(path, scores)
    print_scores(scores)
    rules = scores["protocol"]
    differs = rules["id"] != source.protocol.id
    note = ". It differs from the run's protocol: compare like with like" if differs else ""
    echo(f"{path}: protocol {rules['name']} ({rules['id']}){note}")


def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Folders of runs of one protocol.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for report.html, .json and .md. Default: that of the run."),
    ] = None,
    html: Annotated[Path | None, typer.Option(help="HTML file; nothing else is written.")] = None,
    reveal: Annotated[
        bool, typer.Option("--reveal", help="Show the original images, unsafe ones too.")
    ] = False,
    threshold: Threshold = None,
    label: Label = None,
    judge: Judge = None,
    truth: Truth = None,
    truth_sheet: Annotated[
        Path | None,
        typer.Option(help="Write this unfilled CSV for a sample of the run's images; no report."),
    ] = None,
    perplexity: Annotated[
        Path | None,
        typer.Option(help="Folder of a causal language model, to measure the found texts."),
    ] = None,
) -> None:
    """Write the report of one run, or of several runs side by side.

    No model is loaded but that of --perplexity. Unsafe images are pixelated in the file itself.
    Runs of attacks are shown as attacks against stacks.
    """
    from safegen.evaluation.report.page import PAGE, open_runs, write_report
    from safegen.evaluation.run.truth import load_truth, write_truth_sheet

    if out and html:
        raise ConfigError("--out and --html exclude each other. --out writes the page too.")
    if truth_sheet:
        if len(runs) > 1:
            raise ConfigError("--truth-sheet needs one run")
        (run,) = open_runs(runs).values()
        echo(f"{truth_sheet}: {write_truth_sheet(run, truth_sheet)} images to look at")
        return
    if len(runs) > 1 and not (out or html):
        raise ConfigError("a report of several runs needs --out or --html")
    folder, sources = None if html else out or runs[0], open_runs(runs)
    language_model = None
    if perplexity:
        from safegen.features.perplexity import CausalPerplexity

        language_model = CausalPerplexity(perplexity)
    write_report(
        sources,
        folder,
        html=html,
        reveal=reveal,
        truth=load_truth(truth, sources.values()) if truth else None,
        perplexity=language_model,
        judge=judge,
        labels=label or (),
        threshold=threshold,
    )
    echo(f"report: {html or (folder and folder / PAGE)}")


def verify(run: RunArg) -> None:
    """Check the hashes, counts and scores of a run. Exits with 1 if a check fails."""
    from safegen.evaluation.run.folder import Run
    from safegen.evaluation.verify import verify as find_problems

    source = Run.open(run)
    with show_progress() as progress:
        problems = find_problems(source, progress=progress)
    for problem in problems:
        echo(problem)
    if problems:
        raise typer.Exit(1)
    count = len(source.stacks) * len(source.samples)
    echo(f"{count} images, verdicts and scores: no problems")
