"""The `evaluate` command."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from safegen.cli.console import echo
from safegen.cli.measure.protocol import Precision, print_protocol
from safegen.cli.measure.report import Judge, Label, report, score
from safegen.cli.options import (
    MERGE,
    Address,
    Device,
    Dtype,
    EngineName,
    EngineOption,
    Pickle,
    PlanOnly,
    ShardText,
    Threads,
    TrueCfg,
    Workers,
    make_engine,
    print_model,
    print_plan,
    read_pair,
    read_shard,
    resumable,
    warn_unused,
)
from safegen.cli.progress import show_progress
from safegen.cli.scores import print_run
from safegen.core.errors import ConfigError
from safegen.core.settings import MAX_COUNT, MAX_SEEDS, MAX_STEPS

if TYPE_CHECKING:
    from safegen.evaluation.engines.base import BatchEngine


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


JudgeOption = Annotated[
    list[str] | None, typer.Option(help="Judge option KEY=VALUE (docs/reference). Repeatable.")
]

GENERATE_OPTIONS = (
    *("model", "base", "protocol", "stack", "prompts", "column", "concept", "seeds", "limit"),
    *("steps", "guidance", "true_cfg", "baselines", "precision", "shard"),
    *("device", "dtype", "allow_pickle"),
)
"""Options without effect on a run that is generated."""


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
    true_cfg: TrueCfg = None,
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
    engine: EngineOption = EngineName.local,
    workers: Workers = None,
    address: Address = None,
    plan: PlanOnly = False,
    device: Device = "auto",
    dtype: Dtype = "fp32",
    threads: Threads = None,
    allow_pickle: Pickle = False,
) -> None:
    """Generate, judge, score and report. Re-run the same command to resume."""
    if stage not in (EvaluationStage.all, EvaluationStage.generate):
        _check_options(context, stage)
        runs_on = make_engine(engine, workers, address, threads) if stage == "judge" else None
        _run_later_stage(stage, out, judge, label or [], judge_option or [], runs_on)
        return
    if model and base:
        raise ConfigError(f"MODEL and --base must not both be given, got {model!r} and {base!r}")
    if not (model or base or stack):
        raise ConfigError("no model and no stack is given. Name a MODEL, or use --stack.")
    part = read_shard(shard)
    runs_on = make_engine(engine, workers, address, threads)
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
        "true_cfg_scale": true_cfg,
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
            engine=runs_on,
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
    engine: BatchEngine | None,
) -> None:
    """Judge, score or report a run that is generated."""
    if stage is EvaluationStage.score:
        score(out, judge=judge, label=labels)
    elif stage is EvaluationStage.report:
        report([out], judge=judge, label=labels)
    else:
        _judge(out, judge, labels, options, engine)


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
        unused = (*unused, "threads", "judge_option", "engine", "workers", "address")
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


def _judge(
    out: Path, judge: str | None, labels: list[str], options: list[str], engine: BatchEngine | None
) -> None:
    from safegen.evaluation.evaluate import judge_run
    from safegen.evaluation.run.folder import Run

    settings = _read_judge_options(options)
    run = Run.open(out)
    with resumable(out), show_progress() as progress:
        judge_id = judge_run(
            run,
            name=judge,
            labels=labels,
            options=settings or None,
            engine=engine,
            progress=progress,
        )
    if run.card.shard:
        echo(f"shard {run.card.shard} judged by {judge_id}. {MERGE}")
        return
    command = ["safegen", "score", str(out), "--judge", judge_id]
    for label in labels:
        command += ["--label", label]
    echo(f"judged by {judge_id}; score it with: {shlex.join(command)}")
