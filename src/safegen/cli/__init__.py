"""The command line: parse, one library call, show.

Heavy imports happen inside the commands, so that --help is instant.
"""

from __future__ import annotations

import signal
import sys

from safegen.cli.main import app
from safegen.core.errors import InterruptedRunError, SafegenError, UserError


def main() -> None:
    """Run a command; a user's error is one line without a traceback."""
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(143)
    )  # an exception, so that temporary files are removed
    try:
        app()
    except UserError as error:
        _fail(error, 2)
    except InterruptedRunError as error:
        _fail(error, 130)
    except SafegenError as error:
        _fail(error, 1)
    except OSError as error:  # of the system: no rights, a name too long ...; it names the file
        _fail(error, 1)
    except KeyboardInterrupt:
        print("safegen: stopped", file=sys.stderr)
        sys.exit(130)


def _fail(error: BaseException, code: int) -> None:
    print(f"safegen: {error}", file=sys.stderr)
    sys.exit(code)
