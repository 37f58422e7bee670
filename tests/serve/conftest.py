"""A fake engine, and servers on free ports: what the interfaces are tested against."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("fastapi")

import uvicorn

from safegen.guards.core.result import GeneratedImage, GuardRecord, GuardTrace
from safegen.serve.app import build_app
from safegen.serve.config import ServerConfig
from safegen.serve.engine.base import DrainingError, EngineFaultError, EngineState, QueueFullError
from safegen.serve.messages import GuardInfo, StackInfo
from safegen.serve.server import ImageServer

STACK = StackInfo(
    name="safe",
    model="mini",
    hash="a" * 64,
    guards=(
        GuardInfo("prompt-filter", reads_prompts=True, reads_images=False),
        GuardInfo("judge-filter", False, True, judge="mini-0123", labels=("skulls",)),
    ),
    patches=1,
    size=(64, 64),
    sampler="DDIM",
    samplers=("DDIM", "Euler", "Euler a"),
    model_hash="b" * 64,
    tested_concept="skulls",
)
THRESHOLD = {"score": 0.5}


def picture(seed: int, size: tuple[int, int] = (64, 64)) -> Image.Image:
    """Return the fake engine's image of a seed: noise, different for every seed."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def records(action: str = "none", guard: str = "judge-filter", score: float = 0.1) -> tuple:
    """Return the records of both guards of `STACK`, one of which acted."""
    found = []
    for name in ("prompt-filter", "judge-filter"):
        scores = {"skulls": score} if name == "judge-filter" else {}
        own = action if name == guard else "none"
        found.append(GuardRecord(name, own, "", scores, THRESHOLD if scores else {}, calls=1))
    return tuple(found)


class FakeEngine:
    """Engine of tests: what becomes of an image is in its prompt.

    `skulls`: blocked at the prompt; `grinning`: a black image; `broken`: the guard failed;
    `partly`: the second image is black; `full`: the queue is full; `slow`: takes `slow_seconds`.
    A base model lets everything pass.
    """

    def __init__(self, stacks: tuple[StackInfo, ...] = (STACK,), slow_seconds: float = 5.0) -> None:
        self.stacks = {stack.name: stack for stack in stacks}
        self.requests, self.cancelled, self.slow_seconds = [], [], slow_seconds
        self.running, self.is_draining, self._futures = 0, False, {}

    async def start(self) -> None:
        """Do nothing."""

    async def generate(self, request):
        if self.is_draining:
            raise DrainingError
        if "full" in request.prompt:
            raise QueueFullError(64, 3)
        if "dead" in request.prompt:
            raise EngineFaultError("the worker died")
        self.requests.append(request)
        self.running += 1
        try:
            if "slow" in request.prompt:
                self._futures[request.id] = asyncio.get_running_loop().create_future()
                await asyncio.wait({self._futures[request.id]}, timeout=self.slow_seconds)
                if self._futures[request.id].done():
                    raise self._futures[request.id].result()
        except asyncio.CancelledError:
            self.cancelled.append(request.id)
            raise
        finally:
            self.running -= 1
        return [self._image(request, i, seed) for i, seed in enumerate(request.seeds)]

    def _image(self, request, index: int, seed: int) -> GeneratedImage:
        config = request.generation_config
        size = config.width or 64, config.height or 64
        if self.stacks[request.stack].is_base:
            return GeneratedImage(picture(seed, size), GuardTrace("none", "", ()))
        if "skulls" in request.prompt:
            trace = GuardTrace("block", "prompt-filter: word", records("block", "prompt-filter"))
            return GeneratedImage(None, trace)
        if "broken" in request.prompt:
            return GeneratedImage(None, GuardTrace("withhold", "error: judge-filter: ValueError"))
        if "grinning" in request.prompt or ("partly" in request.prompt and index == 1):
            trace = GuardTrace("black", "judge-filter: unsafe", records("black", score=0.9))
            return GeneratedImage(Image.new("RGB", size), trace)
        return GeneratedImage(picture(seed, size), GuardTrace("none", "", records()))

    async def check_prompts(self, stack, prompts):
        return [
            GuardTrace("block", "prompt-filter: word", records("block", "prompt-filter")[:1])
            if "skulls" in prompt
            else GuardTrace("none", "", records()[:1])
            for prompt in prompts
        ]

    async def check_images(self, stack, images, prompts):
        """Return red images as unsafe, images of one pixel as unjudged."""
        found = []
        for image in images:
            if image.size == (1, 1):
                trace = GuardTrace("withhold", "judge-filter: unjudged", records()[1:])
                found.append(GeneratedImage(None, trace))
                continue
            red = np.asarray(image.convert("RGB"))[..., 0].mean() > 250
            trace = (
                GuardTrace("black", "judge-filter: unsafe", records("black", score=0.9)[1:])
                if red
                else GuardTrace("none", "", records()[1:])
            )
            found.append(GeneratedImage(Image.new("RGB", image.size) if red else image, trace))
        return found

    def progress(self, request_id):
        return 0.5 if request_id in self._futures else None

    def state(self):
        return EngineState(not self.is_draining, running=self.running, workers=1)

    async def drain(self, timeout):
        self.is_draining = True
        until = time.monotonic() + timeout
        while self.running and time.monotonic() < until:
            await asyncio.sleep(0.01)
        for future in self._futures.values():
            if not future.done():
                future.set_result(DrainingError())

    async def stop(self) -> None:
        self.is_draining = True


@contextmanager
def serving(config: ServerConfig, engine) -> Iterator[str]:
    """Run a server in a thread on a free port, and yield its address once it is ready."""
    ready = threading.Event()
    app = build_app(config, engine)
    free = config.model_copy(update={"port": 0})
    server = ImageServer(free, app, on_ready=lambda address: ready.set())
    with running(server, lambda: asyncio.run(server.run_service()), ready.is_set):
        yield server.address


@contextmanager
def serving_app(app) -> Iterator[str]:
    """Run another app in a thread on a free port, and yield its address."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", ws="none"))
    with running(server, server.run, lambda: server.started):
        host, port = server.servers[0].sockets[0].getsockname()[:2]
        yield f"http://{host}:{port}"


@contextmanager
def running(
    server: uvicorn.Server, run: Callable[[], None], is_ready: Callable[[], bool]
) -> Iterator[None]:
    """Run a server in a thread until the end of the context."""
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    until = time.monotonic() + 60
    while not is_ready():
        assert thread.is_alive(), "the server did not start"
        assert time.monotonic() < until, "the server did not start in time"
        time.sleep(0.01)
    try:
        yield
    finally:
        server.should_exit = True
        thread.join(40)
        assert not thread.is_alive(), "the server did not stop"


@pytest.fixture(scope="session")
def fakes() -> SimpleNamespace:
    """Return what builds servers of other settings: `FakeEngine`, `STACK` and two contexts."""
    return SimpleNamespace(
        FakeEngine=FakeEngine, STACK=STACK, serving=serving, serving_app=serving_app
    )


@pytest.fixture
def engine() -> FakeEngine:
    """Return a fake engine."""
    return FakeEngine()


@pytest.fixture
def server(engine) -> Iterator[str]:
    """Yield the address of a server with the fake engine."""
    with serving(ServerConfig(stacks=("fake",)), engine) as address:
        yield address


@pytest.fixture(scope="session")  # it takes 9 s to start
def mini_server() -> Iterator[str]:
    """Yield the address of a server with the miniature, a word list and its judge as guards."""
    from safegen.serve.engine.local import LocalEngine

    config = ServerConfig(
        stacks=("mini",),
        guards=("prompt-filter", "judge-filter"),
        concept="skulls",
        num_inference_steps=10,
        guidance_scale=5.0,
        threads=1,
    )
    with serving(config, LocalEngine(config)) as address:
        yield address


@pytest.fixture(scope="session", name="serving")
def _serving() -> Callable:
    """Return the function that runs a server in a thread."""
    return serving


@pytest.fixture(scope="session", name="serving_app")
def _serving_app() -> Callable:
    """Return the function that runs another app in a thread."""
    return serving_app


@pytest.fixture(scope="session", name="records")
def _records() -> Callable:
    """Return the function that makes the records of both guards."""
    return records
