"""The options `--quiet` and `--verbose`, which every command has."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any

import typer

from safegen.cli.console import VERBOSITY

Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print no progress: results, warnings and errors.")
]
Verbose = Annotated[
    bool,
    typer.Option("--verbose", "-v", help="Print tracebacks and warnings of other libraries too."),
]
OPTIONS = {"quiet": Quiet, "verbose": Verbose}


def add_output_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a command that also takes `--quiet` and `--verbose`, and sets them."""
    signature = inspect.signature(function, eval_str=True)

    @wraps(function)
    def command(*args: Any, quiet: bool, verbose: bool, **options: Any) -> Any:
        VERBOSITY.quiet, VERBOSITY.verbose = quiet, verbose
        if verbose:
            os.environ["TRANSFORMERS_VERBOSITY"] = os.environ["DIFFUSERS_VERBOSITY"] = "warning"
            warnings.simplefilter("default")
        return function(*args, **options)

    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=kind)
        for name, kind in OPTIONS.items()
    ]
    parameters = [*signature.parameters.values(), *added]
    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {one.name: one.annotation for one in parameters}
    return command


def reset_verbosity() -> None:
    """Forget what an earlier command of this process set."""
    VERBOSITY.quiet = VERBOSITY.verbose = VERBOSITY.silent = False
