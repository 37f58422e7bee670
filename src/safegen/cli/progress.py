"""The progress bar of the commands."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Protocol

from safegen.core.text import escape_control


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


class ProgressBar(Protocol):
    """A `ProgressCallback` that can also show a few figures beside the stage."""

    def __call__(self, description: str, done: int, total: int, figures: str = "", /) -> None:
        """Show how many items of a stage are done."""
        ...


@contextmanager
def show_progress() -> Iterator[ProgressBar]:
    """Yield a callback that shows each stage as a bar on stderr, with rate and time left."""
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

    class StderrConsole(Console):
        def on_broken_pipe(self) -> None:
            """Go on without a bar; by default rich ends the process."""
            self.quiet = True

    class RateColumn(ProgressColumn):
        def render(self, task: Task) -> Text:
            speed = task.fields["pace"].per_second
            return Text(f"{speed:.2f}/s" if speed else "", style="progress.data.speed")

    class TimeLeftColumn(ProgressColumn):
        def render(self, task: Task) -> Text:
            speed, rest = task.fields["pace"].per_second, (task.total or 0) - task.completed
            left = "-:--:--"
            if speed or not rest:
                left = str(timedelta(seconds=math.ceil(rest / speed) if speed else 0))
            return Text(f"left {left}", style="progress.remaining")

    bar = Progress(
        TextColumn("{task.description:<34}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        RateColumn(),
        TimeElapsedColumn(),
        TimeLeftColumn(),
        console=StderrConsole(stderr=True),
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
