"""The progress callback that long calls of the library take; the default shows nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")
ProgressCallback = Callable[[str, int, int], None]
"""Called with the description of a stage, the number of items done, and the total."""
StepCallback = Callable[[float], None]
"""Called after each denoising step with the part of the call that is done, from 0 to 1.

An exception that it raises stops the call.
"""


def no_progress(description: str, done: int, total: int) -> None:
    """Show nothing."""


def track(items: Sequence[T], description: str, progress: ProgressCallback) -> Iterator[T]:
    """Yield the items and report how many are done."""
    for done, item in enumerate(items):
        progress(description, done, len(items))
        yield item
    progress(description, len(items), len(items))
