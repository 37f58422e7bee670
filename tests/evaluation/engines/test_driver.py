"""The driver of several workers: replies in any order give the journals of one process."""

from __future__ import annotations

import json
import os
import random
import sys
from dataclasses import replace

import pytest

from safegen.core.errors import ConfigError, FileError, MissingExtraError
from safegen.core.files import IN_USE, atomic_write, claim_folder, share_claim
from safegen.core.progress import no_progress
from safegen.evaluation.engines.actor import BatchReply, WorkerFailure, prepare_process
from safegen.evaluation.engines.cluster import ENVIRONMENT, LOOPBACK
from safegen.evaluation.engines.driver import BatchDriver, WorkerWarning
from safegen.evaluation.engines.ray import RayBatchEngine, count_workers
from safegen.evaluation.engines.writer import RunWriter
from safegen.evaluation.run.folder import DETECTIONS, SAMPLES, TIMINGS, Run
from safegen.evaluation.run.generate import Batch, BatchJob, split_batches
from tests.evaluation.crafted import write_run
from tests.evaluation.test_run import contents

WORKERS, WINDOW = 3, 5


class ShuffledPool:
    """Workers of this process that answer in a random order."""

    def __init__(self, worker, seed, spoil=lambda job, reply: reply):
        self.worker, self.random, self.spoil = worker, random.Random(seed), spoil
        self.free_workers, self.starting, self.running = [], list(range(WORKERS)), {}

    def submit(self, worker, job, position):
        assert worker not in self.running
        self.running[worker] = position, job

    def wait(self):
        assert self.starting or self.running, "nothing to wait for"
        worker = self.random.choice([*self.starting, *self.running])
        if worker in self.starting:
            self.starting.remove(worker)
            return [(worker, None, None)]
        position, job = self.running.pop(worker)
        reply = self.spoil(job, None)
        return [(worker, position, reply or self.spoil(job, self.answer(job)))]

    def answer(self, job):
        images = self.worker.generator.generate(job) if job.generate else None
        scores = None
        if job.needs_scores:
            scores = self.worker.scorer.score(job, images.images if images else None)
        return BatchReply(replace(images, images=()) if images else None, scores)


class ShuffledEngine:
    """An engine with workers that answer in a random order."""

    def __init__(self, seed, spoil=lambda job, reply: reply):
        self.seed, self.spoil = seed, spoil

    def check(self):
        pass

    def run(self, writer, worker):
        with worker:
            pool = ShuffledPool(worker, self.seed, self.spoil)
            BatchDriver(writer, pool, window=WINDOW).run(writer.jobs())


def test_replies_in_any_order_and_a_stop_give_the_bytes_of_one_process(go, finished, copy):
    keep = [json.loads(line)["key"] for line in (copy / SAMPLES).read_text().splitlines()][:30]
    for path in copy.glob("*.jsonl"):
        if path.name in ("plan.jsonl", "judges.jsonl", TIMINGS):
            continue
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(line for line in lines if json.loads(line)["key"] in keep))

    def fail(job, reply):
        if job.batch.stack.name == "black-image" and job.batch.number == 1:
            return BatchReply(
                failure=WorkerFailure("FileError", "the disk is full. Free some."),
                warnings=("two patches change the same weights",),
            )
        return reply

    with pytest.warns(WorkerWarning, match="two patches"), pytest.raises(FileError, match="Free"):
        go(copy, engine=ShuffledEngine(2, fail))
    done = [json.loads(line)["key"] for line in (copy / SAMPLES).read_text().splitlines()]
    whole = [json.loads(line)["key"] for line in (finished / SAMPLES).read_text().splitlines()]
    assert done == whole[: len(done)]  # the order of the plan, without a gap
    go(copy, engine=ShuffledEngine(3))
    assert contents(copy) == contents(finished)


def test_a_batch_that_is_too_large_is_halved_and_those_that_run_keep_their_size(go, tmp_path):
    def limit(job, reply):
        if reply is None and job.batch.stack.name == "calm" and job.size > 2:
            return BatchReply(is_too_large=True)
        return reply

    folder = tmp_path / "run"
    few = {"baselines": "none", "until": "generate"}
    go(folder, engine=ShuffledEngine(4, limit), **few)
    records = list(Run.open(folder).timing_records())
    notes = {(r.stack, r.batch): r.size for r in records if r.stage == "memory"}
    sizes = {(r.stack, r.batch): r.size for r in records if r.stage == "generate"}
    assert set(notes.values()) >= {2}
    assert {size for (stack, _), size in sizes.items() if stack == "calm"} == {2}
    assert all(sizes[place] == size for place, size in notes.items())
    before = contents(folder)
    for path in sorted((folder / "images" / "calm").iterdir())[::5]:
        path.unlink()
    go(folder, **few)  # in one process
    assert contents(folder) == before


@pytest.fixture
def writer(tmp_path):
    """Return an open writer of a small run."""
    run = Run.open(write_run(tmp_path / "run"))
    with RunWriter(run, run.samples, None, generates=True, progress=no_progress) as writer:
        yield writer


class OnePool:
    """One worker, for which the first batch is too large."""

    def __init__(self):
        self.free_workers, self.sizes, self.running = ["worker"], [], 0

    def submit(self, worker, job, position):
        self.sizes.append(job.size)
        self.running = position

    def wait(self):
        return [("worker", self.running, BatchReply(is_too_large=len(self.sizes) == 1))]


def test_a_job_that_waits_while_another_is_halved_takes_the_smaller_size(writer):
    batches = split_batches(writer.run, writer.samples, [0, 1])
    jobs = [BatchJob(batch, 2, {}, generate=True) for batch, _ in zip(batches, "ab", strict=False)]
    pool = OnePool()
    BatchDriver(writer, pool, window=WINDOW).run(iter(jobs))
    assert pool.sizes == [2, 1, 1]


def test_a_larger_batch_that_is_halved_later_does_not_raise_the_size_again(writer):
    stack, samples, keys = (
        writer.run.stacks[0],
        writer.samples,
        writer.run.keys(writer.run.stacks[0]),
    )
    writer.size = 8
    job = BatchJob(Batch(stack, 0, samples[:8], keys[:8], []), 8, {}, generate=True)
    assert writer.halve(writer.halve(job)).size == 2
    assert (writer.halve(job).size, writer.size) == (2, 2)


def test_a_machine_without_the_folder_is_named_on_every_system(monkeypatch, tmp_path):
    monkeypatch.delattr(os, "uname", raising=False)  # Windows has none
    with pytest.raises(FileError, match="must be on every node, got none on"):
        prepare_process(tmp_path, tmp_path / "missing", 1)


def test_judging_alone_needs_no_stack(go, finished, copy):
    from safegen.evaluation.evaluate import judge_run

    (copy / DETECTIONS).unlink()
    judge_run(Run.open(copy), engine=ShuffledEngine(5))
    assert (copy / DETECTIONS).read_bytes() == (finished / DETECTIONS).read_bytes()


def test_a_missing_library_is_said_before_anything_is_loaded(go, monkeypatch, tmp_path):
    for name in ENVIRONMENT | LOOPBACK:
        monkeypatch.setenv(name, "0")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"engine ray needs ray; .*safegen\[ray\]"):
        go(tmp_path / "run", engine=RayBatchEngine())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("resources", "threads", "gpus", "workers"),
    [({"CPU": 8}, 1, 0, 7), ({"CPU": 8}, 2, 0, 3), ({"CPU": 1}, 4, 0, 1), ({"GPU": 4}, 1, 1, 4)],
)
def test_the_workers_of_a_cluster_leave_a_cpu_to_the_driver(resources, threads, gpus, workers):
    assert count_workers(resources, threads, gpus) == workers


def test_an_error_of_a_worker_keeps_its_class_and_its_message():
    error = WorkerFailure("ConfigError", "steps must be >= 1, got 0.").to_error()
    assert (type(error), str(error)) == (ConfigError, "steps must be >= 1, got 0.")
    assert type(WorkerFailure("KeyError", "x").to_error()).__name__ == "UserError"


def test_a_shared_claim_lets_another_process_write_in_a_claimed_folder(tmp_path):
    folder = tmp_path / "run"
    with claim_folder(folder):
        (folder / "images").mkdir()
    (folder / IN_USE).mkdir(parents=True)
    with share_claim(folder), atomic_write(folder / "images" / "a.png") as temporary:
        assert temporary.is_relative_to(folder / IN_USE)
        temporary.write_bytes(b"png")
    assert [p.name for p in (folder / "images").iterdir()] == ["a.png"]
