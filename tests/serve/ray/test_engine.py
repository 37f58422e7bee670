"""The engine in front of Ray: every way in which a replica can fail, with handles that fail so."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

pytest.importorskip("ray.serve")

from ray.exceptions import ActorDiedError, OutOfMemoryError, TaskCancelledError, WorkerCrashedError
from ray.serve.exceptions import BackPressureError, ReplicaUnavailableError

from safegen.core.errors import ConfigError
from safegen.core.generation import GenerationConfig
from safegen.guards.core.result import GeneratedImage, GuardTrace
from safegen.serve.config import ServerConfig
from safegen.serve.engine.base import DrainingError, EngineFaultError, QueueFullError
from safegen.serve.engine.pool import should_repeat
from safegen.serve.engine.process import JobFailure
from safegen.serve.messages import ImageRequest
from safegen.serve.ray.engine import RayEngine
from safegen.serve.ray.replica import BatchEntry, Reply, count_images
from tests.serve.conftest import STACK, picture

CONFIG = ServerConfig(stacks=("mini",), engine="ray", max_queue=7)
REQUEST = ImageRequest("r1", "a castle", "safe", (1,), GenerationConfig())


class Response:
    """What a handle returns: a value, an error, or nothing before it is canceled."""

    def __init__(self, value):
        self.value, self.is_cancelled = value, False

    def __await__(self):
        return self._get().__await__()

    async def _get(self):
        await asyncio.sleep(0)
        if self.value is None:
            await asyncio.sleep(30)
        if isinstance(self.value, BaseException):
            raise self.value
        return self.value

    def cancel(self):
        self.is_cancelled = True


class Handle:
    """Handle of a deployment whose replica answers with one value."""

    deployment_name = "stack-0"

    def __init__(self, value, stack=STACK):
        self.value, self.stack, self.responses = value, stack, []

    def __getattr__(self, name):
        handle = self

        class Method:
            def remote(self, *arguments):
                response = Response(handle.stack if name == "describe" else handle.value)
                handle.responses.append(response)
                return response

        return Method()


def run(value, use, *handles, count=lambda: {"stack-0": 1}):
    """Return what `use(engine)` returns, with replicas that answer with a value."""

    async def main():
        engine = RayEngine(CONFIG, handles or (Handle(value),), count)
        await engine.start()
        try:
            return await use(engine)
        finally:
            await engine.stop()

    return asyncio.run(main())


def generate(value):
    return run(value, lambda engine: engine.generate(REQUEST))


def test_the_images_of_a_replica_are_those_of_the_engine():
    images = [GeneratedImage(picture(1), GuardTrace("none", ""))]
    assert generate(Reply(STACK, images)) == images


@pytest.mark.parametrize(
    "error",
    [
        ActorDiedError(),
        WorkerCrashedError(),
        OutOfMemoryError("memory"),
        TaskCancelledError(),
        ReplicaUnavailableError("r"),
        asyncio.CancelledError(),
        RuntimeError("a prompt"),
    ],
)
def test_a_replica_that_fails_is_a_fault_without_its_words(error):
    with pytest.raises(EngineFaultError) as caught:
        generate(error)
    assert "a prompt" not in str(caught.value)


def test_a_full_queue_is_told_as_such():
    with pytest.raises(QueueFullError, match="7 requests wait") as caught:
        generate(BackPressureError(7, 7))
    assert caught.value.retry_after >= 1


def test_the_error_of_a_session_keeps_its_kind():
    failure = JobFailure(0, "user", "ConfigError", "width must be a multiple of 8, got 9")
    with pytest.raises(ConfigError, match="multiple of 8"):
        generate(Reply(STACK, failure))
    with pytest.raises(EngineFaultError):
        generate(Reply(STACK, JobFailure(0, "fault", "ValueError", "ValueError")))


def test_a_replica_that_has_loaded_another_stack_is_not_used():
    image = GeneratedImage(picture(1), GuardTrace("none", ""))
    for other in (replace(STACK, hash="b" * 64), replace(STACK, guards=STACK.guards[:1])):
        with pytest.raises(EngineFaultError, match="changed on the disk"):
            generate(Reply(other, [image]))


def test_a_client_that_leaves_cancels_its_request_in_the_cluster():
    handle = Handle(None)

    async def leave(engine):
        task = asyncio.create_task(engine.generate(REQUEST))
        await asyncio.sleep(0.05)
        assert engine.state().running == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert engine.state().running == 0

    run(None, leave, handle)
    assert handle.responses[-1].is_cancelled


def test_a_drain_fails_what_takes_too_long_and_refuses_what_is_new():
    async def drain(engine):
        task = asyncio.create_task(engine.generate(REQUEST))
        await asyncio.sleep(0.05)
        await engine.drain(0.1)
        assert not engine.state().is_ready
        with pytest.raises(DrainingError):
            await task
        with pytest.raises(DrainingError):
            await engine.generate(REQUEST)

    run(None, drain)


def test_stacks_of_one_name_stop_the_start():
    with pytest.raises(ConfigError, match="different names"):
        run(None, lambda engine: engine.generate(REQUEST), Handle(None), Handle(None))


def break_ray():
    raise ConnectionError("the cluster is gone")


@pytest.mark.parametrize(
    ("count", "reason"),
    [(break_ray, "Ray does not answer: ConnectionError"), (dict, "a stack has no replica")],
)
def test_without_a_replica_the_engine_is_not_ready(count, reason):
    async def look(engine):
        until = asyncio.get_running_loop().time() + 10
        while engine.state().is_ready and asyncio.get_running_loop().time() < until:
            await asyncio.sleep(0.02)
        return engine.state()

    assert run(None, look, count=count).reason == reason


def test_a_batch_counts_images_and_one_request_always_fits():
    entries = [BatchEntry(replace(REQUEST, seeds=tuple(range(n)))) for n in (3, 2, 100)]
    assert count_images(entries[:2]) == 5
    assert count_images(entries[2:]) == 1


def test_a_request_that_may_have_failed_by_another_is_repeated():
    fine = [GeneratedImage(picture(1), GuardTrace("none", ""))]
    withheld = [GeneratedImage(None, GuardTrace("withhold", "error: judge-filter: ValueError"))]
    assert not should_repeat(fine)
    assert should_repeat(withheld)
    assert should_repeat(JobFailure(0, "memory", "RuntimeError", "out of memory"))
    assert should_repeat(JobFailure(0, "fault", "RuntimeError", "RuntimeError"))
    assert not should_repeat(JobFailure(0, "cancelled", "CancelledError", "cancelled"))
