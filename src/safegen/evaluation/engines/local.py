"""The engine of one process: a batch is judged while the next is generated."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from PIL import Image

from safegen.evaluation.engines.base import BatchWorker
from safegen.evaluation.engines.writer import RunWriter
from safegen.evaluation.run.generate import BatchJob, BatchTooLargeError
from safegen.evaluation.run.judge import BatchScores


class LocalBatchEngine:
    """Does the jobs of a run in this process, scores in a background thread; see `BatchEngine`."""

    def check(self) -> None:
        """Do nothing: it needs no library."""

    def run(self, writer: RunWriter, worker: BatchWorker) -> None:
        """Do every job of a writer. After an error, the last batch is judged again on resuming."""
        running: Future[BatchScores] | None = None
        with worker, ThreadPoolExecutor(1) as pool:
            for job in writer.jobs():
                images = self._generate(writer, worker, job) if job.generate else None
                if job.needs_scores:
                    if running is not None:
                        writer.write_scores(running.result())
                    running = pool.submit(worker.scorer.score, job, images)
            if running is not None:
                writer.write_scores(running.result())

    def _generate(
        self, writer: RunWriter, worker: BatchWorker, job: BatchJob
    ) -> Sequence[Image.Image]:
        """Return the images of a job, which are written with their records."""
        while True:
            try:
                generated = worker.generator.generate(job)
            except BatchTooLargeError:
                job = writer.halve(job)
            else:
                writer.write_images(job, generated)
                return generated.images
