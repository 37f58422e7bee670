"""The server process: uvicorn over the app, from start to drain."""

from __future__ import annotations

import asyncio
import logging
import logging.config
import math
import signal
import socket
import threading
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from types import FrameType

import uvicorn
from fastapi import FastAPI

from safegen.core.errors import ConfigError
from safegen.serve.app import build_app
from safegen.serve.config import ServerConfig
from safegen.serve.engine.base import Engine
from safegen.serve.engine.local import LocalEngine
from safegen.serve.engine.pool import OnBatch
from safegen.serve.messages import StackInfo
from safegen.serve.operations.logs import log_config
from safegen.serve.operations.metrics import Metrics
from safegen.serve.operations.protocol import KEEP_ALIVE, build_protocol
from safegen.serve.service import ImageService

logger = logging.getLogger(__name__)
SIGNALS = (signal.SIGINT, signal.SIGTERM)
BACKLOG_SECONDS = 0.05
"""Seconds for accepted connections to get their protocol before the port is closed."""
WRITE_SECONDS = 5.0
"""Seconds after the drain in which the last answers are written."""
REPEAT_SECONDS = 0.2
"""Seconds after the first signal in which others count as the same one."""
OnReady = Callable[[str], None]
"""Called with the address once requests are answered."""


def run_server(
    config: ServerConfig, *, engine: Engine | None = None, on_ready: OnReady | None = None
) -> int:
    """Serve until a signal ends it, and return the exit status.

    The first SIGINT or SIGTERM answers the accepted requests within `drain_timeout` seconds; the
    second one stops at once, with the status 128 + its number.

    Args:
        config: settings of the server.
        engine: what makes the images, not started. Default: that of the settings.
        on_ready: called with the address once requests are answered.

    Raises:
        UserError: a stack cannot be loaded, a file cannot be used, or the address is taken.
        EngineFaultError: a worker died while it loaded its stack, or Ray failed.
    """
    if config.engine == "ray" and engine is None:
        from safegen.serve.ray.server import run_ray

        return run_ray(config, on_ready=on_ready)
    metrics = Metrics()
    app = build_app(config, engine or build_engine(config, metrics.on_batch), metrics=metrics)
    logging.config.dictConfig(log_config(log_prompts=config.log_prompts))
    server = ImageServer(config, app, on_ready)
    with server.capture_signals():
        asyncio.run(server.run_service())
    if server.error is not None:
        raise server.error
    return 128 + server.signal if server.force_exit else 0


def build_engine(config: ServerConfig, on_batch: OnBatch | None = None) -> Engine:
    """Return the engine of a configuration, not started.

    Args:
        config: settings of the server.
        on_batch: called with the number of images and the seconds of each batch; another server
            has its own batches.
    """
    if config.upstream is None:
        return LocalEngine(config, on_batch=on_batch)
    from safegen.serve.upstream.engine import ProxyEngine

    return ProxyEngine(config)


def warn_about_gaps(stacks: Mapping[str, StackInfo]) -> None:
    """Log which stacks release images that no guard looks at, and which guards were not tried."""
    for name, stack in stacks.items():
        if not stack.reads_images:
            logger.warning("no guard looks at the images of the stack %r", name)
        if stack.guards and not stack.tested_concept:
            logger.warning("the guards of the stack %r were tried on no concept", name)


def bind(config: ServerConfig) -> socket.socket:
    """Return a socket on the address of a server; it does not listen yet.

    Raises:
        ConfigError: the address cannot be used.
    """
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((config.host.strip("[]"), config.port))
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"host and port must be an address that is free, got {config.host!r} and "
            f"{config.port}: {error.strerror}. Choose others with --host and --port"
        ) from error
    listener.setblocking(False)
    return listener


class ImageServer(uvicorn.Server):
    """Server of one app. It answers `/health` and `/ready` while the engine is loading."""

    def __init__(self, config: ServerConfig, app: FastAPI, on_ready: OnReady | None = None) -> None:
        """Bind the address.

        Args:
            config: settings of the server.
            app: app of `build_app`.
            on_ready: called with the address once requests are answered.

        Raises:
            ConfigError: the address cannot be used.
        """
        limits = config.limits
        super().__init__(
            uvicorn.Config(
                app,
                host=config.host,
                port=config.port,
                http=build_protocol(limits),
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                h11_max_incomplete_event_size=limits.header_bytes,
                timeout_keep_alive=math.ceil(KEEP_ALIVE),
                timeout_graceful_shutdown=math.ceil(config.drain_timeout + WRITE_SECONDS),
            )
        )
        self.settings, self._on_ready = config, on_ready
        self.service: ImageService = app.state.service
        self.error: Exception | None = None
        """Why the engine could not be started."""
        self.signal = 0
        """Number of the last signal."""
        self._first_signal = 0.0
        self._socket = bind(config)

    @property
    def address(self) -> str:
        """URL of the server."""
        host, port = self._socket.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    async def run_service(self) -> None:
        """Start the engine behind the open port, serve, drain and stop."""
        self.service.phase = "starting"
        start = asyncio.create_task(self._start_engine())
        try:
            await self._serve([self._socket])
        finally:
            start.cancel()
            with suppress(asyncio.CancelledError):
                await start
            await self.service.stop()
            self._socket.close()

    async def _start_engine(self) -> None:
        address = self.address
        try:
            await self.service.start()
        except Exception as error:
            self.error, self.should_exit = error, True
            return
        stacks = self.service.engine.stacks
        warn_about_gaps(stacks)
        logger.info("ready", extra={"fields": {"address": address, "stacks": list(stacks)}})
        if self._on_ready is not None:
            self._on_ready(address)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Answer what was accepted, refuse what is new, and close every connection."""
        has_started, self.service.phase = self.service.phase == "serving", "draining"
        await self._stop_listening()
        tasks = [asyncio.create_task(self._abort_at_second_signal())]
        if has_started:
            timeout = self.settings.drain_timeout
            logger.info("draining", extra={"fields": {"seconds": timeout}})
            tasks.append(asyncio.create_task(self.service.engine.drain(timeout)))
        try:
            await super().shutdown(sockets)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _stop_listening(self) -> None:
        """Close the port. What waits there is accepted first, and answered 503."""
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._socket)
        await asyncio.sleep(BACKLOG_SECONDS)  # what asyncio has accepted gets its protocol
        accepted = []
        with suppress(OSError):  # none is left
            while True:
                accepted.append(self._socket.accept()[0])
        for server in self.servers:
            server.close()
        for connection in accepted:
            connection.setblocking(False)
            with suppress(OSError):  # its client is gone
                await loop.connect_accepted_socket(self._build_connection, connection)

    def _build_connection(self) -> asyncio.Protocol:
        """Return the protocol of one connection, as uvicorn builds it."""
        return self.config.http_protocol_class(  # type: ignore[call-arg]
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )

    async def _abort_at_second_signal(self) -> None:
        while not self.force_exit:
            await asyncio.sleep(0.05)
        for connection in list(self.server_state.connections):
            if connection.transport is not None:
                connection.transport.abort()

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Handle signals in this context, if it is in the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        handlers = {number: signal.signal(number, self.handle_exit) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin the drain; stop at once at the second signal, and die of the third.

        Programs that start others, such as `timeout`, may signal both a process and its group:
        signals within `REPEAT_SECONDS` of the first count as one.
        """
        now = time.monotonic()
        if self.signal and now < self._first_signal + REPEAT_SECONDS:
            return
        if not self.signal:
            self._first_signal = now
        if self.should_exit:
            self.force_exit = True
            signal.signal(sig, signal.SIG_DFL)
        self.should_exit, self.signal = True, sig
