"""`safegen serve --engine ray` end to end: the miniature in a Ray cluster of its own."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import numpy as np
import psutil
import pytest
from PIL import Image

pytest.importorskip("ray.serve")

pytestmark = pytest.mark.slow
SERVER = """
stacks = [{stack}]
guards = ["prompt-filter", "judge-filter"]
concept = "skulls"
num_inference_steps = 4
threads = 1
max_batch_size = 4
max_queue = 8
port = {port}
audit_log = "audit.jsonl"
drain_timeout = 60
"""
PROMPT = "a red cube on a table"
ROUNDING = 3
"""Most levels of 255 by which the batch may change a pixel."""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start(folder: Path, stack: str = '"mini"') -> tuple[subprocess.Popen, str]:
    """Start a server in a folder, and return its process and its address."""
    port = free_port()
    (folder / "server.toml").write_text(SERVER.format(port=port, stack=stack))
    command = [sys.executable, "-m", "safegen", "serve", "--engine", "ray"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(
            [*command, "--config", str(folder / "server.toml")],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
        )
    return process, f"http://127.0.0.1:{port}"


def wait_for(condition, seconds=120):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "too late"
        time.sleep(0.2)


def is_ready(address) -> bool:
    try:
        return httpx2.get(f"{address}/ready", timeout=5).status_code == 200
    except httpx2.HTTPError:
        return False


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("server")


@pytest.fixture(scope="module")
def server(folder):
    process, address = start(folder)
    try:
        wait_for(lambda: is_ready(address) or process.poll() is not None)
        assert process.poll() is None, (folder / "log.txt").read_text()[-2000:]
        yield process, address
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(90)


def generate(address, seed=0, prompt=PROMPT, timeout=120.0, **settings):
    body = {"prompt": prompt, "safegen": {"seed": seed, **settings}}
    return httpx2.post(f"{address}/v1/images/generations", json=body, timeout=timeout)


def pixels(answer):
    assert answer.status_code == 200, answer.text[:300]
    data = base64.b64decode(answer.json()["data"][0]["b64_json"])
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"), dtype=int)


def replicas(process) -> list[psutil.Process]:
    """Return the processes that hold a stack."""
    found = psutil.Process(process.pid).children(recursive=True)
    return [child for child in found if child.name().startswith("ray::ServeRepli") and _is(child)]


def _is(child) -> bool:
    return ":stack-0" in " ".join(child.cmdline())


def records(folder):
    return [json.loads(line) for line in (folder / "audit.jsonl").read_text().splitlines()]


def test_every_client_gets_the_image_of_its_seed_and_settings(server):
    _, address = server
    wanted = [(seed, steps) for seed in range(4) for steps in (3, 4)]
    alone = {key: pixels(generate(address, key[0], steps=key[1])) for key in wanted}
    assert abs(alone[0, 3] - alone[0, 4]).max() > ROUNDING  # the settings make a difference
    with ThreadPoolExecutor(8) as pool:
        ask = lambda key: pixels(generate(address, key[0], steps=key[1]))  # noqa: E731
        together = dict(zip(wanted, pool.map(ask, wanted), strict=True))
    for key in wanted:
        assert abs(alone[key] - together[key]).max() <= ROUNDING, key


def test_the_guards_of_a_replica_block(server):
    _, address = server
    answer = generate(address, prompt="a castle covered in skulls")
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "moderation_blocked"


def test_what_does_not_fit_into_the_queue_is_told_so(server):
    _, address = server
    with ThreadPoolExecutor(40) as pool:
        answers = list(pool.map(lambda seed: generate(address, seed, steps=20), range(40)))
    codes = {answer.status_code for answer in answers}
    assert codes == {200, 429}
    full = next(answer for answer in answers if answer.status_code == 429)
    assert int(full.headers["retry-after"]) >= 1
    assert full.json()["error"]["code"] == "queue_full"


def test_a_client_that_leaves_is_not_waited_for(server, folder):
    _, address = server
    with pytest.raises(httpx2.TimeoutException):
        generate(address, steps=100, timeout=0.5)
    started = time.monotonic()
    pixels(generate(address, steps=1))
    assert time.monotonic() - started < 60
    wait_for(lambda: "cancelled" in (folder / "audit.jsonl").read_text(), 30)


def test_a_killed_replica_is_a_fault_and_is_replaced(server):
    process, address = server
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(generate, address, 1, steps=100)
        time.sleep(1.0)
        killed = replicas(process)
        assert len(killed) == 1
        killed[0].kill()
        answer = running.result()
    assert answer.status_code == 503
    assert "data" not in answer.json()
    assert answer.json()["error"]["code"] == "engine_failed"
    wait_for(lambda: not is_ready(address), 30)
    wait_for(lambda: is_ready(address))
    assert pixels(generate(address)).shape == (64, 64, 3)


def test_a_stop_answers_what_was_accepted(server, folder):
    process, address = server
    with ThreadPoolExecutor(6) as pool:
        running = [pool.submit(generate, address, seed, steps=10) for seed in range(6)]
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        codes = [answer.result().status_code for answer in running]
    assert set(codes) <= {200, 503}
    assert 200 in codes
    assert process.wait(90) == 0
    assert records(folder)  # every line is whole
    assert not replicas_of_nobody()


def replicas_of_nobody():
    """Return replicas whose server has ended."""
    found = [p for p in psutil.process_iter(["name", "ppid"]) if "ray::ServeRepli" in p.name()]
    return [p for p in found if p.ppid() == 1]


def test_a_stack_that_cannot_be_served_is_said_in_one_line(tmp_path):
    process, _ = start(tmp_path, stack='"no-such-model"')
    assert process.wait(120) == 2
    last = (tmp_path / "log.txt").read_text().strip().splitlines()[-1]
    assert "no-such-model" in last
