"""Command line: parse the options, call the library, print the result.

Heavy imports happen inside the commands, so that --help is instant.
"""

from __future__ import annotations

import signal
import sys

from safegen.cli.main import app
from safegen.core.errors import InterruptedRunError, SafegenError, UserError


def main() -> None:
    """Run a command; an error is one line without a traceback."""
    # raise an exception, so that temporary files are removed
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        app()
    except UserError as error:
        _fail(error, 2)
    except InterruptedRunError as error:
        _fail(error, 130)
    except SafegenError as error:
        _fail(error, 1)
    except OSError as error:  # no permission, name too long ...; the message names the file
        _fail(error, 1)
    except KeyboardInterrupt:
        print("safegen: stopped", file=sys.stderr)
        sys.exit(130)


def _fail(error: BaseException, code: int) -> None:
    print(f"safegen: {error}", file=sys.stderr)
    sys.exit(code)
