"""What several commands share: options, loading, progress, warnings in a line."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from safegen.errors import BadSetting

if TYPE_CHECKING:
    from safegen.models import Model

ModelArg = Annotated[str, typer.Argument(help="'mini', a diffusers folder, a one-file checkpoint, or hub:owner/name.", metavar="MODEL")]
Pickle = Annotated[bool, typer.Option("--allow-pickle", help="Also open pickled weights, which can run code of whoever made them.")]
Config = Annotated[Path | None, typer.Option(help="For a one-file checkpoint: a diffusers folder of its family, for small files it lacks.")]
Device = Annotated[str, typer.Option(help="Torch device: cpu, cuda, mps ...")]
Dtype = Annotated[str, typer.Option(help="fp32, bf16 or fp16.")]
NoCard = Annotated[bool, typer.Option("--no-card", help="Write no model card.")]
Metrics = Annotated[
    list[Path] | None,
    typer.Option(help="Figures for the model card: folder of a demo, a run or a resilience test of these patches; repeat it."),
]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; the library's own choice when not given.")]


def load_model(
    name: str, patches: Sequence[Path], *, device: str, dtype: str, threads: int | None, allow_pickle: bool, config: Path | None
) -> Model:
    """Load a model and put patches on it; warnings become one line each."""
    from safegen.models import Patch, load

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
        BadSetting: there are some.
    """
    if metrics and no_card:
        raise BadSetting("metrics have no effect with --no-card: they go into the card; leave one of the two out")


@contextmanager
def one_line_warnings() -> Iterator[None]:
    """Say each warning of ours once, in a line."""
    from safegen.models.beside import BesideWarning
    from safegen.models.patch import OtherBase, Overwritten

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        for kind in (OtherBase, Overwritten, BesideWarning):
            warnings.simplefilter("always", kind)
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
def progress() -> Iterator[Callable[[str, int, int], None]]:
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
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text(f"{speed:.2f}/s" if speed else "", style="progress.data.speed")

    bar = Progress(
        TextColumn("{task.description:<34}"),
        BarColumn(),
        MofNCompleteColumn(),
        Rate(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    tasks: dict[str, TaskID] = {}

    def tell(what: str, done: int, of: int) -> None:
        if what not in tasks:
            tasks[what] = bar.add_task(what, total=of, completed=done)  # what is done already says nothing of the speed
        bar.update(tasks[what], completed=done)

    with bar:
        yield tell
