"""A worker process as the server sees it: start, jobs, a sign of life, and its end."""

from __future__ import annotations

import asyncio
import atexit
import itertools
import multiprocessing
import shutil
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from tempfile import mkdtemp
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
    SessionOpener,
    open_stack,
    run_worker,
)
from safegen.serve.messages import StackInfo

OnProgress = Callable[[float], None]
START = -1
"""Number of the job that stands for the start."""
JOIN_SECONDS = 10.0
"""Most seconds to wait for the end of a process that was killed."""


class JobError(EngineFaultError):
    """A job failed, and its worker can do the next one."""


class CancelledJobError(EngineFaultError):
    """The job was cancelled."""


class OutOfMemoryError(JobError):
    """The worker had too little memory for the job."""


class _Call:
    """A job without an answer yet."""

    def __init__(self, now: float, on_progress: OnProgress | None = None) -> None:
        self.future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.seen, self.on_progress = now, on_progress


class Worker:
    """One worker process, from its start to its end. It is not started twice."""

    def __init__(
        self,
        config: ServerConfig,
        spec: str | None,
        open_session: SessionOpener = open_stack,
        on_end: Callable[[], None] | None = None,
    ) -> None:
        """Store what `start` needs.

        Args:
            config: settings of the server.
            spec: stack; None for the guards of another server.
            open_session: opens the session, in the worker process.
            on_end: called in the event loop when the process has ended.
        """
        self.config, self.spec, self.open_session = config, spec, open_session
        self.on_end, self.is_ready, self.has_ended = on_end, False, False
        self._numbers = itertools.count()
        self._calls: dict[int, _Call] = {}
        self._outbox: SimpleQueue[Job | JobCancel | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._connection: Connection | None = None
        self._process: Any = None
        self._kill: Callable[[], None] | None = None
        self._joining: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """Id of the process; None before its start."""
        return None if self._process is None else self._process.pid

    async def start(self) -> StackInfo:
        """Start the process, and return the stack once it is loaded and tested.

        Raises:
            UserError: it cannot be loaded, or the self-test fails.
            EngineFaultError: the process died, took too long, or was stopped.
        """
        if self.has_ended:
            raise EngineFaultError("the worker was stopped")
        self._calls[START] = _Call(self._now())
        try:
            self._start_process()
        except (OSError, RuntimeError) as error:  # no process or thread more is allowed
            await self.stop()
            raise EngineFaultError(f"a worker cannot be started: {error}") from error
        info: StackInfo = await self._wait(START, self.config.start_timeout)
        self.is_ready = not self.has_ended
        return info

    def _start_process(self) -> None:
        """Start the process, and the threads at this end of its pipe."""
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        folder = Path(mkdtemp(prefix="safegen-worker-"))
        arguments = (theirs, self.config, self.spec, folder, self.open_session)
        self._process = context.Process(target=run_worker, args=arguments, daemon=True)
        self._kill = partial(_kill, self._process, folder)
        atexit.register(self._kill)  # before multiprocessing waits for the process
        self._process.start()
        theirs.close()
        loop = asyncio.get_running_loop()
        ends = self._connection, loop, self._handle, self._end
        self._threads = [
            threading.Thread(target=_read, args=ends, daemon=True),
            threading.Thread(target=_write, args=(self._connection, self._outbox), daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    async def call(
        self, method: Method, *arguments: Any, on_progress: OnProgress | None = None
    ) -> Any:
        """Return the value of a session's method.

        Raises:
            UserError: the arguments are wrong.
            JobError: the worker failed, and can do the next job.
            CancelledJobError: the job was cancelled.
            EngineFaultError: the worker died or gave no sign of life.
        """
        if not self.is_ready:
            raise EngineFaultError("the worker is not running")
        number = next(self._numbers)
        self._calls[number] = _Call(self._now(), on_progress)
        self._outbox.put(Job(number, method, arguments))
        return await self._wait(number, self.config.worker_timeout)

    def cancel_jobs(self) -> None:
        """Ask the worker to stop what it does after its next step."""
        for number in self._calls:
            self._outbox.put(JobCancel(number))

    async def stop(self) -> None:
        """End the process at once, and remove its files."""
        self._end()
        if self._kill is not None:
            self._joining = self._joining or asyncio.create_task(asyncio.to_thread(self._join))
            await asyncio.shield(self._joining)

    def _join(self) -> None:
        """Kill the process, wait for the end of its threads, and close the pipe."""
        assert self._kill is not None
        self._kill()
        atexit.unregister(self._kill)
        for thread in filter(threading.Thread.is_alive, self._threads):
            thread.join(JOIN_SECONDS)
        if self._connection is not None:
            self._connection.close()

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
            if call.future.done() and not call.future.cancelled():
                call.future.exception()  # it is known

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
        if self.has_ended:
            return
        self.has_ended, self.is_ready = True, False
        self._outbox.put(None)
        for call in self._calls.values():
            if not call.future.done():
                call.future.set_exception(EngineFaultError("the worker died"))
        if self.on_end is not None:
            self.on_end()

    def _now(self) -> float:
        return asyncio.get_running_loop().time()


def _kill(process: Any, folder: Path) -> None:
    """Kill a process, wait for its end, and remove its folder; at the server's exit, too."""
    if process.pid is not None:
        process.kill()
        process.join(JOIN_SECONDS)
    shutil.rmtree(folder, ignore_errors=True)


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
        except Exception:  # the pipe is closed, or the process has sent something else
            loop.call_soon_threadsafe(end)


def _write(connection: Connection, outbox: SimpleQueue[Job | JobCancel | None]) -> None:
    """Send jobs to a process until its end, or a None."""
    with suppress(Exception):  # the reader learns of the end
        for message in iter(outbox.get, None):
            connection.send(message)


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
    return JobError(f"the worker failed: {failure.message}")
