"""Replica of a stack in a Ray cluster: the session of a worker process behind `serve.batch`."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from safegen.core.errors import MissingExtraError
from safegen.serve.config import ServerConfig
from safegen.serve.engine.pool import should_repeat
from safegen.serve.engine.process import JobFailure, open_stack, to_failure
from safegen.serve.messages import ImageRequest, StackInfo

try:
    from ray import serve
except ImportError as error:
    raise MissingExtraError("engine ray", "ray", "ray") from error

if TYPE_CHECKING:
    from PIL import Image


CONCURRENT_BATCHES = 4
"""Batches of Ray that a replica has at a time: one runs, the others wait to be joined."""


@dataclass(frozen=True)
class Reply:
    """Answer of a replica."""

    stack: StackInfo
    """The stack that the replica has loaded."""
    value: Any
    """What the method returns, or a `JobFailure`. No exception crosses the cluster."""


@dataclass(eq=False)
class BatchEntry:
    """A request in a batch."""

    request: ImageRequest
    is_wanted: bool = True
    """Whether somebody waits for it."""
    value: Any = field(default=None, repr=False)


def count_images(entries: Sequence[BatchEntry]) -> int:
    """Return the images of a batch; one request counts as one batch, however many it has."""
    if len(entries) == 1:
        return 1
    return sum(len(entry.request.seeds) for entry in entries)


class StackReplica:
    """A loaded stack that answers batches of requests, one batch at a time."""

    def __init__(self, config: ServerConfig, spec: str) -> None:
        """Load a stack and test it.

        Raises:
            UserError: it cannot be loaded, or the self-test fails.
        """
        self.config = config
        self._files = ExitStack()  # keeps the session open
        self._session = self._files.enter_context(open_stack(config, spec))
        self._generate_batch.set_max_batch_size(config.max_batch_size)
        self._generate_batch.set_batch_wait_timeout_s(config.batch_window)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="session")
        self._running, self._seen = 0, time.monotonic()
        self._has_broken_device = False
        self._waiting: list[BatchEntry] = []
        self._lock = asyncio.Lock()

    async def describe(self) -> StackInfo:
        """Return the stack."""
        return self._session.info

    async def generate(self, request: ImageRequest) -> Reply:
        """Return the images of a request, one per seed. If this is cancelled, so is the request."""
        entry = BatchEntry(request)
        try:
            return await self._generate_batch(entry)
        finally:
            entry.is_wanted = False

    async def check_prompts(self, prompts: Sequence[str]) -> Reply:
        """Return what the guards of prompts decide on each prompt."""
        return self._reply(await self._run(self._session.check_prompts, prompts))

    async def check_images(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Reply:
        """Return images as the guards of images leave them."""
        return self._reply(await self._run(self._session.check_images, images, prompts))

    async def check_health(self) -> None:
        """End the process if its session hangs or its device is broken; Ray replaces it."""
        hangs = self._running and time.monotonic() - self._seen > self.config.worker_timeout
        if hangs or self._has_broken_device:
            os._exit(1)  # a request that waits for the session gets 503 at once

    @serve.batch(  # type: ignore[untyped-decorator]
        batch_size_fn=count_images, max_concurrent_batches=CONCURRENT_BATCHES
    )
    async def _generate_batch(self, entries: list[BatchEntry]) -> list[Reply]:
        """Answer requests, together with others that wait.

        Ray forms batches while one runs, from what arrives within the batch window. Such parts are
        joined here, and requests of other settings are kept apart.
        """
        self._waiting += entries
        async with self._lock:
            while self._waiting and any(entry.value is None for entry in entries):
                await self._answer(self._take_group())
        lost = JobFailure(0, "fault", "LostRequest", "the request was lost")
        return [self._reply(lost if e.value is None else e.value) for e in entries]

    def _take_group(self) -> list[BatchEntry]:
        """Return the oldest request that waits and those of equal settings, up to a batch."""
        first, total = self._waiting[0], 0
        group: list[BatchEntry] = []
        for entry in self._waiting:
            if entry.request.batch_key != first.request.batch_key:
                continue
            total += len(entry.request.seeds)
            if group and total > self.config.max_batch_size:
                break
            group.append(entry)
        self._waiting = [entry for entry in self._waiting if entry not in group]
        return group

    async def _answer(self, group: list[BatchEntry]) -> None:
        """Answer requests of equal settings. One that fails together is repeated one by one."""
        await self._generate(group)
        if len(group) > 1:
            for entry in group:
                if entry.is_wanted and should_repeat(entry.value):
                    await self._generate([entry])

    async def _generate(self, group: list[BatchEntry]) -> None:
        def report(share: float) -> None:
            self._seen = time.monotonic()
            if not any(entry.is_wanted for entry in group):
                raise asyncio.CancelledError  # ends the batch; nobody reads the values

        requests = [entry.request for entry in group]
        values = await self._run(self._session.generate, requests, report)
        for i, entry in enumerate(group):
            entry.value = values if isinstance(values, JobFailure) else values[i]

    async def _run(self, method: Callable[..., Any], *arguments: Any) -> Any:
        """Return the value of a session's method, or its failure."""

        def call() -> Any:
            self._running, self._seen = 1, time.monotonic()
            try:
                return method(*arguments)
            except asyncio.CancelledError:
                return JobFailure(0, "cancelled", "CancelledError", "cancelled")
            except Exception as error:
                self._has_broken_device = "CUDA error" in str(error)  # until the process ends
                return to_failure(0, error)
            finally:
                self._running = 0

        return await asyncio.get_running_loop().run_in_executor(self._thread, call)

    def _reply(self, value: Any) -> Reply:
        return Reply(self._session.info, value)
