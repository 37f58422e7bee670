"""What an engine is, and the worker that does the batches of a run for it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Protocol, Self

from safegen.evaluation.run.folder import Run
from safegen.evaluation.run.generate import BatchGenerator
from safegen.evaluation.run.judge import BatchScorer, Evaluators
from safegen.stack import Stack
from safegen.stack_loader import StackLoader

if TYPE_CHECKING:
    from safegen.evaluation.engines.writer import RunWriter


class BatchWorker:
    """Generator and scorer of a run's batches. It writes images, and no journal."""

    def __init__(
        self,
        run: Run,
        stacks: Sequence[Stack] = (),
        loader: StackLoader | None = None,
        evaluators: Evaluators | None = None,
    ) -> None:
        """Store what the work needs.

        Args:
            run: the run.
            stacks: its stacks, to generate images.
            loader: loads the stacks; nothing is generated without.
            evaluators: judge and networks; nothing is judged without.
        """
        self.run, self.stacks = run, tuple(stacks)
        self.loader, self.evaluators = loader, evaluators
        self._resources = ExitStack()

    def __enter__(self) -> Self:
        """Return the worker."""
        if self.loader:
            self.generator = BatchGenerator(self.run, self.stacks, self.loader)
            self._resources.enter_context(self.generator)
        if self.evaluators:
            self.scorer = BatchScorer(self.run, self.evaluators)
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the patches of the last stack."""
        self._resources.close()


class BatchEngine(Protocol):
    """Where and in which order the jobs of a run are done."""

    def check(self) -> None:
        """Check that the engine can run here.

        Raises:
            MissingExtraError: a library is not installed.
        """

    def run(self, writer: RunWriter, worker: BatchWorker) -> None:
        """Do every job of a writer, and have the results written in the order of the jobs.

        Args:
            writer: names the jobs, and writes the results.
            worker: does a job; an engine of other processes makes workers like it there.

        Raises:
            UserError: see `BatchGenerator.generate` and `BatchScorer.score`.
        """
