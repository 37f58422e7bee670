"""Output of the commands: everything they print passes here and cannot control the terminal."""

from __future__ import annotations

import io
import json
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from safegen.core.errors import SafegenError
from safegen.core.text import escape_control, one_line


class Verbosity:
    """What a command prints besides its result; `--quiet` and `--verbose` set it."""

    quiet = False
    """Whether progress and status lines are left out."""
    verbose = False
    """Whether tracebacks and the warnings of other libraries are printed."""
    silent = False
    """Whether nothing is printed, as by all processes of a job but the first."""


VERBOSITY = Verbosity()


def echo(line: str = "", *, err: bool = False) -> None:
    """Print one line to stdout or stderr, control characters and line breaks as escapes."""
    if VERBOSITY.silent:
        return
    with output_errors():
        print(escape_control(line), file=sys.stderr if err else sys.stdout)


def echo_status(line: str) -> None:
    """Print one line about the run to stderr, such as what is loaded; --quiet leaves it out."""
    if not VERBOSITY.quiet:
        echo(line, err=True)


def echo_json(value: object) -> None:
    """Print a value as indented JSON, in ASCII."""
    for line in json.dumps(value, indent=1).split("\n"):
        echo(line)


def plural(count: int, noun: str) -> str:
    """Return a number with its noun: `1 image`, `2 images`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def echo_message(kind: str, message: object) -> None:
    """Print an error or a warning to stderr as one line: `KIND: MESSAGE`."""
    echo(f"{kind}: {one_line(str(message))}", err=True)


def open_streams() -> None:
    """Let the standard streams take any text; closed ones become the null device.

    Otherwise a file of the command could get the number of a closed stream, and output of a library
    would go into that file.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one
    sys.stdout = sys.stdout or open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def flush_output() -> None:
    """Write what is still buffered.

    Raises:
        SafegenError: stdout or stderr cannot be written.
    """
    with output_errors():
        sys.stdout.flush()
        sys.stderr.flush()


def discard_output() -> None:
    """Send what is still buffered, and cannot be written, to the null device."""
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(null, stream.fileno())


@contextmanager
def output_errors() -> Iterator[None]:
    """End the process if the reader is gone, as `head` after its last line; raise other errors."""
    try:
        yield
    except BrokenPipeError:
        sys.exit(128 + 13)  # as if SIGPIPE had ended the process
    except OSError as error:
        raise SafegenError(f"the output cannot be written: {error.strerror}") from error


def print_traceback(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Print an exception that nothing caught, its text escaped; a `sys.excepthook`."""
    VERBOSITY.silent = False  # other processes know its first line only
    for part in traceback.format_exception(kind, error, trace):
        for line in part.rstrip("\n").split("\n"):
            echo(line, err=True)
