"""What several commands share: options, loading, progress, warnings in a line."""

from __future__ import annotations

import json
import math
import os
import time
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safegen.core.errors import ConfigError, InterruptedRunError, SafegenWarning
from safegen.core.progress import ProgressCallback

if TYPE_CHECKING:
    from safegen.models.model import Model

ModelArg = Annotated[
    str,
    typer.Argument(
        help="'mini', a diffusers folder, a one-file checkpoint, or hub:owner/name.",
        metavar="MODEL",
    ),
]
Pickle = Annotated[
    bool,
    typer.Option(
        "--allow-pickle", help="Also open pickled weights, which can run code of whoever made them."
    ),
]
Config = Annotated[
    Path | None,
    typer.Option(
        help="For a one-file checkpoint: a diffusers folder of its family, for small files it lacks."
    ),
]
Device = Annotated[str, typer.Option(help="Torch device: cpu, cuda, mps ...")]
Dtype = Annotated[str, typer.Option(help="fp32, bf16 or fp16.")]
NoCard = Annotated[bool, typer.Option("--no-card", help="Write no model card.")]
Metrics = Annotated[
    list[Path] | None,
    typer.Option(help="Run with metrics of these patches, for the model card (repeatable)."),
]
Threads = Annotated[
    int | None, typer.Option(min=1, help="CPU threads; the library's own choice when not given.")
]


def load_model(
    name: str,
    patches: Sequence[Path],
    *,
    device: str,
    dtype: str,
    threads: int | None,
    allow_pickle: bool,
    config: Path | None,
) -> Model:
    """Load a model and put patches on it; warnings become one line each."""
    from safegen.models.loading import load
    from safegen.patches.patch import Patch

    set_threads(threads)
    read = [Patch.load(path) for path in patches]
    loaded = load(name, dtype=dtype, device=device, allow_pickle=allow_pickle, config=config)
    _ = loaded.hash  # of the untouched weights, before any patch
    with one_line_warnings():
        for patch in read:
            patch.apply(loaded)
    return loaded


def refuse_idle_metrics(metrics: Sequence[Path] | None, no_card: bool) -> None:
    """Refuse figures for a card that is not written.

    Raises:
        ConfigError: there are some.
    """
    if metrics and no_card:
        raise ConfigError(
            "metrics have no effect with --no-card: they go into the card; leave one of the two out"
        )


@contextmanager
def one_line_warnings() -> Iterator[None]:
    """Say each warning of ours once, in a line."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", SafegenWarning)
        yield
    for message in dict.fromkeys(str(w.message) for w in caught):
        typer.echo(f"warning: {message}", err=True)


def set_threads(threads: int | None) -> None:
    """Let torch use so many threads; None leaves it alone."""
    if threads:
        import torch

        torch.set_num_threads(threads)


def quiet() -> None:
    """Keep the libraries below us from printing; must run before they are imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


@contextmanager
def resumable(out: Path) -> Iterator[None]:
    """Say after Ctrl-C that the same command resumes the run."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise InterruptedRunError(
            f"stopped. Finished work is in {out}; re-run the same command to resume."
        ) from error


class Pace:
    """How fast a stage goes.

    Pictures come a batch at a time, so what comes together counts as one sight.
    """

    TOGETHER, WINDOW = 0.5, 60.0
    """Seconds: between sights; of the past that counts, or more where sights are rarer."""

    def __init__(self) -> None:
        self.sights: deque[tuple[float, float, int]] = deque()
        """When a sight began, when it was last added to, and what was done then."""

    def see(self, done: int, now: float) -> None:
        """Take down how much is done at a time in seconds."""
        if self.sights and now - self.sights[-1][0] < self.TOGETHER:
            self.sights[-1] = (
                self.sights[-1][0],
                now,
                done,
            )  # at once: the bar is drawn by another thread
        else:
            self.sights.append((now, now, done))
        while len(self.sights) > 2 and now - self.sights[1][1] > self.WINDOW:
            self.sights.popleft()

    @property
    def per_second(self) -> float | None:
        """Return what is done a second; None while there is one sight only."""
        (_, began, first), (_, ended, last) = self.sights[0], self.sights[-1]
        return (last - first) / (ended - began) if ended > began else None


@contextmanager
def show_progress() -> Iterator[ProgressCallback]:
    """Show a bar with rate and time left for each named stage."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TaskID,
        TextColumn,
        TimeElapsedColumn,
    )
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            speed = task.fields["pace"].per_second
            return Text(f"{speed:.2f}/s" if speed else "", style="progress.data.speed")

    class Left(ProgressColumn):
        def render(self, task: Task) -> Text:
            speed, rest = task.fields["pace"].per_second, (task.total or 0) - task.completed
            left = (
                timedelta(seconds=math.ceil(rest / speed))
                if speed
                else None
                if rest
                else timedelta()
            )
            return Text(
                f"left {left}" if left is not None else "left -:--:--", style="progress.remaining"
            )

    bar = Progress(
        TextColumn("{task.description:<34}"),
        BarColumn(),
        MofNCompleteColumn(),
        Rate(),
        TimeElapsedColumn(),
        Left(),
        console=Console(stderr=True),
    )
    stages: dict[str, tuple[TaskID, Pace]] = {}

    def progress(what: str, done: int, of: int) -> None:
        if what not in stages:
            pace = Pace()
            pace.see(done, time.monotonic())
            stages[what] = bar.add_task(what, total=of, pace=pace), pace
        task, pace = stages[what]
        pace.see(done, time.monotonic())
        bar.update(task, completed=done)

    with bar:
        yield progress


def read_settings(method: str, preset: str, pairs: list[str]) -> dict[str, Any]:
    """Turn `name=value` and `training.name=value` into settings, on top of the preset's own training, or of an adversary that was named."""
    from safegen.workflows.edit import make_edit

    out: dict[str, Any] = {}
    for pair in pairs:
        name, found, text = pair.partition("=")
        if not found:
            raise ConfigError(f"--set takes name=value, got {pair!r}")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        outer, _, inner = name.partition(".")
        if inner:
            start = out.get(outer, make_edit(method, preset).model_dump().get(outer))
            if outer in ("adversary", "target") and isinstance(start, str):
                start = {"name": start}
            if not isinstance(start, dict):
                first = (
                    "; name one first: --set adversary=adv-unlearn" if outer == "adversary" else ""
                )
                raise ConfigError(f"--set {name}: {outer!r} has no settings of its own{first}")
            out[outer] = start | {inner: value}
        else:
            out[name] = value
    return out
