"""Progress of the commands on stderr: a bar on a terminal, a line every ten seconds elsewhere."""

from __future__ import annotations

import math
import os
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Protocol

from safegen.cli.console import VERBOSITY, echo
from safegen.core.errors import SafegenError
from safegen.core.text import escape_control

SECONDS_BETWEEN_LINES = 10.0
"""Seconds between two lines of a stage, where stderr is no terminal."""
MAX_DESCRIPTION, MAX_BAR = 34, 40
"""Most columns of a stage's description and of its bar, on a wide terminal."""


class Pace:
    """Items per second of a stage, over the last minute.

    Images arrive in batches, so updates within half a second count as one.
    """

    SAME_UPDATE, WINDOW = 0.5, 60.0
    """Seconds within which updates count as one, and seconds of the past that count."""

    def __init__(self) -> None:
        self.updates: deque[tuple[float, float, int]] = deque()
        """Start and end of each update, and the number of items done then."""

    def update(self, done: int, now: float) -> None:
        """Record the number of items done at a time in seconds."""
        if self.updates and now - self.updates[-1][0] < self.SAME_UPDATE:
            # one assignment: another thread renders the bar
            self.updates[-1] = (self.updates[-1][0], now, done)
        else:
            self.updates.append((now, now, done))
        while len(self.updates) > 2 and now - self.updates[1][1] > self.WINDOW:
            self.updates.popleft()

    @property
    def per_second(self) -> float | None:
        """Items per second; None before the second update."""
        (_, began, first), (_, ended, last) = self.updates[0], self.updates[-1]
        return (last - first) / (ended - began) if ended > began else None

    def describe_rate(self) -> str:
        """Return the items per second, or nothing before the second update."""
        speed = self.per_second
        return f"{speed:.{0 if speed >= 100 else 2}f}/s" if speed else ""

    def describe_rest(self, rest: float) -> str:
        """Return the time that the rest of the items takes."""
        speed = self.per_second
        if rest and not speed:
            return "left -:--:--"
        return f"left {timedelta(seconds=math.ceil(rest / speed) if speed else 0)}"


class ProgressBar(Protocol):
    """A `ProgressCallback` that can also show a few figures beside the stage."""

    def __call__(self, description: str, done: int, total: int, figures: str = "", /) -> None:
        """Show how many items of a stage are done."""
        ...


@contextmanager
def show_progress() -> Iterator[ProgressBar]:
    """Yield a callback that shows each stage on stderr, with rate and time left.

    Stages are bars on a terminal and lines elsewhere; with `--quiet`, nothing is shown.
    """
    from rich.console import Console

    if VERBOSITY.quiet or VERBOSITY.silent:
        yield lambda *_: None
        return
    # rich knows which terminals cannot move the cursor
    shows_bars = Console(stderr=True).is_terminal and os.environ.get("TERM") != "dumb"
    with _bars() if shows_bars else _lines() as progress:
        yield progress


@contextmanager
def _lines() -> Iterator[ProgressBar]:
    """Yield a callback that prints the start and the end of a stage, and a line now and then."""
    stages: dict[str, StageLog] = {}

    def progress(description: str, done: int, total: int, figures: str = "", /) -> None:
        now = time.monotonic()
        stage = stages.get(description)
        if stage is None or done < stage.done:
            stage = stages[description] = StageLog(description)
        stage.update(done, total, figures, now)
        if stage.printed is None or done >= total or now - stage.at >= SECONDS_BETWEEN_LINES:
            stage.show(now)

    yield progress
    for stage in stages.values():  # where each stage ended, if it did not reach its total
        stage.show(time.monotonic())


class StageLog:
    """Progress of a stage, printed line by line."""

    def __init__(self, description: str) -> None:
        self.description, self.figures, self.pace = description, "", Pace()
        self.done = self.total = 0
        self.at = 0.0
        """Time of the last line."""
        self.printed: int | None = None
        """Number of items in the last line; None before the first."""

    def update(self, done: int, total: int, figures: str, now: float) -> None:
        """Record how many items are done."""
        self.done, self.total, self.figures = done, total, figures
        self.pace.update(done, now)

    def show(self, now: float) -> None:
        """Print how many items are done, unless the last line says so."""
        if self.printed == self.done:
            return
        self.printed, self.at = self.done, now
        parts = [self.description, f"{self.done}/{self.total}", self.pace.describe_rate()]
        parts += [self.pace.describe_rest(self.total - self.done), self.figures]
        try:
            echo("  ".join(filter(None, parts)), err=True)
            sys.stderr.flush()
        except (OSError, SafegenError, SystemExit):  # the reader is gone; the work goes on
            self.printed = sys.maxsize


@contextmanager
def _bars() -> Iterator[ProgressBar]:
    """Yield a callback that shows each stage as a bar of one line."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TaskID
    from rich.table import Column
    from rich.text import Text

    class StderrConsole(Console):
        def on_broken_pipe(self) -> None:
            """Go on without a bar; by default rich ends the process."""
            self.quiet = True

    class DescriptionColumn(ProgressColumn):
        def render(self, task: Task) -> Text:
            text = Text(task.description, no_wrap=True)
            text.truncate(width, overflow="ellipsis", pad=True)
            return text

    class RateColumn(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(task.fields["pace"].describe_rate(), style="progress.data.speed")

    class TimeLeftColumn(ProgressColumn):
        def render(self, task: Task) -> Text:
            rest = (task.total or 0) - task.completed
            return Text(task.fields["pace"].describe_rest(rest), style="progress.remaining")

    console = StderrConsole(stderr=True)
    width = max(10, min(MAX_DESCRIPTION, console.width - 48))
    bar_width = max(4, min(MAX_BAR, console.width - width - 42))
    one_line = Column(no_wrap=True)
    bar = Progress(
        DescriptionColumn(table_column=one_line),
        BarColumn(bar_width=bar_width),
        MofNCompleteColumn(table_column=one_line.copy()),
        RateColumn(table_column=one_line.copy()),
        TimeLeftColumn(table_column=one_line.copy()),
        console=console,
    )
    stages: dict[str, tuple[TaskID, Pace]] = {}

    def progress(description: str, done: int, total: int, figures: str = "", /) -> None:
        if not stages:
            bar.start()
        if description not in stages:
            pace = Pace()
            pace.update(done, time.monotonic())  # before the bar renders it
            stages[description] = (
                bar.add_task(escape_control(description), total=total, pace=pace),
                pace,
            )
        task, pace = stages[description]
        if done < bar.tasks[task].completed:  # the stage begins again, as for the next attack
            pace = Pace()
            pace.update(done, time.monotonic())
            stages[description] = (task, pace)
            bar.reset(task, total=total, completed=done, pace=pace)
        pace.update(done, time.monotonic())
        shown = f"{description}: {figures}" if figures else description
        bar.update(task, description=escape_control(shown), completed=done, total=total)

    try:
        yield progress
    finally:
        if stages:  # an empty bar would print a blank line
            bar.stop()
