"""Main function of a worker process: it loads one session and answers jobs over a pipe."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal

from safegen.core.errors import UserError, is_out_of_memory
from safegen.serve.config import ServerConfig

Method = Literal["generate", "check_prompts", "check_images"]
"""Method of a session that a job calls."""
SessionOpener = Callable[[ServerConfig, str | None], AbstractContextManager[Any]]
"""Opens the session of a stack, or of the guards of another server; importable by its name."""
OOM_SCORE = "500"
"""Makes Linux end a worker before the server when memory runs out."""


@dataclass(frozen=True)
class Job:
    """Call of a method of the session."""

    number: int
    method: Method
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class JobCancel:
    """Wish that a job ends after its next step."""

    number: int


@dataclass(frozen=True)
class JobProgress:
    """Part of a job that is done; also the sign that the worker lives."""

    number: int
    share: float


@dataclass(frozen=True)
class JobResult:
    """Value of a job; the number -1 is the loading of the stack."""

    number: int
    value: Any


@dataclass(frozen=True)
class JobFailure:
    """Why a job has no value."""

    number: int
    kind: Literal["user", "memory", "fault", "cancelled"]
    error: str
    """Name of the exception's class."""
    message: str
    """One line. That of a fault quotes no prompt."""


class _CancelledJob(Exception):  # noqa: N818
    """The job was cancelled."""


@contextmanager
def open_stack(config: ServerConfig, spec: str | None) -> Iterator[Any]:
    """Yield the session of a stack; see `safegen.serve.engine.session.open_session`."""
    import tqdm

    from safegen.core.quiet import silence_libraries

    # its default lock is a named semaphore, which stays behind when the worker is killed
    tqdm.tqdm.set_lock(threading.RLock())
    with silence_libraries():
        from safegen.serve.engine.session import open_session
    with silence_libraries(), open_session(config, spec) as session:
        yield session


def run_worker(
    connection: Connection,
    config: ServerConfig,
    spec: str | None,
    folder: Path,
    open_session: SessionOpener = open_stack,
) -> None:
    """Load a session, send its stack, and answer jobs until the server ends.

    Args:
        connection: pipe to the server.
        config: settings of the server.
        spec: stack; None for the guards of another server.
        folder: folder for temporary files, removed at the end.
        open_session: opens the session.
    """
    for name in ("SIGINT", "SIGTERM"):  # the server ends its workers itself
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(OOM_SCORE, encoding="ascii")
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
    threading.Thread(target=_end_with_server, args=(folder,), daemon=True).start()
    worker = _Worker(connection)
    try:
        with open_session(config, spec) as session:
            connection.send(JobResult(-1, session.info))
            worker.serve(session)
    except Exception as error:
        with suppress(OSError):  # the server has ended
            connection.send(to_failure(-1, error))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _end_with_server(folder: Path) -> None:
    """End this process as soon as the server has ended, also in the middle of a job."""
    server = multiprocessing.parent_process()
    if server is not None:
        wait([server.sentinel])
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(1)


class _Worker:
    """The loop over jobs, and those that arrive while one runs."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.waiting: deque[Job] = deque()
        self.cancelled: set[int] = set()
        self.has_broken_device = False

    def serve(self, session: Any) -> None:
        while not self.has_broken_device:
            while not self.waiting:
                self._receive()
            job = self.waiting.popleft()
            self.connection.send(self._run(session, job))
            self.cancelled.discard(job.number)

    def _run(self, session: Any, job: Job) -> JobResult | JobFailure:
        def report(share: float) -> None:
            while self.connection.poll():
                self._receive()
            if job.number in self.cancelled:
                raise _CancelledJob
            self.connection.send(JobProgress(job.number, share))

        try:
            report(0.0)
            more = (report,) if job.method == "generate" else ()
            return JobResult(job.number, getattr(session, job.method)(*job.arguments, *more))
        except Exception as error:
            self.has_broken_device = "CUDA error" in str(error)  # it stays until the process ends
            return to_failure(job.number, error)

    def _receive(self) -> None:
        message = self.connection.recv()
        if isinstance(message, JobCancel):
            self.cancelled.add(message.number)
        else:
            self.waiting.append(message)


def to_failure(number: int, error: Exception) -> JobFailure:
    """Return an exception as a message."""
    name = type(error).__name__
    if isinstance(error, _CancelledJob):
        return JobFailure(number, "cancelled", name, "cancelled")
    if isinstance(error, UserError):
        return JobFailure(number, "user", name, str(error))
    if is_out_of_memory(error):
        return JobFailure(number, "memory", name, "out of memory")
    from safegen.serve.engine.base import EngineFaultError

    text = str(error) if isinstance(error, EngineFaultError) else name
    return JobFailure(number, "fault", name, text)
