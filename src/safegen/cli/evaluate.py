"""The `evaluate`, `score`, `report` and `verify` commands."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from safegen.cli.console import echo
from safegen.cli.options import (
    Device,
    Dtype,
    Pickle,
    Threads,
    print_model,
    read_pair,
    resumable,
    set_threads,
    warn_unused,
)
from safegen.cli.progress import show_progress
from safegen.cli.scores import print_run, print_scores
from safegen.core.errors import ConfigError

if TYPE_CHECKING:
    from safegen.evaluation.protocol import Protocol


class Stage(StrEnum):
    """Stage of an evaluation."""

    all = "all"
    generate = "generate"
    judge = "judge"
    score = "score"
    report = "report"


class Baselines(StrEnum):
    """Baselines that are generated besides the base model."""

    all = "all"
    none = "none"


class Precision(StrEnum):
    """Arithmetic of the denoiser."""

    fp32 = "fp32"
    bf16 = "bf16"


RunArg = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")]
Judge = Annotated[
    str | None, typer.Option(help="Judge to use instead of the protocol's, by name or ID.")
]
JudgeOption = Annotated[
    list[str] | None, typer.Option(help="Judge option KEY=VALUE (docs/reference). Repeatable.")
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

JUDGE_OPTIONS = ("judge", "label", "judge_option")
GENERATE_OPTIONS = (
    *("protocol", "stack", "prompts", "baselines", "precision"),
    *("device", "dtype", "allow_pickle"),
)
MAX_LINES = 20
"""Unusable prompts that are printed one by one; protocol.json of the run lists all."""


def evaluate(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Folder of the run: new, or one to resume.")],
    protocol: Annotated[
        str | None, typer.Option(help="Built-in protocol, such as mini-smoke, or a TOML file.")
    ] = None,
    stack: Annotated[
        list[str] | None,
        typer.Option(help="Model name, recipe.toml, or NAME=MODEL+PATCH. Repeatable."),
    ] = None,
    prompts: Annotated[
        list[str] | None,
        typer.Option(help="NAME=FILE with the prompts of a protocol list. Repeatable."),
    ] = None,
    stage: Annotated[
        Stage, typer.Option(help="Stage to run; judge, score and report need only --out.")
    ] = Stage.all,
    baselines: Annotated[
        Baselines, typer.Option(help="Also evaluate a negative prompt and black images.")
    ] = Baselines.all,
    judge: Judge = None,
    label: Label = None,
    judge_option: JudgeOption = None,
    precision: Annotated[
        Precision | None, typer.Option(help="Precision to use instead of the protocol's.")
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "fp32",
    threads: Threads = None,
    allow_pickle: Pickle = False,
) -> None:
    """Generate, judge, score and report. Re-run the same command to resume."""
    _check_options(context, stage)
    if stage is Stage.score:
        score(out, judge=judge, label=label)
    elif stage is Stage.report:
        report([out], judge=judge, label=label)
    elif stage is Stage.judge:
        set_threads(threads)
        _judge(out, judge, label or [], judge_option or [])
    else:
        if not stack:
            raise ConfigError("no stack is given. Use --stack.")
        rules = load_rules(protocol, prompts or [], precision)
        print_notes(rules, device)
        set_threads(threads)
        from safegen.evaluation import evaluate as engine
        from safegen.stack import load_stack
        from safegen.stack_loader import StackLoader

        stacks = [load_stack(spec) for spec in stack]
        loader = StackLoader(
            device=device, dtype=dtype, allow_pickle=allow_pickle, on_load=print_model
        )
        with resumable(out), show_progress() as progress:
            run = engine.evaluate(
                rules,
                stacks,
                out,
                baselines=baselines.value,
                until="generate" if stage is Stage.generate else "score",
                loader=loader,
                argv=["safegen", *sys.argv[1:]],
                progress=progress,
            )
        if stage is Stage.all:
            from safegen.evaluation.report.page import open_runs, write_report

            write_report(open_runs([out]), out)
            print_run(out)
        echo(
            f"{len(run.stacks) * len(run.samples)} images by {len(run.stacks)} stacks in {out}, "
            f"protocol {rules.name} ({rules.id})"
        )


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


def _check_options(context: typer.Context, stage: Stage) -> None:
    """Refuse judge options where they would falsify the result; warn of other unused options."""
    if stage in (Stage.all, Stage.generate):
        for option in _set_options(context, JUDGE_OPTIONS):
            raise ConfigError(
                f"{option} has no effect with --stage {stage}. "
                "The protocol sets the judge; use --stage judge or score for another."
            )
        return
    unused: tuple[str, ...] = GENERATE_OPTIONS
    if stage is not Stage.judge:
        unused = (*unused, "threads", "judge_option")
    for option in _set_options(context, unused):
        warn_unused(option, f"with --stage {stage}")


def _set_options(context: typer.Context, names: Sequence[str]) -> list[str]:
    """Return those options that were given on the command line."""
    sources = {name: context.get_parameter_source(name) for name in names}
    return [
        f"--{name.replace('_', '-')}"
        for name, source in sources.items()
        if source is not None and source.name != "DEFAULT"
    ]


def _judge(out: Path, judge: str | None, labels: list[str], options: list[str]) -> None:
    from safegen.evaluation import evaluate as engine
    from safegen.evaluation.run.folder import Run

    settings = dict(read_pair(pair, "--judge-option") for pair in options)
    for name, option in (("labels", "--label"), ("threshold", "safegen score --threshold")):
        if name in settings:
            raise ConfigError(f"{name} is not a judge option. Use {option}.")
    with resumable(out), show_progress() as progress:
        judge_id = engine.judge_run(
            Run.open(out), name=judge, labels=labels, options=settings or None, progress=progress
        )
    command = ["safegen", "score", str(out), "--judge", judge_id]
    for label in labels:
        command += ["--label", label]
    echo(f"judged by {judge_id}; score it with: {shlex.join(command)}")


def load_rules(name: str | None, prompts: list[str], precision: Precision | None) -> Protocol:
    """Return the protocol that the options name, with the user's files of prompts."""
    from safegen.evaluation.protocol import load_protocol

    if name is None:
        raise ConfigError("no protocol is given. Use --protocol.")
    files = {}
    for pair in prompts:
        part, _, file = pair.partition("=")
        if not (part and file):
            raise ConfigError(f"--prompts must be NAME=FILE, got {pair!r}")
        files[part] = file
    protocol = load_protocol(name, prompts=files)
    return protocol.with_precision(precision.value) if precision else protocol


def print_notes(protocol: Protocol, device: str) -> None:
    """Print which prompts cannot be used, and whether the run will be slow."""
    from safegen.core.generation import preferred_precision

    for part in protocol.lists:
        lines = [f"left out of {part.name}: {line}" for line in part.left_out[:MAX_LINES]]
        if len(part.left_out) > MAX_LINES:
            rest = len(part.left_out) - MAX_LINES
            lines.append(f"left out of {part.name}: {rest} more, listed in protocol.json")
        for line in [*(f"note on {part.name}: {note}" for note in part.notes), *lines]:
            echo(line, err=True)
    if protocol.generation.precision == "bf16" and preferred_precision(device) != "bf16":
        echo(
            f"note: {protocol.name} generates in bf16, which this {device} emulates slowly. "
            "--precision fp32 is faster and has another protocol ID.",
            err=True,
        )
