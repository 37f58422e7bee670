"""Commands under torchrun: which are shared by its processes, and who prints."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from safegen.cli.console import VERBOSITY, echo_status
from safegen.core.processes import check_alone, launched_processes, leave_processes, shared_job

P = ParamSpec("P")
T = TypeVar("T")
SHARED = ("edit",)
"""Commands that processes share; those of other commands have a job each, as with --shard."""
ALONE = ("demo", "make_safe")
"""Commands with a training among their steps that processes cannot share."""


def with_processes(command: Callable[P, T]) -> Callable[P, T]:
    """Return a command that the processes of torchrun share, if it is one of those that can be.

    All end with the same status, and the first one prints.
    """
    name = command.__name__

    @wraps(command)
    def joint(*args: P.args, **kwargs: P.kwargs) -> T:
        rank, count = launched_processes()
        if count == 1 or name not in (*SHARED, *ALONE):
            return command(*args, **kwargs)
        VERBOSITY.silent = rank > 0
        if name in ALONE:
            check_alone(name.replace("_", "-"), "Start it without torchrun, or use `safegen edit`.")
        try:
            with shared_job():
                echo_status(f"{count} processes")
                return command(*args, **kwargs)
        finally:
            leave_processes()

    return joint
