"""Start of Ray as this package uses it, and connection to a cluster that runs."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType

from safegen.core.errors import ConfigError, MissingExtraError

ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
"""Variables that are set for Ray unless they are set: it reports nothing to its makers, and does
not copy the working directory when `uv run` runs the command."""
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""Variable with which Ray's own ports listen on loopback alone, as they do on Windows and macOS.
Ray reads it at its import."""
OBJECT_STORE_BYTES = 256 * 2**20
"""Memory of Ray's object store on this machine. Images go through it only if they are large."""


def import_ray(name: str = "ray", *, is_local: bool = False) -> ModuleType:
    """Import Ray with the variables it needs, and return it.

    Args:
        name: module to import, such as `ray.serve`.
        is_local: whether a cluster will be started on this machine, for this process alone.

    Raises:
        MissingExtraError: it is not installed.
    """
    for variable, value in (ENVIRONMENT | (LOOPBACK if is_local else {})).items():
        os.environ.setdefault(variable, value)
    try:
        return import_module(name)
    except ImportError as error:
        raise MissingExtraError("engine ray", "ray", "ray") from error


@contextmanager
def ray_cluster(
    address: str | None, *, num_cpus: int, shows_logs: bool = False
) -> Iterator[ModuleType]:
    """Yield Ray, connected to a cluster; one that was started here is stopped at the end.

    If this process is connected already, as in a job of Ray, it stays so.

    Args:
        address: address of a cluster; None starts one on this machine.
        num_cpus: CPUs of a started cluster.
        shows_logs: whether what the workers print is printed here too.

    Raises:
        MissingExtraError: Ray is not installed.
        ConfigError: no cluster answers at the address.
    """
    ray = import_ray(is_local=address is None)
    if ray.is_initialized():
        yield ray
        return
    local = {
        "address": "local",  # else a cluster in RAY_ADDRESS, or one that runs here, would be taken
        "num_cpus": num_cpus,
        "object_store_memory": OBJECT_STORE_BYTES,
        "include_dashboard": False,
    }
    logs = {} if shows_logs else {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        ray.init(**logs, **({"address": address} if address else local))
    except (ConnectionError, ValueError, RuntimeError) as error:
        if address is None:
            raise
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"address must be that of a Ray cluster that answers, got {address!r} ({reason}). "
            "See it with `ray status`, and set RAY_AUTH_MODE=token if it needs a token."
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()
