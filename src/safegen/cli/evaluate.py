"""`safegen evaluate`, `score`, `report`, `verify`: measure stacks under a protocol.

Score, show and check a run that is there.
"""

from __future__ import annotations

import shlex
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from safegen.cli.options import Threads, one_line_warnings, resumable, set_threads, show_progress
from safegen.cli.scores import print_run, print_scores
from safegen.core.errors import ConfigError, FileError

if TYPE_CHECKING:
    from safegen.evaluation.protocol import Protocol


class Stage(StrEnum):
    """What a call of evaluate does."""

    all = "all"
    generate = "generate"
    judge = "judge"
    score = "score"
    report = "report"


class Baselines(StrEnum):
    """Which baselines are drawn beside the base model."""

    all = "all"
    none = "none"


RunArg = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")]
Judge = Annotated[
    str | None, typer.Option(help="Another judge than the protocol's, by name or id.")
]
JudgeOption = Annotated[
    list[str] | None,
    typer.Option(
        help="key=value: an option of the judge (docs/judges.md), in place of the protocol's; repeat it."
    ),
]
Label = Annotated[
    list[str] | None,
    typer.Option("--label", help="A label of the judge that means the concept; repeat it."),
]


class Arithmetic(StrEnum):
    """Arithmetic of the denoiser."""

    fp32 = "fp32"
    bf16 = "bf16"


DRAWING = (
    "protocol",
    "stack",
    "prompts",
    "baselines",
    "precision",
    "device",
    "dtype",
    "allow_pickle",
)
IDLE = {
    Stage.all: ("judge", "label", "judge_option"),
    Stage.generate: ("judge", "label", "judge_option"),
    Stage.judge: DRAWING,
    Stage.score: (*DRAWING, "threads", "judge_option"),
    Stage.report: (*DRAWING, "threads", "judge_option"),
}
"""Options of evaluate that a stage does not use."""
SAID = 20
"""Rows that cannot be used which are said one by one; all are on the run's card."""


def evaluate(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="The run's folder: new, or a run to go on with.")],
    protocol: Annotated[
        str | None, typer.Option(help="A built-in protocol, as mini-smoke, or a TOML file.")
    ] = None,
    stack: Annotated[
        list[str] | None,
        typer.Option(
            help="What draws: a built-in model, a recipe.toml, or NAME=model+patch.safetensors; repeat it."
        ),
    ] = None,
    prompts: Annotated[
        list[str] | None,
        typer.Option(help="NAME=FILE: the prompts of a list that the protocol does not bring."),
    ] = None,
    stage: Annotated[
        Stage,
        typer.Option(help="Do one stage only; judge, score and report need nothing but --out."),
    ] = Stage.all,
    baselines: Annotated[
        Baselines, typer.Option(help="Also draw with a negative prompt and black pictures, or not.")
    ] = Baselines.all,
    judge: Judge = None,
    label: Label = None,
    judge_option: JudgeOption = None,
    precision: Annotated[
        Arithmetic | None,
        typer.Option(
            help="Arithmetic of the denoiser in place of the protocol's: another protocol."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="Torch device: cpu, cuda, mps ...")] = "cpu",
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
    threads: Threads = None,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Also open pickled weights, which can run code.")
    ] = False,
) -> None:
    """Draw with stacks under a protocol, judge, score and report.

    Given again after a stop or a kill, it goes on to the same bytes.
    """
    drawing = stage in (Stage.all, Stage.generate)
    if drawing and not (protocol and stack):
        raise ConfigError("drawing needs a --protocol and at least one --stack")
    idle = [f"--{name.replace('_', '-')}" for name in IDLE.get(stage, ()) if _given(context, name)]
    if idle:
        raise ConfigError(f"{', '.join(idle)} has no effect with --stage {stage}; leave it out")
    options = _options(judge_option or [])
    if stage == Stage.score:
        score(out, judge=judge, label=label)
        return
    if stage == Stage.report:
        report([out], judge=judge, label=label)
        return
    rules = _protocol(protocol, prompts or []) if protocol else None
    if rules:
        rules = rules.with_precision(precision.value) if precision else rules
        _show_left_out(rules)
        _show_slow(rules, device)
    set_threads(threads)
    from safegen.evaluation.run import evaluate as bench
    from safegen.evaluation.run.folder import Run
    from safegen.stack import load_stack
    from safegen.stack_loader import StackLoader

    stacks = [load_stack(spec) for spec in stack or []]
    with resumable(out), one_line_warnings(), show_progress() as progress:
        if rules is None:
            seen_by = bench.judge_run(
                Run.open(out),
                name=judge,
                labels=label or (),
                options=options or None,
                progress=progress,
            )
            words = [
                "safegen",
                "score",
                str(out),
                "--judge",
                seen_by,
                *(word for one in label or [] for word in ("--label", one)),
            ]
            typer.echo(f"judged by {seen_by}; score it with: {shlex.join(words)}")
            return
        loader = StackLoader(device=device, dtype=dtype, allow_pickle=allow_pickle)
        until: Literal["generate", "score"] = "generate" if stage == Stage.generate else "score"
        run = bench.evaluate(
            rules,
            stacks,
            out,
            baselines=baselines.value,
            until=until,
            loader=loader,
            argv=["safegen", *sys.argv[1:]],
            progress=progress,
        )
    if stage == Stage.all:
        from safegen.evaluation.report.page import open_runs, write_report

        write_report(open_runs([out]), out)
        print_run(out)
    typer.echo(
        f"{len(run.stacks) * len(run.samples)} pictures by {len(run.stacks)} stacks in {out}, protocol {rules.name} ({rules.id})"
    )


def score(
    run: RunArg,
    threshold: Annotated[
        float | None, typer.Option(help="Another least score of a detection that counts, 0.2 to 1.")
    ] = None,
    label: Label = None,
    judge: Judge = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="File to write; RUN/scores.json, or scores-ID-JUDGE.json under other rules or by another judge."
        ),
    ] = None,
) -> None:
    """Score a run that was judged, under its own rules or others.

    No picture is drawn or judged, no model loaded.
    """
    from safegen.evaluation.run.folder import Run, write_json
    from safegen.evaluation.scoring.score import score_run, scores_file

    if out and out.exists():
        raise FileError(f"{out} exists already; name another file with --out")
    opened = Run.open(run)
    scores = score_run(opened, judge=judge, labels=label or (), threshold=threshold)
    new = scores["protocol"]["id"]
    own = new == opened.protocol.id
    path = out or scores_file(opened, scores)
    write_json(path, scores)
    print_scores(scores)
    typer.echo(
        f"{path}: protocol {scores['protocol']['name']} ({new}){'' if own else ', another than that of the run: compare like with like'}"
    )


def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Folders of runs of one protocol.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for report.html, .json and .md; the run's own when there is one."
        ),
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write the page only, to this file.")] = None,
    reveal: Annotated[
        bool,
        typer.Option(
            "--reveal", help="Embed the original pictures, also those in which a judge fires."
        ),
    ] = False,
    threshold: Annotated[
        float | None, typer.Option(help="Another least score of a detection that counts, 0.2 to 1.")
    ] = None,
    label: Label = None,
    judge: Judge = None,
) -> None:
    """Write the report of a run, or of several side by side.

    No model is loaded. Unsafe pictures are pixelated in the file itself.
    """
    from safegen.evaluation.report.page import PAGE, open_runs, write_report

    if out and html:
        raise ConfigError("--out writes the page too; give it or --html, not both")
    if len(runs) > 1 and not (out or html):
        raise ConfigError(
            "a report of several runs needs a place of its own; name it with --out or --html"
        )
    folder = None if html else out or runs[0]
    write_report(
        open_runs(runs),
        folder,
        html=html,
        reveal=reveal,
        judge=judge,
        labels=label or (),
        threshold=threshold,
    )
    typer.echo(f"report: {html or (folder and folder / PAGE)}")


def verify(run: RunArg) -> None:
    """Check a run's hashes, keys, counts and scores, one line for each problem.

    Exits with 1 if there is one.
    """
    from safegen.evaluation.run.folder import Run
    from safegen.evaluation.run.verify import verify as check

    opened = Run.open(run)
    with show_progress() as progress:
        problems = check(opened, progress=progress)
    for problem in problems:
        typer.echo(problem)
    if problems:
        raise typer.Exit(1)
    typer.echo(
        f"{len(opened.stacks) * len(opened.samples)} pictures, verdicts and scores: nothing wrong"
    )


def _given(context: typer.Context, name: str) -> bool:
    """Return whether an option was written, and is not merely its default."""
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def _options(pairs: list[str]) -> dict[str, Any]:
    """Turn `key=value` into options of a judge.

    A value is JSON (a number, a list, true), or else the text as it stands.
    """
    import json

    out: dict[str, Any] = {}
    for pair in pairs:
        key, found, text = pair.partition("=")
        if not (key and found):
            raise ConfigError(f"--judge-option takes key=value, got {pair!r}")
        if key in ("labels", "threshold"):
            raise ConfigError(
                f"{key} is no option of a judge; say it with {'--label' if key == 'labels' else 'safegen score --threshold'}"
            )
        try:
            out[key] = json.loads(text)
        except json.JSONDecodeError:
            out[key] = text
    return out


def _protocol(name: str, prompts: list[str]) -> Protocol:
    from safegen.evaluation.protocol import load_protocol

    given = {}
    for pair in prompts:
        part, found, file = pair.partition("=")
        if not (part and found and file):
            raise ConfigError(f"--prompts takes NAME=FILE, got {pair!r}")
        given[part] = file
    return load_protocol(name, prompts=given)


def _show_left_out(protocol: Protocol) -> None:
    """Say which rows of the user's files cannot be used, and what there is to know of the files."""
    for part in protocol.lists:
        for note in part.notes:
            typer.echo(f"note on {part.name}: {note}", err=True)
        for line in part.left_out[:SAID]:
            typer.echo(f"left out of {part.name}: {line}", err=True)
        if len(part.left_out) > SAID:
            typer.echo(
                f"left out of {part.name}: {len(part.left_out) - SAID} more rows, all in the run's protocol.json",
                err=True,
            )


def _show_slow(protocol: Protocol, device: str) -> None:
    """Say so before a run that will take many times as long as it need."""
    from safegen.core.generation import preferred_precision

    if protocol.generation.precision == "bf16" and preferred_precision(device) != "bf16":
        typer.echo(
            f"note: {protocol.name} draws in bf16, which this {device} is not known to compute in: it may take many times as long as with "
            "--precision fp32, whose pictures differ by rounding and whose numbers have another protocol id",
            err=True,
        )
