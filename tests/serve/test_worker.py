"""Worker processes: what kills, stops or blocks one costs its own requests only."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import pytest
from light_sessions import noise, open_light

from safegen.core.errors import ConfigError
from safegen.core.generation import GenerationConfig
from safegen.serve.config import ServerConfig
from safegen.serve.engine.base import DrainingError, EngineFaultError
from safegen.serve.engine.local import LocalEngine
from safegen.serve.messages import ImageRequest, StartImage

HERE = Path(__file__).parent


def image_request(prompt="a castle", seed=0, n=1, **more):
    config = GenerationConfig(num_inference_steps=2)
    return ImageRequest(
        f"{prompt}-{seed}", prompt, "s", tuple(range(seed, seed + n)), config, **more
    )


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Return the folder for the temporary files of the workers' server."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def run(scenario, **settings):
    """Run a scenario with a started engine; no process and no thread of it stays behind."""
    threads, children = set(threading.enumerate()), set(psutil.Process().children())

    async def main():
        config = ServerConfig(**{"stacks": ("s",), "worker_timeout": 20, **settings})
        engine = LocalEngine(config, open_session=open_light)
        try:
            async with asyncio.timeout(60):
                await engine.start()
                await scenario(engine)
        finally:
            await engine.stop()

    asyncio.run(main())
    left = set(psutil.Process().children()) - children
    assert not [p for p in left if "resource_tracker" not in " ".join(p.cmdline())]
    assert not {t for t in set(threading.enumerate()) - threads if not t.name.startswith("asyncio")}


async def failure(engine, prompt):
    """Return why the engine has no image of a prompt."""
    with pytest.raises(EngineFaultError) as error:
        await engine.generate(image_request(prompt))
    return str(error.value)


async def until_ready(engine):
    while not engine.state().is_ready:
        await asyncio.sleep(0.01)


async def check_works(engine):
    """Check that the engine makes the image of a seed."""
    images = await engine.generate(image_request(seed=7))
    assert images[0].image.tobytes() == noise(7).tobytes()


def test_faults_of_a_job_leave_its_worker_alone(folder):
    async def scenario(engine):
        pid = engine.pools[0].workers[0].pid
        assert await failure(engine, "memory") == "out of memory"
        assert await failure(engine, "poison") == "the worker failed: RuntimeError"  # no prompt
        with pytest.raises(ConfigError, match="polite"):
            await engine.generate(image_request("refuse"))
        await check_works(engine)
        assert engine.pools[0].workers[0].pid == pid

    run(scenario)
    assert not list(folder.iterdir())


def test_a_worker_that_is_killed_ends_or_sends_no_answer_is_replaced(folder):
    async def scenario(engine):
        pids = [engine.pools[0].workers[0].pid]
        for prompt in ("kill", "exit", "function"):
            assert await failure(engine, prompt) == "the worker died"
            assert not engine.state().is_ready
            await check_works(engine)  # waits for the next worker
            pids.append(engine.pools[0].workers[0].pid)
        assert await failure(engine, "device") == "the worker failed: RuntimeError"
        while engine.pools[0].workers[0].pid == pids[-1]:
            await asyncio.sleep(0.01)
        await until_ready(engine)
        pids.append(engine.pools[0].workers[0].pid)
        assert len(set(pids)) == 5
        assert len(list(folder.iterdir())) == 1

    run(scenario)
    assert not list(folder.iterdir())


def test_a_worker_that_hangs_or_takes_no_job_is_replaced_after_its_timeout():
    async def scenario(engine):
        assert await failure(engine, "hang") == "the worker gave no sign of life for 1 s"
        await until_ready(engine)
        os.kill(engine.pools[0].workers[0].pid, signal.SIGSTOP)
        start = StartImage(bytes(8 * 2**20), 0.5)  # more than a pipe holds
        with pytest.raises(EngineFaultError, match="no sign of life"):
            await engine.generate(image_request(start=start))
        await check_works(engine)

    run(scenario, worker_timeout=1)


def test_a_cancelled_job_stops_after_its_step_and_frees_the_worker():
    async def scenario(engine):
        task = asyncio.create_task(engine.generate(image_request("slow")))  # 3 seconds
        while not engine.state().running:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        task.cancel()
        start = time.monotonic()
        await check_works(engine)
        assert time.monotonic() - start < 1.5

    run(scenario)


@pytest.mark.parametrize(("stack", "error"), [("missing", ConfigError), ("slow", EngineFaultError)])
def test_a_stack_that_cannot_be_loaded_leaves_nothing_behind(stack, error, folder):
    async def nothing(engine):
        raise AssertionError("the engine has started")

    with pytest.raises(error):
        run(nothing, stacks=("s", stack), start_timeout=2)
    assert not list(folder.iterdir())


def test_stop_ends_a_start(folder):
    async def main():
        engine = LocalEngine(ServerConfig(stacks=("slow",)), open_session=open_light)
        start = asyncio.create_task(engine.start())
        await asyncio.sleep(0.3)
        await engine.stop()
        with pytest.raises(DrainingError):
            await start

    asyncio.run(asyncio.wait_for(main(), 20))
    assert not list(folder.iterdir())


SERVER = """
import asyncio, sys
sys.path.insert(0, {here!r})
from light_sessions import open_light
from test_worker import LocalEngine, ServerConfig, image_request

async def main():
    engine = LocalEngine(ServerConfig(stacks=("s",)), open_session=open_light)
    await engine.start()
    task = asyncio.create_task(engine.generate(image_request({prompt!r})))
    await asyncio.sleep(0.3)
    print(engine.pools[0].workers[0].pid, flush=True)
    if {prompt!r} != "castle":
        await asyncio.sleep(60)

if __name__ == "__main__":
    asyncio.run(main())
"""


@pytest.mark.parametrize("prompt", ["hang", "castle"])
def test_no_worker_outlives_a_server_that_is_killed_or_ends_without_stop(prompt, tmp_path):
    script = tmp_path / "server.py"
    script.write_text(SERVER.format(here=str(HERE), prompt=prompt), encoding="utf-8")
    folder = tmp_path / "files"
    folder.mkdir()
    server = subprocess.Popen(
        [sys.executable, script],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(folder)},
    )
    with server:
        pid = int(server.stdout.readline())
        assert list(folder.glob("safegen-worker-*")) or prompt == "castle"
        try:
            if prompt == "castle":
                server.wait(20)
        finally:
            server.kill()
    until = time.monotonic() + 10
    while time.monotonic() < until and (psutil.pid_exists(pid) or list(folder.iterdir())):
        time.sleep(0.02)
    assert not psutil.pid_exists(pid)
    assert not list(folder.iterdir())


def test_a_worker_that_gets_no_thread_is_started_again(monkeypatch):
    start, refused = threading.Thread.start, []

    def refuse_once(thread):
        if "_write" in thread.name and not refused:
            refused.append(thread)
            raise RuntimeError("can't start new thread")
        start(thread)

    async def scenario(engine):
        monkeypatch.setattr(threading.Thread, "start", refuse_once)
        os.kill(engine.pools[0].workers[0].pid, signal.SIGKILL)
        while not refused or not engine.state().is_ready:
            await asyncio.sleep(0.01)
        await check_works(engine)

    run(scenario)
