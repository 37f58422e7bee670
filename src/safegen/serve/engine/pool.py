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
from safegen.serve.engine.process import JobFailure, Method, SessionOpener, open_stack
from safegen.serve.engine.worker import JobError, Worker
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


@dataclass(eq=False)
class RequestBatch:
    """Requests that a worker answers together."""

    worker: Worker
    entries: Sequence[Entry]

    @property
    def is_abandoned(self) -> bool:
        """Whether no client waits for it any more."""
        return all(entry.future.done() for entry in self.entries)


@dataclass
class StackPool:
    """Queue and workers of one stack."""

    config: ServerConfig
    spec: str | None
    on_batch: OnBatch | None = None
    open_session: SessionOpener = open_stack
    info: StackInfo | None = None
    waiting: list[Entry] = field(default_factory=list)
    batches: list[RequestBatch] = field(default_factory=list)
    workers: list[Worker] = field(default_factory=list)
    is_draining: bool = False
    fault: str = ""
    """Why no worker can be started; empty while one runs or is being started."""
    seconds: float = 1.0
    """Duration of the last batch."""
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)
    _change: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when a request arrives or a worker ends."""
    _was_check: bool = False
    """Whether the last batch was a check."""

    @property
    def running(self) -> list[Entry]:
        """Requests in a batch."""
        return [entry for batch in self.batches for entry in batch.entries]

    async def start(self) -> StackInfo:
        """Start the workers, the first one before the others, and return the stack.

        Raises:
            UserError: the stack cannot be loaded, or the self-test fails.
            EngineFaultError: a worker died.
            DrainingError: `stop` was called meanwhile.
        """
        if self.is_draining:
            raise DrainingError
        try:
            self.workers = [self._new_worker() for _ in range(self.config.workers)]
            self.info = await self.workers[0].start()
            infos = await asyncio.gather(*(worker.start() for worker in self.workers[1:]))
            if any(info != self.info for info in infos):
                raise EngineFaultError("the workers have loaded different stacks")
        except BaseException as error:
            is_stopped = self.is_draining
            await self.stop()
            if is_stopped and isinstance(error, EngineFaultError):
                raise DrainingError from error
            raise
        self._tasks = [asyncio.create_task(self._run(i)) for i in range(len(self.workers))]
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
        if self.fault:
            raise EngineFaultError(self.fault)
        if len(self.waiting) >= self.config.max_queue:
            raise QueueFullError(len(self.waiting), self._retry_after())
        loop = asyncio.get_running_loop()
        request = arguments[0] if method == "generate" else None
        entry = Entry(method, arguments, loop.create_future(), loop.time(), request)
        self.waiting.append(entry)
        self._change.set()
        try:
            return await entry.future
        finally:
            self.remove(entry)

    def remove(self, entry: Entry) -> None:
        """Take a request out of the queue, and stop its batch if no client waits for it."""
        with suppress(ValueError):
            self.waiting.remove(entry)
        entry.future.cancel()
        for batch in self.batches:
            if entry in batch.entries and batch.is_abandoned:
                batch.worker.cancel_jobs()

    def find(self, request_id: str) -> Entry | None:
        """Return the entry of a request; None if there is none."""
        entries = (*self.running, *self.waiting)
        return next((e for e in entries if e.request and e.request.id == request_id), None)

    def fail_all(self, error: Exception, *, running: bool = True) -> None:
        """Answer every request with an error, or only those that wait."""
        for entry in (*self.waiting, *(self.running if running else ())):
            _set(entry.future, error)

    async def stop(self) -> None:
        """Stop the workers, also while they are being started, and fail what still waits."""
        self.is_draining = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(worker.stop() for worker in self.workers))
        self.fail_all(DrainingError())

    def _new_worker(self) -> Worker:
        return Worker(self.config, self.spec, self.open_session, self._change.set)

    def _retry_after(self) -> int:
        """Return the seconds until a place is likely: those of the batches that wait."""
        batches = len(self.waiting) / max(1, self.config.max_batch_size * len(self.workers))
        return 1 + int(batches * self.seconds)

    async def _run(self, index: int) -> None:
        """Work off the queue with one worker, and replace it when it ends."""
        while True:
            if not self.workers[index].is_ready:
                await self._replace(index)
            batch = RequestBatch(self.workers[index], await self._next_batch(self.workers[index]))
            self.batches.append(batch)
            try:
                await self._answer(batch)
            except Exception as error:
                logger.error("a batch failed: %s", type(error).__name__)  # noqa: TRY400
                await batch.worker.stop()
            finally:
                self.batches.remove(batch)
                fault = EngineFaultError("the worker failed")
                for entry in batch.entries:
                    _set(entry.future, DrainingError() if self.is_draining else fault)

    async def _replace(self, index: int) -> None:
        """Replace a worker that has ended; repeat until one is ready.

        While no worker can be started, requests fail at once.
        """
        pause = 0.0
        while True:
            await self.workers[index].stop()
            await asyncio.sleep(pause)
            worker = self.workers[index] = self._new_worker()
            try:
                if await worker.start() == self.info:
                    logger.warning("a worker has ended and was replaced")
                    self.fault = ""
                    return
                reason = "the stack has changed since the server started"
            except Exception as error:  # whatever it is, the next attempt may succeed
                reason = str(error)
            logger.error("a worker cannot be started: %s", reason)
            pause = min(MAX_PAUSE, 2 * pause + 1)
            if not any(other.is_ready for other in self.workers if other is not worker):
                self.fault = f"no worker can be started: {reason}"
                self.fail_all(EngineFaultError(self.fault), running=False)

    async def _next_batch(self, worker: Worker) -> list[Entry]:
        """Return the oldest request with those that fit into its batch; none if the worker ends.

        The first one waits `batch_window` seconds for others, unless the batch is full.
        """
        loop = asyncio.get_running_loop()
        while worker.is_ready:
            entries = self._matching()
            until = entries[0].arrived + self.config.batch_window if entries else None
            if until is not None and (self._is_full(entries) or until <= loop.time()):
                self.waiting = [entry for entry in self.waiting if entry not in entries]
                self._was_check = entries[0].request is None
                return entries
            self._change.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout_at(until):
                    await self._change.wait()
        return []

    def _matching(self) -> list[Entry]:
        """Return the next request and those of equal settings, up to a batch; empty if none waits.

        The oldest one is next, but a check goes before images, and is alone. After a check the
        oldest one is next, whether it is a check or not, so that checks stop no images.
        """
        checks = [e for e in self.waiting if e.request is None]
        if checks and (not self._was_check or checks[0] is self.waiting[0]):
            return checks[:1]
        batch: list[Entry] = []
        total, key = 0, None
        for entry in self.waiting:
            if entry.request is None or (batch and entry.request.batch_key != key):
                continue
            total += entry.num_images
            if batch and total > self.config.max_batch_size:
                break
            batch.append(entry)
            key = entry.request.batch_key
        return batch

    def _is_full(self, entries: Sequence[Entry]) -> bool:
        is_check = entries[0].request is None
        return is_check or sum(e.num_images for e in entries) >= self.config.max_batch_size

    async def _answer(self, batch: RequestBatch) -> None:
        """Answer the requests of a batch. Those that fail together are repeated one by one."""
        entries = [entry for entry in batch.entries if not entry.future.done()]
        if not entries:
            return
        values = await self._call(batch, entries)
        repeated = []
        for entry, value in zip(entries, values, strict=True):
            if len(entries) > 1 and should_repeat(value):
                repeated.append(entry)
            else:
                _set(entry.future, value)
        for entry in repeated:
            if not entry.future.done():
                _set(entry.future, *await self._call(batch, [entry]))

    async def _call(self, batch: RequestBatch, entries: Sequence[Entry]) -> list[Any]:
        """Return the value or the exception of each request."""
        first, loop = entries[0], asyncio.get_running_loop()

        def on_progress(share: float) -> None:
            for entry in entries:
                entry.share = share
            if batch.is_abandoned:
                batch.worker.cancel_jobs()

        started = loop.time()
        try:
            if first.request is None:
                return [await batch.worker.call(first.method, *first.arguments)]
            requests = [entry.request for entry in entries]
            values = await batch.worker.call("generate", requests, on_progress=on_progress)
        except (UserError, EngineFaultError) as error:
            return [error] * len(entries)
        if [len(images) for images in values] != [e.num_images for e in entries]:
            raise ValueError("the worker's answers are not those of its requests")
        self.seconds = loop.time() - started
        if self.on_batch is not None:
            self.on_batch(sum(e.num_images for e in entries), self.seconds)
        return list(values)


def should_repeat(value: Any) -> bool:
    """Return whether a request failed in a way that another one of its batch may have caused."""
    if isinstance(value, list):
        reasons = [v.trace.reason for v in value if isinstance(v, GeneratedImage)]
        return any(reason.startswith(("error:", "calls:")) for reason in reasons)
    if isinstance(value, JobFailure):
        return value.kind != "cancelled"
    return isinstance(value, UserError | JobError)


def _set(future: asyncio.Future[Any], value: Any) -> None:
    if future.done():
        return
    if isinstance(value, Exception):
        future.set_exception(value)
    else:
        future.set_result(value)
