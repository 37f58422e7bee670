"""A worker process as the server sees it: start, jobs, a sign of life, and its end."""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import threading
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from safegen.core import errors
from safegen.core.errors import UserError
from safegen.serve.config import ServerConfig
from safegen.serve.engine.base import EngineFaultError
from safegen.serve.engine.process import (
    Job,
    JobCancel,
    JobFailure,
    JobProgress,
    JobResult,
    Method,
    run_worker,
)
from safegen.serve.messages import StackInfo

OnProgress = Callable[[float], None]


class CancelledJobError(EngineFaultError):
    """The job was cancelled."""


class OutOfMemoryError(EngineFaultError):
    """The worker had too little memory for the job."""


class _Call:
    """A job without an answer yet."""

    def __init__(self, now: float, on_progress: OnProgress | None) -> None:
        self.future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.seen, self.on_progress = now, on_progress


class Worker:
    """One worker process."""

    def __init__(self, config: ServerConfig, spec: str | None) -> None:
        self.config, self.spec = config, spec
        self._numbers = itertools.count()
        self._calls: dict[int, _Call] = {}
        self._process: Any = None
        self._connection: Connection | None = None

    @property
    def is_alive(self) -> bool:
        """Whether the process runs."""
        return self._process is not None and bool(self._process.is_alive())

    @property
    def pid(self) -> int | None:
        """Id of the process; None before its start."""
        return None if self._process is None else self._process.pid

    async def start(self) -> StackInfo:
        """Start the process, and return the stack once it is loaded and tested.

        Raises:
            UserError: it cannot be loaded, or the self-test fails.
            EngineFaultError: the process died, or took too long.
        """
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(
            target=run_worker, args=(theirs, self.config, self.spec), daemon=True
        )
        await asyncio.to_thread(process.start)
        theirs.close()
        self._process, self._connection = process, ours
        self._calls = {-1: _Call(self._now(), None)}
        loop = asyncio.get_running_loop()
        threading.Thread(
            target=_read, args=(ours, loop, self._handle, self._end), daemon=True
        ).start()
        info: StackInfo = await self._wait(-1, self.config.start_timeout)
        return info

    async def call(
        self, method: Method, *arguments: Any, on_progress: OnProgress | None = None
    ) -> Any:
        """Return the value of a session's method. If this is cancelled, so is the job.

        Raises:
            UserError: the arguments are wrong.
            OutOfMemoryError: the worker had too little memory.
            CancelledJobError: the job was cancelled.
            EngineFaultError: the worker failed, died or gave no sign of life.
        """
        if self._connection is None or not self.is_alive:
            raise EngineFaultError("the worker is not running")
        number = next(self._numbers)
        self._calls[number] = _Call(self._now(), on_progress)
        job = Job(number, method, arguments)
        try:
            await asyncio.to_thread(self._connection.send, job)
        except OSError as error:
            self._calls.pop(number, None)
            raise EngineFaultError("the worker died") from error
        return await self._wait(number, self.config.worker_timeout)

    def cancel_jobs(self) -> None:
        """Ask the worker to stop what it does after its next step."""
        for number in self._calls:
            with suppress(OSError, AttributeError):
                self._connection.send(JobCancel(number))  # type: ignore[union-attr]

    async def stop(self) -> None:
        """End the process at once."""
        process, connection = self._process, self._connection
        if process is not None and process.is_alive():
            process.kill()
        if process is not None:
            await asyncio.to_thread(process.join, 10)
        if connection is not None:
            connection.close()
        self._end()

    async def _wait(self, number: int, timeout: float) -> Any:
        """Return the answer of a job; kill the worker after a time without a sign of life."""
        call = self._calls[number]
        try:
            while True:
                rest = call.seen + timeout - self._now()
                await asyncio.wait({call.future}, timeout=max(rest, 0.001))
                if call.future.done():
                    return call.future.result()
                if call.seen + timeout <= self._now():
                    await self.stop()
                    raise EngineFaultError(f"the worker gave no sign of life for {timeout:g} s")
        finally:
            self._calls.pop(number, None)

    def _handle(self, message: JobProgress | JobResult | JobFailure) -> None:
        """Take a message of the process; runs in the event loop."""
        call = self._calls.get(message.number)
        if call is None or call.future.done():
            return
        call.seen = self._now()
        if isinstance(message, JobProgress):
            if call.on_progress is not None:
                call.on_progress(message.share)
        elif isinstance(message, JobResult):
            call.future.set_result(message.value)
        else:
            call.future.set_exception(to_exception(message))

    def _end(self) -> None:
        """Fail every job: the process has ended."""
        for call in self._calls.values():
            if not call.future.done():
                call.future.set_exception(EngineFaultError("the worker died"))

    def _now(self) -> float:
        return asyncio.get_running_loop().time()


def _read(
    connection: Connection,
    loop: asyncio.AbstractEventLoop,
    handle: Callable[[Any], None],
    end: Callable[[], None],
) -> None:
    """Pass the messages of a process to the event loop until its end."""
    with suppress(RuntimeError):  # the loop is closed
        try:
            while True:
                loop.call_soon_threadsafe(handle, connection.recv())
        except (EOFError, OSError):
            loop.call_soon_threadsafe(end)


def to_exception(failure: JobFailure) -> Exception:
    """Return the exception of a job."""
    if failure.kind == "cancelled":
        return CancelledJobError("the request was cancelled")
    if failure.kind == "memory":
        return OutOfMemoryError("out of memory")
    if failure.kind == "user":
        kind = getattr(errors, failure.error, UserError)
        error: UserError = UserError.__new__(kind if issubclass(kind, UserError) else UserError)
        Exception.__init__(error, failure.message)
        return error
    return EngineFaultError(f"the worker failed: {failure.message}")
