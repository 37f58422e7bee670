"""The queue of a stack: batches, cancellation, isolation and replaced workers."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import ClassVar

import pytest
from light_sessions import GUARDS, describe, noise

from safegen.core.errors import ConfigError
from safegen.core.generation import GenerationConfig
from safegen.guards.core.result import GeneratedImage, GuardRecord, GuardTrace
from safegen.serve.config import ServerConfig
from safegen.serve.engine import pool as pool_module
from safegen.serve.engine.base import DrainingError, EngineFaultError, QueueFullError
from safegen.serve.engine.local import LocalEngine
from safegen.serve.engine.worker import CancelledJobError, JobError
from safegen.serve.messages import ImageRequest

FINE = GuardTrace("none", "", tuple(GuardRecord(name, calls=1) for name in GUARDS))


def image_request(prompt="a castle", seed=0, n=1, steps=10, **more):
    config = GenerationConfig(num_inference_steps=steps)
    return ImageRequest(
        f"{prompt}-{seed}", prompt, "s", tuple(range(seed, seed + n)), config, **more
    )


class SpyWorker:
    """Worker of the tests' own process: the prompt of a request says what becomes of its batch."""

    log: ClassVar = []
    """The prompts of each call."""
    starts: ClassVar = deque()
    """What the next starts raise; empty: they succeed."""

    def __init__(self, config, spec, open_session, on_end):
        self.spec, self.on_end, self.is_ready, self.cancelled = spec, on_end, False, asyncio.Event()

    async def start(self):
        await asyncio.sleep(0)
        if self.starts and (error := self.starts.popleft()):
            raise error
        self.is_ready = True
        return describe(self.spec)

    async def call(self, method, *arguments, on_progress=None):
        if not self.is_ready:
            raise EngineFaultError("the worker is not running")
        if method == "check_prompts":
            self.log.append(["check"])
            return [FINE for _ in arguments[0]]
        (requests,) = arguments
        self.log.append([request.prompt for request in requests])
        self.cancelled.clear()
        for _ in range(1000 if any("slow" in r.prompt for r in requests) else 1):
            await asyncio.sleep(0.001)
            on_progress(0.5)
            if self.cancelled.is_set():
                raise CancelledJobError("the request was cancelled")
        for request in requests:
            if "die" in request.prompt:
                self.end()
                raise EngineFaultError("the worker died")
            if "poison" in request.prompt:
                raise JobError("the worker failed: RuntimeError")
            if "refuse" in request.prompt:
                raise ConfigError(f"prompt must be polite, got {request.prompt!r}")
        bad = any("broken" in request.prompt for request in requests)
        trace = GuardTrace("withhold", "error: judge-filter: ValueError") if bad else FINE
        images = [[GeneratedImage(noise(s), trace) for s in r.seeds] for r in requests]
        return images[1:] if any("short" in r.prompt for r in requests) else images

    def cancel_jobs(self):
        self.cancelled.set()

    def end(self):
        self.is_ready = False
        self.on_end()

    async def stop(self):
        self.is_ready = False


@pytest.fixture(autouse=True)
def spies(monkeypatch):
    """Give pools workers of this process."""
    monkeypatch.setattr(pool_module, "Worker", SpyWorker)
    monkeypatch.setattr(SpyWorker, "log", [])
    monkeypatch.setattr(SpyWorker, "starts", deque())


def run(scenario, **settings):
    """Run a scenario with a started engine, and return the batches that its workers made."""

    async def main():
        engine = LocalEngine(ServerConfig(**{"stacks": ("s",), "batch_window": 0.005, **settings}))
        await engine.start()
        try:
            async with asyncio.timeout(20):
                await scenario(engine)
        finally:
            await engine.stop()

    asyncio.run(main())
    return SpyWorker.log


async def all_of(engine, *requests):
    """Return the answer or the exception of requests that come at the same time."""
    calls = (engine.generate(request) for request in requests)
    return await asyncio.gather(*calls, return_exceptions=True)


def test_requests_of_equal_settings_share_a_batch_and_get_their_own_images():
    async def scenario(engine):
        requests = [image_request(f"p{i}", 10 * i, n=1 + i % 3) for i in range(12)]
        for request, images in zip(requests, await all_of(engine, *requests), strict=True):
            assert [i.image.tobytes() for i in images] == [
                noise(seed).tobytes() for seed in request.seeds
            ]

    log = run(scenario, max_batch_size=8)
    assert [p for batch in log for p in batch] == [f"p{i}" for i in range(12)]  # oldest first
    assert len(log) == 4  # 24 images: 1 2 3 1 | 2 3 1 2 | 3 1 2 | 3, never over 8


def test_the_oldest_request_is_next_whether_others_like_it_wait_or_not():
    async def scenario(engine):
        kinds = "abacab"
        requests = [image_request(f"{k}{i}", steps=5 + ord(k)) for i, k in enumerate(kinds)]
        await all_of(engine, *requests)

    assert run(scenario) == [["a0", "a2", "a4"], ["b1", "b5"], ["c3"]]


def test_a_request_with_more_images_than_a_batch_is_alone_in_its_batch():
    async def scenario(engine):
        many, few = await all_of(engine, image_request("many", n=20), image_request("few"))
        assert (len(many), len(few)) == (20, 1)

    assert run(scenario, max_batch_size=4) == [["many"], ["few"]]


def test_the_batch_size_is_the_servers():
    sizes = []

    async def scenario(engine):
        worker = engine.pools[0].workers[0]
        call = worker.call

        async def spy(method, requests, **more):
            sizes.append(requests[0].generation_config.batch_size)
            return await call(method, requests, **more)

        worker.call = spy
        await engine.generate(image_request())

    run(scenario, max_batch_size=3)
    assert sizes == [3]


def test_an_idle_worker_waits_for_the_window_but_not_with_a_full_batch():
    async def scenario(engine):
        loop = asyncio.get_running_loop()
        start = loop.time()
        await all_of(engine, image_request("a", n=2))
        assert loop.time() - start < 0.25
        first = asyncio.create_task(engine.generate(image_request("b")))
        await asyncio.sleep(0.05)
        await all_of(engine, image_request("c"))
        await first

    assert run(scenario, max_batch_size=2, batch_window=0.3) == [["a"], ["b", "c"]]


def test_a_full_queue_refuses_and_says_when_to_try_again():
    async def scenario(engine):
        first = asyncio.create_task(engine.generate(image_request("slow")))
        await asyncio.sleep(0.02)
        waiting = [asyncio.create_task(engine.generate(image_request())) for _ in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(QueueFullError, match="3 requests wait") as error:
            await engine.generate(image_request())
        assert error.value.retry_after >= 1
        assert (engine.state().queued, engine.state().running) == (3, 1)
        for task in (first, *waiting):
            task.cancel()

    run(scenario, max_queue=3)


def test_a_client_that_leaves_takes_its_request_out_of_the_queue():
    async def scenario(engine):
        first = asyncio.create_task(engine.generate(image_request("slow")))
        await asyncio.sleep(0.02)
        left = asyncio.create_task(engine.generate(image_request("left", steps=3)))
        stays = asyncio.create_task(engine.generate(image_request("stays", steps=4)))
        await asyncio.sleep(0)
        left.cancel()
        await asyncio.sleep(0)
        assert engine.state().queued == 1
        first.cancel()  # its batch stops, and the next one starts
        assert len(await stays) == 1

    assert run(scenario) == [["slow"], ["stays"]]


def test_a_batch_stops_only_when_its_last_client_leaves():
    async def scenario(engine):
        requests = [image_request(f"slow{i}") for i in range(2)]
        tasks = [asyncio.create_task(engine.generate(request)) for request in requests]
        await asyncio.sleep(0.05)
        assert engine.progress(requests[0].id) == 0.5
        tasks[0].cancel()
        await asyncio.sleep(0.02)
        assert engine.state().running == 2
        tasks[1].cancel()
        await asyncio.sleep(0.02)
        assert engine.state().running == 0

    run(scenario)


@pytest.mark.parametrize(
    ("word", "kind"), [("poison", EngineFaultError), ("refuse", ConfigError), ("broken", None)]
)
@pytest.mark.parametrize("draining", [False, True])
def test_a_request_that_fails_does_not_fail_those_in_its_batch(word, kind, draining):
    async def scenario(engine):
        tasks = [
            asyncio.create_task(engine.generate(image_request(prompt, i)))
            for i, prompt in enumerate(("before", word, "after"))
        ]
        await asyncio.sleep(0)
        if draining:
            await engine.drain(10)
        before, failed, after = await asyncio.gather(*tasks, return_exceptions=True)
        assert before[0].image.tobytes() == noise(0).tobytes()
        assert after[0].image.tobytes() == noise(2).tobytes()
        if kind is None:
            assert failed[0].trace.action == "withhold"
        else:
            assert isinstance(failed, kind)

    log = run(scenario)
    assert log == [["before", word, "after"], ["before"], [word], ["after"]]


def test_checks_go_before_images_and_do_not_stop_them():
    async def scenario(engine):
        images = asyncio.create_task(engine.generate(image_request("images")))
        checks = [asyncio.create_task(engine.check_prompts("s", ["a"])) for _ in range(4)]
        await asyncio.gather(images, *checks)

    log = run(scenario, batch_window=0)
    assert log.index(["images"]) <= 1
    assert log.count(["check"]) == 4


def test_a_worker_that_dies_fails_its_batch_and_is_replaced():
    async def scenario(engine):
        first = engine.pools[0].workers[0]
        die, other = await all_of(engine, image_request("die"), image_request("other"))
        assert str(die) == str(other) == "the worker died"
        assert len(await engine.generate(image_request())) == 1
        assert engine.pools[0].workers[0] is not first
        assert engine.state().is_ready

    run(scenario)


def test_a_worker_that_dies_while_it_waits_is_replaced_before_the_next_request():
    async def scenario(engine):
        engine.pools[0].workers[0].end()
        assert not engine.state().is_ready
        await asyncio.sleep(0.02)
        assert engine.state().is_ready
        assert engine.state().workers == 1

    run(scenario)


def test_requests_fail_at_once_while_no_worker_can_be_started(caplog):
    async def scenario(engine):
        SpyWorker.starts.append(ConfigError("the weights are missing"))
        first = asyncio.create_task(engine.generate(image_request("die")))
        await asyncio.sleep(0.01)
        waiting = asyncio.create_task(engine.generate(image_request()))
        found = await asyncio.gather(first, waiting, return_exceptions=True)
        assert [str(each) for each in found] == [
            "the worker died",
            "no worker can be started: the weights are missing",
        ]
        with pytest.raises(EngineFaultError, match="weights are missing"):
            await engine.generate(image_request())
        assert "weights are missing" in engine.state().reason
        while not engine.state().is_ready:  # it tries again
            await asyncio.sleep(0.02)
        assert len(await engine.generate(image_request())) == 1

    run(scenario)
    assert "the weights are missing" in caplog.text


def test_one_worker_of_two_that_cannot_be_started_leaves_the_other():
    async def scenario(engine):
        SpyWorker.starts.append(EngineFaultError("the worker died"))
        await all_of(engine, image_request("die"))
        assert len(await engine.generate(image_request())) == 1
        assert engine.state().workers == 1

    run(scenario, workers=2)


def test_a_worker_with_too_few_answers_swaps_none(caplog):
    async def scenario(engine):
        found = await all_of(engine, image_request("short"), image_request("other", 1))
        assert [str(each) for each in found] == ["the worker failed"] * 2
        assert len(await engine.generate(image_request())) == 1  # by another worker

    run(scenario)
    assert "a batch failed" in caplog.text


def test_drain_answers_what_was_accepted_and_fails_the_rest_after_its_time():
    async def scenario(engine):
        quick = [asyncio.create_task(engine.generate(image_request(str(i)))) for i in range(5)]
        slow = asyncio.create_task(engine.generate(image_request("slow", steps=50)))
        await asyncio.sleep(0)
        await engine.drain(0.2)
        assert [len(images) for images in await asyncio.gather(*quick)] == [1] * 5
        with pytest.raises(DrainingError):
            await slow
        with pytest.raises(DrainingError):
            await engine.generate(image_request())
        assert engine.state().reason == "the server is being stopped"

    run(scenario)


def test_stop_fails_what_runs_and_what_waits():
    async def scenario(engine):
        requests = image_request("slow"), image_request("waiting", steps=3)
        tasks = [asyncio.create_task(engine.generate(request)) for request in requests]
        await asyncio.sleep(0.02)
        await engine.stop()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(each) for each in found] == [DrainingError] * 2

    run(scenario)
