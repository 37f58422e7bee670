"""The server process: uvicorn over the app, from start to drain."""

from __future__ import annotations

import uvicorn

from safegen.serve.app import build_app
from safegen.serve.config import ServerConfig
from safegen.serve.engine.base import Engine
from safegen.serve.engine.local import LocalEngine


def run_server(config: ServerConfig) -> int:
    """Serve until a signal ends it, and return the exit status.

    Raises:
        UserError: a stack cannot be loaded, or a file cannot be used.
    """
    app = build_app(config, build_engine(config))
    uvicorn.run(app, host=config.host, port=config.port)
    return 0


def build_engine(config: ServerConfig) -> Engine:
    """Return the engine of a configuration, not started."""
    if config.upstream is None:
        return LocalEngine(config)
    from safegen.serve.upstream.engine import ProxyEngine

    return ProxyEngine(config)
