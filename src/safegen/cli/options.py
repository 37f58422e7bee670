"""Options, checks and output that several commands share."""

from __future__ import annotations

import atexit
import json
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safegen.cli.console import echo, echo_message, echo_status
from safegen.core.documents import check_depth, check_plain, reason_of
from safegen.core.errors import (
    ConfigError,
    InterruptedRunError,
    SafegenWarning,
    UnusedSettingWarning,
)
from safegen.core.processes import launcher
from safegen.core.quiet import INDUCTOR_FOLDER, remove_inductor_folder
from safegen.core.settings import MAX_THREADS, MAX_WORKERS

if TYPE_CHECKING:
    from safegen.data.shards import Shard
    from safegen.evaluation.engines.ray import RayBatchEngine
    from safegen.models.model import Model
    from safegen.workflows.plan import Plan

ModelArg = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="mini, a diffusers folder, a single-file checkpoint, or hub:owner/name.",
    ),
]
Device = Annotated[
    str, typer.Option(help="Torch device: cpu, cuda, mps ... auto: an accelerator if there is one.")
]
Dtype = Annotated[str, typer.Option(help="Weight type: fp32, bf16 or fp16.")]
Threads = Annotated[
    int | None, typer.Option(min=1, max=MAX_THREADS, help="CPU threads. Default: chosen by torch.")
]
TrueCfg = Annotated[
    float | None,
    typer.Option(min=1, max=50, help="FLUX: scale of classifier-free guidance. [default: 1]"),
]
Pickle = Annotated[
    bool, typer.Option("--allow-pickle", help="Also load pickled weights, which can run code.")
]
Config = Annotated[
    Path | None, typer.Option(help="Diffusers folder with what a one-file checkpoint lacks.")
]
Patches = Annotated[
    list[Path] | None, typer.Option("--patch", help="Patch to apply to the model. Repeatable.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="Setting to change: NAME=VALUE, training.lr=1e-4. Repeatable."),
]
PlanOnly = Annotated[
    bool,
    typer.Option("--plan", help="Print images, passes, time and memory of the job; do nothing."),
]
ShardText = Annotated[
    str | None,
    typer.Option("--shard", metavar="I/N", help="Part of the job to do: 1/N to N/N. See `merge`."),
]
MERGE = "Merge all shards: safegen merge RUN... --out RUN"


class EngineName(StrEnum):
    """Where the batches of a job are done."""

    local = "local"
    ray = "ray"


EngineOption = Annotated[
    EngineName,
    typer.Option(help="Where batches are done: in this process, or in processes of Ray."),
]
Workers = Annotated[
    int | None,
    typer.Option(
        min=1, max=MAX_WORKERS, help="Processes of --engine ray. Default: GPUs, or CPUs but one."
    ),
]
Address = Annotated[
    str | None,
    typer.Option(help="Ray cluster of --engine ray. Default: one on this machine, for this job."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON value instead of text.")]
NoCard = Annotated[bool, typer.Option("--no-card", help="Do not write a model card.")]
Metrics = Annotated[
    list[Path] | None,
    typer.Option(help="Run with metrics of these patches, for the model card. Repeatable."),
]


def load_model(
    name: str,
    device: str,
    dtype: str,
    threads: int | None,
    allow_pickle: bool,
    config: Path | None,
    *,
    job: Callable[[Model], str] | None = None,
) -> Model:
    """Return the model that the shared options describe, and print one line about it to stderr.

    `job` returns what is done with the model, such as an edit and its preset, for that line.
    """
    from safegen.models.loading import load

    set_threads(threads)
    model = load(name, dtype=dtype, device=device, allow_pickle=allow_pickle, config=config)
    print_model(model, job(model) if job else "")
    return model


def print_model(model: Model, job: str = "") -> None:
    """Print what is done with a model, its size, device and type to stderr, in one line."""
    echo_status(f"{job}; {model.describe()}" if job else model.describe())


def check_outputs(ctx: typer.Context, out: Path, no_card: bool) -> None:
    """Claim a new file and its model card until the command ends; call it before long work."""
    from safegen.core.files import check_output, claim

    check_output(out)
    for path in [out] if no_card else [out, out.with_name(out.name + ".md")]:
        check_output(path)
        ctx.with_resource(claim(path))
        check_output(path)  # another process may have written it before the claim


def read_settings(method: str, preset: str | None, pairs: Iterable[str]) -> dict[str, Any]:
    """Return `NAME=VALUE` pairs as settings of an edit; a value is JSON or text.

    `GROUP.NAME=VALUE` changes one setting of the preset's group, such as `training.lr=1e-4`. None
    as preset is the default one: all groups but `training` are the same for every size of model.
    """
    from safegen.edits.training.presets import PRESET_NAMES
    from safegen.workflows.edit import make_edit

    settings: dict[str, Any] = {}
    for pair in pairs:
        name, value = read_pair(pair, "--set")
        group, _, setting = name.partition(".")
        if not setting:
            settings[name] = value
            continue
        values = settings.get(group)
        if values is None:
            values = make_edit(method, preset or PRESET_NAMES[0]).model_dump().get(group)
        if group == "training" and values is not None:  # `Edit.preset` adds those of the preset
            values = settings.get(group, {})
        if group in ("adversary", "algorithm", "target") and isinstance(values, str):
            values = {"name": values}
        if setting == "name":  # settings of another one do not fit
            values = {}
        if not isinstance(values, dict):
            hint = " Choose one first: --set adversary=adv-unlearn." if group == "adversary" else ""
            raise ConfigError(f"--set {name}: {group!r} has no settings of its own.{hint}")
        settings[group] = values | {setting: value}
    return settings


def read_pair(pair: str, option: str) -> tuple[str, Any]:
    """Return the name and the value, JSON or text, of `NAME=VALUE`."""
    name, equals, text = pair.partition("=")
    if not (name and equals):
        raise ConfigError(f"{option} must be NAME=VALUE, got {pair!r}")
    try:
        value = json.loads(text)
        check_depth(value)
        return name, check_plain(value)
    except json.JSONDecodeError:
        return name, text
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{option} {name[:80]}: {reason_of(error)}") from None


def read_shard(text: str | None) -> Shard | None:
    """Return the shard of `--shard`; None without one.

    Raises:
        ConfigError: the text is not `I/N`.
    """
    from safegen.data.shards import Shard

    return None if text is None else Shard.parse(text)


def make_engine(
    name: EngineName, workers: int | None, address: str | None, threads: int | None
) -> RayBatchEngine | None:
    """Return the engine that the options name; None for the local one, with its threads set.

    Raises:
        MissingExtraError: it needs a library that is not installed.
    """
    if name is EngineName.local:
        prepare_generation(threads)
        for option, value in (("--workers", workers), ("--address", address)):
            if value is not None:
                warn_unused(option, "with --engine local")
        return None
    from safegen.evaluation.engines.cluster import import_ray

    import_ray(is_local=address is None)  # before torch, so that a missing extra is said at once
    from safegen.evaluation.engines.ray import RayBatchEngine

    return RayBatchEngine(workers=workers, address=address, threads=threads or 1)


def print_plan(plan: Plan) -> None:
    """Print a plan."""
    for line in plan.lines():
        echo(line)


def warn_unused(option: str, reason: str) -> None:
    """Warn that an option has no effect."""
    warnings.warn(f"{option} has no effect {reason}", UnusedSettingWarning, stacklevel=2)


@contextmanager
def resumable(out: Path | None, *options: str) -> Iterator[None]:
    """Say after Ctrl-C which command resumes the run.

    Args:
        out: folder of what is finished; None if nothing can be resumed.
        options: options that resume a training from its checkpoint.
    """
    try:
        yield
    except (KeyboardInterrupt, InterruptedRunError) as error:
        if out is None or (options and isinstance(error, KeyboardInterrupt)):
            raise  # there is no checkpoint
        what = str(error).partition(". ")[0] or "stopped"
        added = [option for option in options if option not in sys.argv]
        command = shlex.join([*launcher(), *sys.argv[1:], *added])
        raise InterruptedRunError(
            f"{what}. Finished work is in {out}. Resume with: {command}"
        ) from error


def set_threads(threads: int | None) -> None:
    """Set the number of CPU threads of torch; None keeps its default."""
    if threads:
        import torch

        torch.set_num_threads(threads)


def prepare_generation(threads: int | None) -> None:
    """Set the number of CPU threads, and keep freed memory for the tensors of the next step."""
    from safegen.core.allocator import keep_freed_memory

    set_threads(threads)
    keep_freed_memory()


def silence_libraries() -> None:
    """Keep the libraries below from printing and from writing; call it before their import."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if INDUCTOR_FOLDER not in os.environ:
        atexit.register(remove_inductor_folder)


def show_warnings() -> None:
    """Print each warning of this package once, in one line; hide those of other libraries."""
    printed: set[str] = set()

    def show(message: Warning | str, *_: object, **__: object) -> None:
        text = " ".join(str(message).split())
        if text not in printed:
            printed.add(text)
            echo_message("warning", text)

    warnings.simplefilter("ignore")
    warnings.simplefilter("always", SafegenWarning)
    warnings.showwarning = show
