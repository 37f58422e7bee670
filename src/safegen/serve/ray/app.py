"""The app as an application of Ray Serve: one ingress, and the replicas of each stack."""

from __future__ import annotations

import logging.config
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from safegen.core.errors import ConfigError, MissingExtraError
from safegen.serve.app import build_app
from safegen.serve.config import ServerConfig, is_loopback, read_config
from safegen.serve.operations.logs import log_config
from safegen.serve.ray.engine import RayEngine
from safegen.serve.ray.replica import CONCURRENT_BATCHES, StackReplica
from safegen.serve.service import ImageService

try:
    from ray import serve
    from ray.serve import Application
    from ray.serve.handle import DeploymentHandle
except ImportError as error:
    raise MissingExtraError("engine ray", "ray", "ray") from error

INGRESS = "ingress"
"""Name of the deployment that runs the app."""
ATTEMPTS = 2
"""Attempts to load a stack before the start fails."""
IMPORT_PATH = "safegen.serve.ray.app:build_from_file"
"""Where the configuration file of Ray Serve finds the application."""


class Ingress:
    """The app in front of the replicas. It has no model and needs little CPU."""

    async def __init__(  # type: ignore[misc]
        self, config: ServerConfig, *handles: DeploymentHandle[Any]
    ) -> None:
        """Wait until the replicas are loaded.

        Raises:
            UserError: two stacks have one name, or other machines could connect without a token.
            EngineFaultError: a replica failed.
        """
        check_address(config)
        name = serve.get_replica_context().app_name
        self.config = config
        self.engine = RayEngine(config, handles, partial(count_replicas, name))
        await self.engine.start()

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Return the app; Ray Serve calls this after the constructor."""
        logging.config.dictConfig(log_config(log_prompts=self.config.log_prompts))
        app = build_app(self.config, self.engine)
        self.service: ImageService = app.state.service
        return app

    async def drain(self) -> None:
        """Take no more requests, and answer those accepted within the drain timeout."""
        self.service.phase = "draining"
        await self.engine.drain(self.config.drain_timeout)


def count_replicas(app_name: str) -> dict[str, int]:
    """Return the number of replicas that run, by deployment."""
    deployments = serve.status().applications[app_name].deployments
    return {name: found.replica_states.get("RUNNING", 0) for name, found in deployments.items()}


def check_address(config: ServerConfig) -> None:
    """Check that other machines need a token, wherever Ray's proxy listens.

    Raises:
        ConfigError: the proxy listens beyond loopback, and there are no tokens.
    """
    from ray.serve.context import _get_global_client

    host = str(_get_global_client().http_config.host)
    if config.token_file is None and not is_loopback(host):
        raise ConfigError(
            f"token_file must be given, since Ray Serve listens on {host!r}. Give one, or set "
            "http_options.host to 127.0.0.1 in the configuration of Ray Serve."
        )


def build_application(config: ServerConfig) -> Application:
    """Return the application of a server, for `ray.serve.run`."""
    stacks = [
        serve.deployment(
            StackReplica, name=name, max_constructor_retry_count=ATTEMPTS, **options
        ).bind(config, spec)
        for (name, options), spec in zip(stack_options(config).items(), config.stacks, strict=True)
    ]
    ingress = serve.deployment(serve.ingress()(Ingress), name=INGRESS, **ingress_options(config))
    return ingress.bind(config, *stacks)


def build_from_file(args: dict[str, str]) -> Application:
    """Return the application of a server file; Ray Serve calls this.

    Args:
        args: `config`, the path of the file on every node.
    """
    return build_application(read_config(Path(args["config"])))


def stack_options(config: ServerConfig) -> dict[str, dict[str, Any]]:
    """Return the options of the deployment of each stack, by its name in Ray Serve."""
    ray, options = config.ray, deployment_options(config)
    if ray.max_replicas is not None and ray.max_replicas > config.workers:
        options["autoscaling_config"] = {
            "min_replicas": config.workers,
            "max_replicas": ray.max_replicas,
            "target_ongoing_requests": ray.target_ongoing_requests,
        }
    else:
        options["num_replicas"] = config.workers
    options |= {
        "max_ongoing_requests": CONCURRENT_BATCHES * config.max_batch_size,
        "max_queued_requests": config.max_queue,
        "ray_actor_options": {"num_cpus": ray.num_cpus, "num_gpus": ray.num_gpus},
    }
    return {f"stack-{i}": dict(options) for i in range(len(config.stacks))}


def ingress_options(config: ServerConfig) -> dict[str, Any]:
    """Return the options of the deployment of the app."""
    return deployment_options(config) | {
        "num_replicas": 1,
        "max_ongoing_requests": config.limits.connections,
        "ray_actor_options": {"num_cpus": 0},
    }


def deployment_options(config: ServerConfig) -> dict[str, Any]:
    """Return the options that all deployments have."""
    return {
        "graceful_shutdown_timeout_s": config.drain_timeout,
        "health_check_period_s": 5.0,
        "health_check_timeout_s": 30.0,
        "logging_config": {"enable_access_log": False},
    }
