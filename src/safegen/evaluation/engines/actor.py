"""Work of a Ray actor: it opens stacks and judges as the driver would, and does whole batches."""

from __future__ import annotations

import os
import platform
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from safegen.core import errors
from safegen.core.allocator import keep_freed_memory
from safegen.core.errors import FileError, SafegenWarning, UserError
from safegen.core.files import share_claim
from safegen.evaluation.engines.base import BatchWorker
from safegen.evaluation.protocol import Protocol
from safegen.evaluation.run.folder import Run
from safegen.evaluation.run.generate import BatchJob, BatchTooLargeError, GeneratedBatch
from safegen.evaluation.run.judge import BatchScores, load_evaluators
from safegen.evaluation.run.records import RunCard
from safegen.stack import Stack
from safegen.stack_loader import StackLoader


@dataclass(frozen=True)
class WorkerConfig:
    """What a worker in another process is made from; it has no model."""

    directory: Path
    """Working directory, to which paths are relative."""
    folder: Path
    """Directory of the run."""
    card: RunCard
    stacks: Sequence[Stack]
    threads: int
    device: str | None
    """Torch device; None generates nothing."""
    dtype: str
    allow_pickle: bool
    protocol: Protocol | None
    """Names the judge and the networks; None judges nothing."""
    features: bool
    lpips: bool

    @classmethod
    def of(cls, worker: BatchWorker, *, threads: int) -> WorkerConfig:
        """Return what makes a worker like another one."""
        loader, evaluators = worker.loader, worker.evaluators
        device = None if loader is None else loader.device
        return cls(
            directory=Path.cwd(),
            folder=worker.run.folder.absolute(),
            card=worker.run.card,
            stacks=worker.stacks,
            threads=threads,
            # a worker sees its own GPU alone
            device="cuda" if device and device.startswith("cuda") else device,
            dtype="fp32" if loader is None else loader.dtype,
            allow_pickle=loader is not None and loader.allow_pickle,
            protocol=None if evaluators is None else evaluators.protocol,
            features=evaluators is not None and evaluators.extractor is not None,
            lpips=evaluators is not None and evaluators.lpips is not None,
        )


@dataclass(frozen=True)
class WorkerFailure:
    """Error of the user's, which crosses processes as its class and its message."""

    kind: str
    message: str

    def to_error(self) -> UserError:
        """Return the error."""
        kind = getattr(errors, self.kind, UserError)
        error: UserError = UserError.__new__(kind if issubclass(kind, UserError) else UserError)
        Exception.__init__(error, self.message)
        return error


@dataclass(frozen=True)
class BatchReply:
    """What a worker did about a job. It has records, and no image."""

    images: GeneratedBatch | None = None
    scores: BatchScores | None = None
    is_too_large: bool = False
    """Whether the batch did not fit in memory, so that nothing was done."""
    failure: WorkerFailure | None = None
    warnings: tuple[str, ...] = ()
    """Warnings, for the driver to show."""


def prepare_process(directory: Path, folder: Path, threads: int) -> None:
    """Enter the driver's directory, and set the number of CPU threads and what is kept of memory.

    Args:
        directory: the driver's working directory.
        folder: another directory that must be here.
        threads: the number of threads.

    Raises:
        FileError: this machine lacks a directory.
    """
    for path in (directory, folder):
        if not path.is_dir():
            raise FileError(
                f"{path} must be on every node, got none on {platform.node()}. "
                "Use a file system that the nodes share."
            )
    import torch

    os.chdir(directory)
    torch.set_num_threads(threads)
    keep_freed_memory()


class BatchActor:
    """Does jobs in a process of its own, and keeps a stack open until a job needs another one."""

    def __init__(self, config: WorkerConfig) -> None:
        self.config = config
        self._worker: BatchWorker | None = None
        self._resources = ExitStack()  # open until the process ends

    def start(self) -> None:
        """Return once the process runs. Models are loaded with the first job."""

    def run(self, job: BatchJob) -> BatchReply:
        """Do a job, with the images written when this returns."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", SafegenWarning)
            try:
                reply = self._run(job)
            except BatchTooLargeError:
                reply = BatchReply(is_too_large=True)
            except UserError as error:
                reply = BatchReply(failure=WorkerFailure(type(error).__name__, str(error)))
            except OSError as error:
                reply = BatchReply(failure=WorkerFailure(FileError.__name__, self._explain(error)))
        own = (w for w in caught if issubclass(w.category, SafegenWarning))
        return replace(reply, warnings=tuple(str(w.message) for w in own))

    def _run(self, job: BatchJob) -> BatchReply:
        worker, images, scores = self._open(), None, None
        if job.generate:
            images = worker.generator.generate(job)
        if job.needs_scores:
            scores = worker.scorer.score(job, images.images if images else None)
        return BatchReply(replace(images, images=()) if images else None, scores)

    def _open(self) -> BatchWorker:
        """Return the worker; the first call makes it."""
        if self._worker is None:
            from safegen.core.quiet import silence_libraries

            config = self.config
            prepare_process(config.directory, config.folder, config.threads)
            with silence_libraries():
                self._resources.enter_context(share_claim(self.config.folder))
                self._worker = self._resources.enter_context(self._make_worker())
        return self._worker

    def _make_worker(self) -> BatchWorker:
        config = self.config
        loader = evaluators = None
        if config.device is not None:
            loader = StackLoader(
                device=config.device, dtype=config.dtype, allow_pickle=config.allow_pickle
            )
        if config.protocol is not None:
            evaluators = load_evaluators(
                config.protocol, features=config.features, lpips=config.lpips
            )
        return BatchWorker(Run(config.folder, config.card), config.stacks, loader, evaluators)

    def _explain(self, error: OSError) -> str:
        return (
            f"{self.config.folder} cannot be written: {error.strerror or error}. "
            "Fix that and run the same command again to resume."
        )
