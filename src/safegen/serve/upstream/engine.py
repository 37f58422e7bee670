"""The engine of proxy mode: another server generates between the two stages of the guards."""

from __future__ import annotations

from safegen.serve.engine.local import LocalEngine


class ProxyEngine(LocalEngine):
    """Guards in a worker process, in front of another server."""
