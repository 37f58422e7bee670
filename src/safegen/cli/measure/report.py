"""The `score`, `report`, `results` and `verify` commands, which read finished runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safegen.cli.console import echo, echo_json, echo_message, echo_status
from safegen.cli.options import AsJson
from safegen.cli.progress import show_progress
from safegen.cli.scores import print_scores
from safegen.core.errors import ConfigError

if TYPE_CHECKING:
    from safegen.evaluation.run.folder import Run

STDOUT = Path("-")
"""Path that means stdout."""
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
    as_json: AsJson = False,
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
    if as_json:
        echo_json(scores)
        return
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
    csv: Annotated[
        Path | None,
        typer.Option(help="CSV file: a row for each stack, list and metric; - for stdout."),
    ] = None,
    latex: Annotated[
        Path | None, typer.Option(help="LaTeX file: a booktabs table to paste; - for stdout.")
    ] = None,
    json: Annotated[
        Path | None, typer.Option(help="JSON file with the values of --csv; - for stdout.")
    ] = None,
    plots: Annotated[
        Path | None, typer.Option(help="Folder for plots as PNG and SVG. Needs the extra report.")
    ] = None,
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
    Runs of attacks are shown as attacks against stacks. With --csv, --latex, --json or --plots the
    page is written only if --out or --html is given too.
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
    tables = {"csv": csv, "latex": latex, "json": json, "plots": plots}
    has_tables = any(tables.values())
    if len(runs) > 1 and not (out or html or has_tables):
        raise ConfigError("a report of several runs needs --out or --html")
    sources = open_runs(runs)
    rules: dict[str, Any] = {"judge": judge, "labels": label or (), "threshold": threshold}
    rules["truth"] = load_truth(truth, sources.values()) if truth else None
    if has_tables:
        _write_tables(sources, tables, rules)
        if not (out or html):
            return
    folder = None if html else out or runs[0]
    language_model = None
    if perplexity:
        from safegen.features.perplexity import CausalPerplexity

        language_model = CausalPerplexity(perplexity)
    write_report(sources, folder, html=html, reveal=reveal, perplexity=language_model, **rules)
    line = f"report: {html or (folder and folder / PAGE)}"
    echo(line, err=STDOUT in tables.values())


def _write_tables(
    runs: Mapping[str, Run], paths: Mapping[str, Path | None], rules: Mapping[str, Any]
) -> None:
    """Write the results of runs as tables and plots; `-` is stdout, for one of them."""
    from safegen.core.files import atomic_write
    from safegen.evaluation.report.data import report_data
    from safegen.evaluation.results.latex import latex_table
    from safegen.evaluation.results.plots import write_plots
    from safegen.evaluation.results.rows import csv_table, json_table

    if sum(path == STDOUT for path in paths.values()) > 1:
        raise ConfigError("- must be given to one of --csv, --latex and --json, got it twice")
    data, _ = report_data(runs, **rules)
    texts: dict[str, Callable[[], str]] = {
        "csv": lambda: csv_table(data["scores"]),
        "latex": lambda: latex_table(data),
        "json": lambda: json_table(data["scores"]),
    }
    for name, make in texts.items():
        if (path := paths[name]) is None:
            continue
        if path == STDOUT:
            for line in make().splitlines():
                echo(line)
            continue
        with atomic_write(path, replace=True) as temporary:
            temporary.write_text(make(), encoding="utf-8")
        echo_status(f"{name}: {path}")
    if folder := paths["plots"]:
        files, missing = write_plots(data, folder)
        for path in files:
            echo_status(f"plot: {path}")
        for reason in missing:
            echo_message("warning", f"no plot {reason}")


def results(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Folders of runs of one protocol.")
    ],
    threshold: Threshold = None,
    label: Label = None,
    judge: Judge = None,
    as_json: AsJson = False,
) -> None:
    """Print the scores of one run, or of several runs of one protocol in one table.

    A base model that several runs have is printed once.
    """
    from safegen.evaluation.report.page import open_runs
    from safegen.evaluation.results.rows import join_runs, json_table
    from safegen.evaluation.scoring.score import score_run

    rules: dict[str, Any] = {"judge": judge, "labels": label or (), "threshold": threshold}
    scores = {name: score_run(run, **rules) for name, run in open_runs(runs).items()}
    if as_json:
        for line in json_table(scores).splitlines():
            echo(line)
        return
    print_scores(join_runs(scores))


def verify(run: RunArg, as_json: AsJson = False) -> None:
    """Check the hashes, counts and scores of a run. Exits with 1 if a check fails."""
    from safegen.evaluation.run.folder import Run
    from safegen.evaluation.verify import verify as find_problems

    source = Run.open(run)
    with show_progress() as progress:
        problems = find_problems(source, progress=progress)
    count = len(source.stacks) * len(source.samples)
    if as_json:
        echo_json({"images": count, "problems": problems})
    for problem in () if as_json else problems:
        echo(problem)
    if problems or as_json:
        raise typer.Exit(1 if problems else 0)
    echo(f"{count} images, verdicts and scores: no problems")
