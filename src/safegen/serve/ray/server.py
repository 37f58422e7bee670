"""Run the server in a Ray cluster, or write the configuration with which Ray Serve runs it."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from safegen.core import errors
from safegen.core.errors import ConfigError, UserError
from safegen.core.files import atomic_write
from safegen.evaluation.engines.cluster import import_ray, ray_cluster
from safegen.serve.config import ServerConfig, read_config
from safegen.serve.engine.base import EngineFaultError

APP_NAME = "safegen"
"""Name of the application in Ray Serve."""
ERROR_LINE = re.compile(r"^(?:[\w.]+\.)?(\w+Error): (.+)$", re.MULTILINE)
POLL_SECONDS = 0.5


def run_ray(config: ServerConfig, *, on_ready: Callable[[str], None] | None = None) -> int:
    """Serve in a Ray cluster until a signal ends it, and return the exit status.

    Args:
        config: settings of the server.
        on_ready: called with the address once requests are answered.

    Raises:
        MissingExtraError: Ray is not installed.
        UserError: a stack cannot be loaded, or a file cannot be used.
        EngineFaultError: Ray fails, or the stacks are not loaded in time.
    """
    import_ray("ray.serve", is_local=config.ray.address is None)
    from ray import serve

    if config.port == 0:
        raise ConfigError("port must be > 0 with the engine 'ray', got 0")
    cpus = max(os.cpu_count() or 1, count_cpus(config))
    with ray_cluster(config.ray.address, num_cpus=cpus, shows_logs=True):
        try:
            for name in (signal.SIGINT, signal.SIGTERM):
                signal.signal(name, _interrupt)
            with suppress(KeyboardInterrupt):
                serve.start(proxy_location="HeadOnly", http_options=http_options(config))
                _deploy(config)
                if on_ready is not None:
                    on_ready(f"http://{config.host}:{config.port}")
                while True:
                    time.sleep(POLL_SECONDS)
            _drain(config)
        finally:
            serve.shutdown()
    return 0


def write_ray_config(config_path: Path, out: Path) -> None:
    """Write the configuration file with which `serve run` and `serve deploy` run a server.

    Args:
        config_path: file with the settings of the server, at the same path on every node.
        out: YAML file to write.

    Raises:
        MissingExtraError: Ray is not installed.
        FileError: the settings are invalid, or `out` exists or cannot be written.
        ConfigError: the settings are not those of a server with stacks.
    """
    import_ray("ray.serve")
    import yaml
    from ray.serve.schema import ServeDeploySchema

    from safegen.serve.ray.app import IMPORT_PATH, INGRESS, ingress_options, stack_options

    config = read_config(config_path)
    if not config.stacks:
        raise ConfigError("stacks must be given with the engine 'ray', got an upstream")
    deployments = {INGRESS: ingress_options(config), **stack_options(config)}
    document = {
        "proxy_location": "HeadOnly",
        "http_options": http_options(config),
        "applications": [
            {
                "name": APP_NAME,
                "route_prefix": "/",
                "import_path": IMPORT_PATH,
                "args": {"config": str(config_path.resolve())},
                "deployments": [{"name": name, **rest} for name, rest in deployments.items()],
            }
        ],
    }
    ServeDeploySchema.model_validate(document)
    with atomic_write(out) as tmp:
        tmp.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")


def http_options(config: ServerConfig) -> dict[str, Any]:
    """Return where and how Ray's proxy listens."""
    return {
        "host": config.host,
        "port": config.port,
        "request_timeout_s": config.request_timeout + config.limits.read_seconds,
    }


def count_cpus(config: ServerConfig) -> int:
    """Return the CPUs that all replicas together reserve."""
    most = config.ray.max_replicas or config.workers
    return int(-(-most * len(config.stacks) * config.ray.num_cpus // 1))


def read_error(message: str) -> Exception | None:
    """Return the last error of safegen that a message of Ray Serve quotes; None without any."""
    for name, text in reversed(ERROR_LINE.findall(message)):
        kind = getattr(errors, name, None)
        if isinstance(kind, type) and issubclass(kind, UserError):
            error: UserError = UserError.__new__(kind)
            Exception.__init__(error, text.strip())
            return error
        if name == EngineFaultError.__name__:
            return EngineFaultError(text.strip())
    return None


def _deploy(config: ServerConfig) -> None:
    """Start the application and wait until it runs."""
    from ray import serve

    from safegen.serve.ray.app import build_application

    target = serve.RunTarget(build_application(config), name=APP_NAME, route_prefix="/")
    serve.run_many([target], wait_for_applications_running=False)
    until = time.monotonic() + config.start_timeout
    while (status := serve.status().applications[APP_NAME]).status != "RUNNING":
        message = "\n".join([status.message, *(d.message for d in status.deployments.values())])
        if status.status == "DEPLOY_FAILED":
            raise read_error(message) or EngineFaultError(f"Ray cannot start it: {message[-500:]}")
        if time.monotonic() > until:
            raise EngineFaultError(f"not ready within {config.start_timeout:g} seconds")
        time.sleep(POLL_SECONDS)


def _drain(config: ServerConfig) -> None:
    """Let the app answer what it has accepted."""
    from ray import serve

    from safegen.serve.ray.app import INGRESS

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with suppress(Exception):  # the app does not run, or no longer
        handle = serve.get_deployment_handle(INGRESS, APP_NAME)
        handle.drain.remote().result(timeout_s=config.drain_timeout + 10)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
