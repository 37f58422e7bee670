"""Command line: parse the options, call the library, print the result.

Heavy imports happen inside the commands, so that --help is instant.
"""

from __future__ import annotations

import re
import signal
import sys
from typing import Any

import typer

from safegen.cli.console import (
    VERBOSITY,
    discard_output,
    echo_message,
    flush_output,
    open_streams,
    print_traceback,
)
from safegen.cli.main import app
from safegen.core.errors import (
    InterruptedRunError,
    SafegenError,
    UserError,
    explain,
    first_line,
    is_out_of_memory,
)
from safegen.core.processes import launched_processes

ClickException = typer.BadParameter.__mro__[2]
"""Base class of the usage errors; typer carries its own copy of click from version 0.26 on."""
EXIT_STATUSES = {UserError: 2, InterruptedRunError: 130, SafegenError: 1, OSError: 1}
"""Exit status by class of error, the first that fits."""

OUTPUT_OPTIONS = ("-q", "--quiet", "-v", "--verbose", "--json")
"""Options of the commands, not of `safegen`."""


def main() -> None:
    """Run a command; an error is one line without a traceback."""
    # raise an exception, so that temporary files are removed
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    open_streams()
    try:
        code = _run_command()
        flush_output()
    except SafegenError as error:
        echo_message("safegen", error)
        code = 1
    finally:
        discard_output()
    sys.exit(code)


def _run_command() -> int:
    """Run the command of `sys.argv` and return its exit status."""
    try:
        _check_arguments(sys.argv[1:])
        code = app(prog_name="safegen", standalone_mode=False)
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        sys.excepthook = print_traceback
        message, code = _explain(error)
        if isinstance(error, ClickException) and launched_processes()[0]:
            return code  # the first process of torchrun prints it
        if VERBOSITY.verbose:
            print_traceback(type(error), error, error.__traceback__)
        if message:
            echo_message("safegen", message)
        return code
    if code == 130:  # typer answers Ctrl-C with this status
        echo_message("safegen", "stopped")
    return code or 0


def _check_arguments(arguments: list[str]) -> None:
    """Raise if an argument is not text in the encoding of the locale.

    Raises:
        UserError: an argument has bytes that cannot be decoded.
    """
    for argument in arguments:
        if any("\ud800" <= char <= "\udfff" for char in argument):
            raise UserError(
                f"arguments must be text in the encoding {sys.getfilesystemencoding()}, "
                f"got {argument!r}. Correct it (rename a file), or set the locale: LC_ALL=C.UTF-8."
            )


def _explain(error: Exception) -> tuple[str, int]:
    """Return the message and the exit status of an expected error; raise any other."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{str(error.filename)!r} cannot be used: {error.strerror}", EXIT_STATUSES[OSError]
    for kind, code in EXIT_STATUSES.items():
        if isinstance(error, kind):
            return str(error), code
    if isinstance(error, ClickException):
        return _explain_usage(error)
    if is_out_of_memory(error):
        return f"memory does not suffice: {first_line(error)}. Lower the batch.", 1
    from pydantic import ValidationError

    if isinstance(error, ValidationError):
        return explain(error), 2
    raise error


def _explain_usage(error: Any) -> tuple[str, int]:
    """Return the message and the exit status of a usage error that typer found."""
    text = error.format_message()
    if type(error).__name__ == "NoArgsIsHelpError":
        if text:  # without rich, which has printed the help
            typer.echo(text, err=True)
        return "", error.exit_code
    command = error.ctx.command_path if getattr(error, "ctx", None) else "safegen"
    text = re.sub(r"^Invalid value for '(.+?)': (Value error, )?", r"\1: ", text)
    text = re.sub(r"^(\S+): Input should ", r"\1 must ", text)
    end = "" if text.endswith("?") else "."
    if text.startswith("Got unexpected extra argument") and "--patch" in _option_names(error.ctx):
        end += " Patches go with --patch."
    if command == "safegen" and getattr(error, "option_name", "") in OUTPUT_OPTIONS:
        end += f" Give it after the command: safegen COMMAND {error.option_name}."
    return f"{text[:1].lower()}{text[1:].rstrip('.')}{end} See: {command} --help", error.exit_code


def _option_names(context: Any) -> set[str]:
    """Return the names of the options of a command."""
    return {name for option in context.command.params for name in option.opts}
