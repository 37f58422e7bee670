"""Server process with the fake engine: python -m tests.serve.operations.fake_server CONFIG SECONDS.

It prints its address once it is ready.
"""

from __future__ import annotations

import sys

from safegen.serve.config import ServerConfig
from safegen.serve.server import run_server
from tests.serve.conftest import FakeEngine


def main() -> int:
    """Serve with settings as JSON; slow prompts take a number of seconds."""
    config = ServerConfig.model_validate_json(sys.argv[1])
    engine = FakeEngine(slow_seconds=float(sys.argv[2]))
    return run_server(config, engine=engine, on_ready=lambda address: print(address, flush=True))


if __name__ == "__main__":
    sys.exit(main())
