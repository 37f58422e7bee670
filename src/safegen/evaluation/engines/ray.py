"""The engine of several processes: Ray actors do the batches, and one process writes the records.

No image passes through the driver or Ray's object store: an actor writes it into the run's folder,
which all nodes share, and returns its records.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from types import ModuleType
from typing import Any

from pydantic import Field

from safegen.core.errors import ConfigError
from safegen.core.settings import MAX_THREADS, MAX_WORKERS, BaseSettings, raises_config_error
from safegen.evaluation.engines.actor import BatchActor, BatchReply, WorkerConfig
from safegen.evaluation.engines.base import BatchWorker
from safegen.evaluation.engines.cluster import import_ray, ray_cluster
from safegen.evaluation.engines.driver import BatchDriver
from safegen.evaluation.engines.writer import RunWriter
from safegen.evaluation.run.generate import BatchJob

RETRIES = 3
"""Times that a batch is done again after its actor's process has ended."""
AHEAD = 4
"""Batches per actor that are begun before the first of them is written."""
START_SECONDS, END_SECONDS = 300.0, 10.0
"""Longest wait for the first actor, and for the end of those that are killed."""


@raises_config_error
class RayBatchEngine(BaseSettings):
    """Settings of the engine `ray`: Ray actors do the batches of a run; see `BatchEngine`."""

    workers: int | None = Field(default=None, ge=1, le=MAX_WORKERS)
    """Actors. Each loads the model. Default: one per GPU; without GPUs one per CPU but one."""
    address: str | None = None
    """Address of a Ray cluster. Default: one on this machine, which ends with the run."""
    threads: int = Field(default=1, ge=1, le=MAX_THREADS)
    """CPU threads of each actor. Another number rounds differently."""

    def check(self) -> None:
        """Check that Ray is installed.

        Raises:
            MissingExtraError: it is not.
        """
        import_ray(is_local=self.address is None)

    def run(self, writer: RunWriter, worker: BatchWorker) -> None:
        """Do every job of a writer; see `BatchEngine.run`.

        Raises:
            MissingExtraError: Ray is not installed.
            ConfigError: no cluster answers, it has no room for an actor, or a batch ended its actor
                again and again.
        """
        config = WorkerConfig.of(worker, threads=self.threads)
        jobs = writer.jobs()
        first = next(jobs, None)
        if first is None:
            return
        if worker.loader:
            worker.loader.release()
        gpus = int(config.device == "cuda")
        with self.connect(gpus=gpus) as (ray, count):
            pool = ActorPool(ray, config, count, num_cpus=self.threads, num_gpus=gpus)
            try:
                BatchDriver(writer, pool, window=AHEAD * count).run(chain([first], jobs))
            finally:
                pool.kill()

    @contextmanager
    def connect(self, *, gpus: int) -> Iterator[tuple[ModuleType, int]]:
        """Yield Ray, connected to the cluster, and the number of workers.

        Args:
            gpus: GPUs of a worker, 0 or 1.

        Raises:
            MissingExtraError: Ray is not installed.
            ConfigError: no cluster answers.
        """
        cpus = self.workers * self.threads + 1 if self.workers else os.cpu_count() or 1
        with ray_cluster(self.address, num_cpus=cpus) as ray:
            yield ray, self.workers or count_workers(ray.cluster_resources(), self.threads, gpus)


def count_workers(resources: Mapping[str, float], threads: int, gpus: int) -> int:
    """Return how many workers a cluster holds beside the driver, at least one."""
    if gpus:
        return max(1, int(resources.get("GPU", 0)))
    return max(1, int(resources.get("CPU", 1) - 1) // threads)


def death_error(place: str, error: Exception) -> ConfigError:
    """Return the error of a worker that ended again and again.

    Args:
        place: what it did.
        error: the error of Ray.
    """
    return ConfigError(
        f"a worker must live through {place}, it ended {RETRIES + 1} times "
        f"({type(error).__name__}). Use fewer --workers if memory is short, and run the same "
        "command again to resume."
    )


def room_error(num_cpus: int, num_gpus: int) -> ConfigError:
    """Return the error of a cluster in which no worker starts that needs some CPUs and GPUs."""
    needs = f"{num_cpus} CPU" + ", 1 GPU" * num_gpus
    return ConfigError(
        f"the cluster must have room for a worker ({needs}), got none in {START_SECONDS:g} "
        "seconds. Use fewer --threads, or another --address."
    )


class ActorPool:
    """Actors of Ray; see `WorkerPool`.

    Each has one job at a time. Ray starts an actor again whenever its process ends, and gives it
    its job again, up to `RETRIES` times.
    """

    def __init__(
        self, ray: ModuleType, config: WorkerConfig, count: int, *, num_cpus: int, num_gpus: int
    ) -> None:
        """Start the actors; `wait` returns each once it runs."""
        actor = ray.remote(
            max_restarts=-1, max_task_retries=RETRIES, num_cpus=num_cpus, num_gpus=num_gpus
        )(BatchActor)
        self.ray, self._cpus, self._gpus = ray, num_cpus, num_gpus
        self._config = ray.put(config)  # an actor that starts again reads it again
        self.actors = [actor.remote(self._config) for _ in range(count)]
        self.free_workers = list[Any]()
        self._starting = {actor.start.remote(): actor for actor in self.actors}
        self._running = dict[Any, tuple[Any, int, str]]()

    def submit(self, worker: Any, job: BatchJob, position: int) -> None:
        """Give a job to an actor."""
        place = f"batch {job.batch.number} of {job.batch.stack.name!r}"
        self._running[worker.run.remote(job)] = worker, position, place

    def wait(self) -> Sequence[tuple[Any, int | None, BatchReply | None]]:
        """Return the next actor that has started, or that has answered; see `WorkerPool.wait`."""
        timeout = None if self.free_workers or self._running else START_SECONDS
        ready, _ = self.ray.wait([*self._starting, *self._running], timeout=timeout)
        if not ready:
            raise room_error(self._cpus, self._gpus)
        return [self._receive(reference) for reference in ready]

    def kill(self) -> None:
        """End the actors, and wait until those with a job have: they write into the run."""
        for actor in self.actors:
            self.ray.kill(actor)
        if self._running:
            running = list(self._running)
            self.ray.wait(running, num_returns=len(running), timeout=END_SECONDS)

    def _receive(self, reference: Any) -> tuple[Any, int | None, BatchReply | None]:
        """Return the actor, position and reply of a call.

        Raises:
            ConfigError: its process ended again and again.
        """
        from ray.exceptions import RayError, RayTaskError

        starting = self._starting.pop(reference, None)
        actor, position, place = (
            self._running.pop(reference) if starting is None else (starting, None, "its start")
        )
        try:
            return actor, position, self.ray.get(reference)
        except RayTaskError:
            raise  # a fault of ours, with the actor's traceback
        except RayError as error:
            raise death_error(place, error) from error
