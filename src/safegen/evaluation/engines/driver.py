"""Driver of several workers: it gives them jobs, and has the results written in order."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

from safegen.core.errors import SafegenWarning
from safegen.evaluation.engines.actor import BatchReply
from safegen.evaluation.engines.writer import RunWriter
from safegen.evaluation.run.generate import BatchJob


class WorkerWarning(SafegenWarning):
    """Warning of a worker in another process."""


class WorkerPool(Protocol):
    """Workers, and the jobs that they have not answered."""

    free_workers: list[Any]
    """Workers without a job."""

    def submit(self, worker: Any, job: BatchJob, position: int) -> None:
        """Give a job to a worker.

        Args:
            worker: the worker.
            job: what to do.
            position: position of the job in the plan, which comes back with the reply.
        """

    def wait(self) -> Sequence[tuple[Any, int | None, BatchReply | None]]:
        """Return the next workers that have answered, with position and reply.

        A worker that has started answers without a position and a reply.

        Raises:
            ConfigError: no worker starts, or a job ended its worker again and again.
        """


class BatchDriver:
    """Gives the jobs of a run to workers, and has the results written in the order of the jobs."""

    def __init__(self, writer: RunWriter, pool: WorkerPool, *, window: int) -> None:
        """Store the parts.

        Args:
            writer: names the jobs, and writes the results.
            pool: the workers.
            window: most jobs that are begun before the first of them is written.
        """
        self.writer, self.pool, self.window = writer, pool, window
        self._jobs = dict[int, BatchJob]()  # begun and not written, by position
        self._replies = dict[int, BatchReply]()

    def run(self, jobs: Iterator[BatchJob]) -> None:
        """Do all jobs.

        Raises:
            UserError: what a worker raised. What is written stays.
        """
        position = written = 0
        job = next(jobs, None)
        while job is not None or self._jobs:
            while job is not None and self._can_begin(job):
                # while it waited, the size may have been halved
                job = replace(job, size=self.writer.size_of(job.batch))
                self._jobs[position] = job
                self.pool.submit(self.pool.free_workers.pop(0), job, position)
                position, job = position + 1, next(jobs, None)
            for answer in self.pool.wait():
                self._take(*answer)
            while written in self._replies:
                self._write(self._jobs.pop(written), self._replies.pop(written))
                written += 1

    def _can_begin(self, job: BatchJob) -> bool:
        """Return whether a worker is idle, and the base model's images exist if they are needed."""
        if not self.pool.free_workers or len(self._jobs) >= self.window:
            return False
        base = job.batch.stack.baseline, job.batch.number
        return not job.change or all(
            base != (other.batch.stack.name, other.batch.number) for other in self._unanswered()
        )

    def _unanswered(self) -> list[BatchJob]:
        return [job for position, job in self._jobs.items() if position not in self._replies]

    def _take(self, worker: Any, position: int | None, reply: BatchReply | None) -> None:
        """Take the reply of a worker, which is idle then."""
        if position is None or reply is None:
            self.pool.free_workers.append(worker)
            return
        for message in reply.warnings:
            warnings.warn(message, WorkerWarning, stacklevel=1)
        if reply.failure is not None:
            raise reply.failure.to_error()
        if reply.is_too_large:
            job = self._jobs[position]
            others = [other for other in self._unanswered() if other is not job]
            self._jobs[position] = self.writer.halve(job, others)
            self.pool.submit(worker, self._jobs[position], position)
            return
        self._replies[position] = reply
        self.pool.free_workers.append(worker)

    def _write(self, job: BatchJob, reply: BatchReply) -> None:
        if reply.images is not None:
            self.writer.write_images(job, reply.images)
        if reply.scores is not None:
            self.writer.write_scores(reply.scores)
