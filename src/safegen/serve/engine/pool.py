"""Workers of one stack behind a bounded queue; requests of equal settings share a batch."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from safegen.core.errors import UserError
from safegen.guards.core.result import GeneratedImage
from safegen.serve.config import ServerConfig
from safegen.serve.engine.base import DrainingError, EngineFaultError, QueueFullError
from safegen.serve.engine.process import Method
from safegen.serve.engine.worker import CancelledJobError, OutOfMemoryError, Worker
from safegen.serve.messages import ImageRequest, StackInfo

logger = logging.getLogger(__name__)
OnBatch = Callable[[int, float], None]
"""Called with the number of images and the seconds of each batch."""
MAX_PAUSE = 30.0
"""Most seconds between two attempts to start a worker."""


@dataclass(eq=False)
class Entry:
    """A request that waits or runs."""

    method: Method
    arguments: tuple[Any, ...]
    future: asyncio.Future[Any]
    arrived: float
    request: ImageRequest | None = None
    share: float = 0.0

    @property
    def num_images(self) -> int:
        """Number of images to generate."""
        return len(self.request.seeds) if self.request else 0


@dataclass
class StackPool:
    """Queue and workers of one stack."""

    config: ServerConfig
    spec: str | None
    on_batch: OnBatch | None = None
    info: StackInfo | None = None
    waiting: list[Entry] = field(default_factory=list)
    running: list[Entry] = field(default_factory=list)
    workers: list[Worker] = field(default_factory=list)
    is_draining: bool = False
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)
    _arrival: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def start(self) -> StackInfo:
        """Start the workers, the first one before the others, and return the stack.

        Raises:
            UserError: the stack cannot be loaded, or the self-test fails.
            EngineFaultError: a worker died.
        """
        self.workers = [Worker(self.config, self.spec) for _ in range(self.config.workers)]
        self.info = await self.workers[0].start()
        infos = await asyncio.gather(*(worker.start() for worker in self.workers[1:]))
        if any(info.hash != self.info.hash for info in infos):
            raise EngineFaultError("the workers have loaded different stacks")
        self._tasks = [asyncio.create_task(self._run(worker)) for worker in self.workers]
        return self.info

    async def submit(self, method: Method, *arguments: Any) -> Any:
        """Return the value of a session's method; if this is cancelled, so is the request.

        Raises:
            QueueFullError: too many requests wait.
            DrainingError: the server is being stopped.
            UserError: the arguments are wrong.
            EngineFaultError: a worker failed.
        """
        if self.is_draining:
            raise DrainingError
        if len(self.waiting) >= self.config.max_queue:
            raise QueueFullError(len(self.waiting), self._retry_after())
        loop = asyncio.get_running_loop()
        request = arguments[0] if method == "generate" else None
        entry = Entry(method, arguments, loop.create_future(), loop.time(), request)
        async with self._arrival:
            self.waiting.append(entry)
            self._arrival.notify_all()
        try:
            return await entry.future
        finally:
            self.remove(entry)

    def remove(self, entry: Entry) -> None:
        """Take a request out of the queue, or stop a batch that has no waiting caller."""
        with suppress(ValueError):
            self.waiting.remove(entry)
        entry.future.cancel()

    def find(self, request_id: str) -> Entry | None:
        """Return the entry of a request; None if there is none."""
        entries = (*self.running, *self.waiting)
        return next((e for e in entries if e.request and e.request.id == request_id), None)

    def fail_all(self, error: Exception) -> None:
        """Answer every request with an error."""
        for entry in (*self.waiting, *self.running):
            if not entry.future.done():
                entry.future.set_exception(error)

    async def stop(self) -> None:
        """Stop the workers and fail what still waits."""
        self.is_draining = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(worker.stop() for worker in self.workers))
        self.fail_all(DrainingError())

    def _retry_after(self) -> int:
        """Return the seconds until a place is likely: a second per waiting batch."""
        return 1 + len(self.waiting) // max(1, self.config.max_batch_size * len(self.workers))

    async def _run(self, worker: Worker) -> None:
        """Work off the queue with one worker, and replace its process when it ends."""
        pause = 0.0
        while True:
            if not worker.is_alive:
                try:
                    await asyncio.sleep(pause)
                    await self._restart(worker)
                    pause = 0.0
                except (UserError, EngineFaultError) as error:
                    logger.error("a worker cannot be started: %s", error)  # noqa: TRY400
                    pause = min(MAX_PAUSE, 2 * pause + 1)
                    continue
            batch = await self._next_batch()
            if batch:
                self.running += batch
                try:
                    await self._answer(worker, batch)
                finally:
                    self.running = [e for e in self.running if e not in batch]

    async def _restart(self, worker: Worker) -> None:
        info = await worker.start()
        if self.info is not None and info != self.info:
            await worker.stop()
            raise EngineFaultError("the stack has changed on the disk; the worker is not used")

    async def _next_batch(self) -> list[Entry]:
        """Return the oldest request with those that fit into its batch; wait for one.

        Checks are answered alone, and before images.
        """
        loop = asyncio.get_running_loop()
        async with self._arrival:
            await self._arrival.wait_for(lambda: bool(self.waiting))
            if check := next((e for e in self.waiting if e.request is None), None):
                self.waiting.remove(check)
                return [check]
            until = self.waiting[0].arrived + self.config.batch_window
            while self.waiting and not self._is_full() and (rest := until - loop.time()) > 0:
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._arrival.wait(), rest)
            batch = self._matching()
            self.waiting = [e for e in self.waiting if e not in batch]
            return batch

    def _matching(self) -> list[Entry]:
        """Return the oldest request for images and those of equal settings, up to a batch."""
        entries = [e for e in self.waiting if e.request is not None]
        batch: list[Entry] = []
        for entry in entries:
            assert entry.request is not None
            first = batch[0].request if batch else entry.request
            total = sum(e.num_images for e in batch) + entry.num_images
            if first is not None and entry.request.batch_key == first.batch_key:
                if batch and total > self.config.max_batch_size:
                    break
                batch.append(entry)
        return batch

    def _is_full(self) -> bool:
        return sum(e.num_images for e in self._matching()) >= self.config.max_batch_size

    async def _answer(self, worker: Worker, batch: Sequence[Entry]) -> None:
        """Answer the requests of a batch. One that fails together is repeated one by one."""
        batch = [entry for entry in batch if not entry.future.done()]
        if not batch:
            return
        values = await self._call(worker, batch)
        together = len(batch) > 1 and worker.is_alive and not self.is_draining
        for entry, value in zip(batch, values, strict=True):
            if together and _failed(value) and not entry.future.done():
                (value,) = await self._call(worker, [entry])  # noqa: PLW2901
            _set(entry.future, value)

    async def _call(self, worker: Worker, batch: Sequence[Entry]) -> list[Any]:
        """Return the value or the exception of each request."""
        first, loop = batch[0], asyncio.get_running_loop()

        def on_progress(share: float) -> None:
            for entry in batch:
                entry.share = share
            if all(entry.future.done() for entry in batch):
                worker.cancel_jobs()

        started = loop.time()
        try:
            if first.request is None:
                return [await worker.call(first.method, *first.arguments)]
            requests = [entry.request for entry in batch]
            values = await worker.call("generate", requests, on_progress=on_progress)
        except (UserError, EngineFaultError) as error:
            if isinstance(error, CancelledJobError):
                logger.info("a batch was cancelled")
            return [error] * len(batch)
        if self.on_batch is not None:
            self.on_batch(sum(e.num_images for e in batch), loop.time() - started)
        return list(values)


def _failed(value: Any) -> bool:
    """Return whether a request of a batch failed in a way that another one may have caused."""
    if isinstance(value, list):
        return any(isinstance(v, GeneratedImage) and v.trace.action == "withhold" for v in value)
    return isinstance(value, UserError | OutOfMemoryError)


def _set(future: asyncio.Future[Any], value: Any) -> None:
    if future.done():
        return
    if isinstance(value, Exception):
        future.set_exception(value)
    else:
        future.set_result(value)
