"""The `evaluate` command."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from safegen.cli.console import echo, echo_status, plural
from safegen.cli.measure.report import Judge, Label, report, score
from safegen.cli.options import (
    MERGE,
    Device,
    Dtype,
    Pickle,
    PlanOnly,
    ShardText,
    Threads,
    print_model,
    print_plan,
    read_pair,
    read_shard,
    resumable,
    set_threads,
    warn_unused,
)
from safegen.cli.progress import show_progress
from safegen.cli.scores import print_run
from safegen.core.errors import ConfigError
from safegen.core.settings import MAX_COUNT, MAX_SEEDS, MAX_STEPS

if TYPE_CHECKING:
    from safegen.evaluation.protocol import Protocol


class EvaluationStage(StrEnum):
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


JudgeOption = Annotated[
    list[str] | None, typer.Option(help="Judge option KEY=VALUE (docs/reference). Repeatable.")
]

GENERATE_OPTIONS = (
    *("model", "base", "protocol", "stack", "prompts", "column", "concept", "seeds", "limit"),
    *("steps", "guidance", "baselines", "precision", "shard", "device", "dtype", "allow_pickle"),
)
"""Options without effect on a run that is generated."""
MAX_LINES = 20
"""Unusable prompts that are printed one by one; protocol.json of the run lists all."""


def evaluate(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Folder of the run: new, or one to resume.")],
    model: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL]", help="Base model that the stacks are compared with."),
    ] = None,
    base: Annotated[str | None, typer.Option(help="The same as MODEL.")] = None,
    stack: Annotated[
        list[str] | None,
        typer.Option(help="Model, recipe.toml, or NAME=MODEL[+PATCH]. Repeatable."),
    ] = None,
    concept: Annotated[
        str | None, typer.Option(help="Concept to measure: a name or a TOML file.")
    ] = None,
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            help="FILE, or ROLE=FILE (explicit, innocent, attack, neighbour, other, benign). "
            "With --protocol: NAME=FILE. Repeatable."
        ),
    ] = None,
    column: Annotated[str | None, typer.Option(help="Column with the prompts.")] = None,
    seeds: Annotated[
        str | None, typer.Option(help="Seeds of each prompt: 1 to N; or rows. [default: 1]")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, max=MAX_COUNT, help="First prompts of each list to use.")
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(min=1, max=MAX_STEPS, help="Denoising steps. [default: 50; mini: 25]"),
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(min=1, max=50, help="Guidance scale. [default: 7.5; mini: 5]")
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option(help="Built-in protocol or a TOML file, in place of all options above it."),
    ] = None,
    stage: Annotated[
        EvaluationStage, typer.Option(help="Stage to run; judge, score and report need only --out.")
    ] = EvaluationStage.all,
    baselines: Annotated[
        Baselines, typer.Option(help="Also evaluate a negative prompt and black images.")
    ] = Baselines.all,
    judge: Judge = None,
    label: Label = None,
    judge_option: JudgeOption = None,
    precision: Annotated[
        Precision | None, typer.Option(help="Arithmetic of the denoiser. Default: the protocol's.")
    ] = None,
    shard: ShardText = None,
    plan: PlanOnly = False,
    device: Device = "auto",
    dtype: Dtype = "fp32",
    threads: Threads = None,
    allow_pickle: Pickle = False,
) -> None:
    """Generate, judge, score and report. Re-run the same command to resume."""
    if stage not in (EvaluationStage.all, EvaluationStage.generate):
        _check_options(context, stage)
        _run_later_stage(stage, out, judge, label or [], judge_option or [], threads)
        return
    if model and base:
        raise ConfigError(f"MODEL and --base must not both be given, got {model!r} and {base!r}")
    if not (model or base or stack):
        raise ConfigError("no model and no stack is given. Name a MODEL, or use --stack.")
    part = read_shard(shard)
    set_threads(threads)
    from safegen.stack_loader import StackLoader
    from safegen.workflows.evaluate import evaluate as run_evaluation
    from safegen.workflows.evaluate import prepare_evaluation

    loader = StackLoader(device=device, dtype=dtype, allow_pickle=allow_pickle, on_load=print_model)
    options: dict[str, Any] = {
        "concept": concept,
        "prompts": prompts or [],
        "column": column,
        "judge": judge,
        "labels": label or [],
        "judge_options": _read_judge_options(judge_option or []),
        "protocol": protocol,
        "seeds": _read_seeds(seeds),
        "limit": limit,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "precision": precision.value if precision else None,
        "loader": loader,
    }
    if plan:
        if shard:
            warn_unused("--shard", "with --plan, which is of the whole run")
        from safegen.workflows.plan import plan_evaluation

        made = prepare_evaluation(model or base, stack or [], **options)
        common: dict[str, Any] = {"base": made.base, "baselines": baselines.value}
        print_plan(plan_evaluation(made.protocol, made.stacks, loader=loader, **common))
        return
    with resumable(out), show_progress() as progress:
        run = run_evaluation(
            model or base,
            stack or [],
            out=out,
            baselines=baselines.value,
            until="generate" if stage is EvaluationStage.generate else "score",
            shard=part,
            argv=["safegen", *sys.argv[1:]],
            announce=lambda rules: print_protocol(rules, device),
            progress=progress,
            **options,
        )
    if part:
        from safegen.evaluation.shards import count_samples

        count = count_samples(run)
        note = "" if count else " (fewer batches than shards, so it is empty)"
        echo(f"shard {part}: {len(run.stacks) * count} images in {out}{note}. {MERGE}")
        return
    if stage is EvaluationStage.all:
        print_run(out)
    echo(
        f"{len(run.stacks) * len(run.samples)} images by {len(run.stacks)} stacks in {out}, "
        f"protocol {run.protocol.name} ({run.protocol.id})"
    )


def _run_later_stage(
    stage: EvaluationStage,
    out: Path,
    judge: str | None,
    labels: list[str],
    options: list[str],
    threads: int | None,
) -> None:
    """Judge, score or report a run that is generated."""
    if stage is EvaluationStage.score:
        score(out, judge=judge, label=labels)
    elif stage is EvaluationStage.report:
        report([out], judge=judge, label=labels)
    else:
        set_threads(threads)
        _judge(out, judge, labels, options)


def _read_seeds(text: str | None) -> int | Literal["rows"] | None:
    """Return the number of seeds, or `rows`."""
    if text is None:
        return None
    if text == "rows":
        return "rows"
    if not (text.isascii() and text.isdecimal() and 1 <= int(text[:9]) <= MAX_SEEDS):
        raise ConfigError(f"--seeds must be 1 to {MAX_SEEDS}, or rows, got {text!r}")
    return int(text)


def _read_judge_options(pairs: list[str]) -> dict[str, Any]:
    """Return the options of a judge from `NAME=VALUE` pairs."""
    settings = dict(read_pair(pair, "--judge-option") for pair in pairs)
    for name, option in (("labels", "--label"), ("threshold", "safegen score --threshold")):
        if name in settings:
            raise ConfigError(f"{name} is not a judge option. Use {option}.")
    return settings


def _check_options(context: typer.Context, stage: EvaluationStage) -> None:
    """Warn of options without effect on a run that is generated."""
    unused: tuple[str, ...] = GENERATE_OPTIONS
    if stage is not EvaluationStage.judge:
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

    settings = _read_judge_options(options)
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
    from safegen.evaluation.protocol_file import load_protocol

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


def print_protocol(protocol: Protocol, device: str) -> None:
    """Print the protocol of a run to stderr: its ID, its lists, and notes on its prompts."""
    config, seeds = protocol.generation, protocol.seeds
    count = (
        "the rows' seeds"
        if seeds == "rows"
        else f"{len(seeds)} seeds"
        if len(seeds) > 1
        else "1 seed"
    )
    echo_status(
        f"protocol {protocol.name} ({protocol.id}): {count}, {config.num_inference_steps} steps, "
        f"guidance {config.guidance_scale:g}, {config.precision}, judge {protocol.judge.name}"
    )
    for part in protocol.lists:
        echo_status(f"  {part.role}: {part.name}, {plural(part.prompts or 0, 'prompt')}")
    print_notes(protocol, device)


def print_notes(protocol: Protocol, device: str) -> None:
    """Print which prompts cannot be used, and whether the run will be slow."""
    from safegen.core.device import resolve_device
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
            f"note: {protocol.name} generates in bf16, which this {resolve_device(device)} "
            "emulates slowly. --precision fp32 is faster and has another protocol ID.",
            err=True,
        )
