"""The server under load: no lost or swapped answers, a drain, and a kill that leaves nothing."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx2
import numpy as np
import psutil
import pytest
from light_sessions import noise, open_light
from PIL import Image

from safegen.serve.config import ServerConfig
from safegen.serve.engine.local import LocalEngine

PATH = "/v1/images/generations"
SCRIPT = """
import sys
from safegen.serve.config import ServerConfig
from safegen.serve.server import run_server

if __name__ == "__main__":
    config = ServerConfig.model_validate_json(sys.argv[1])
    sys.exit(run_server(config, on_ready=lambda address: print(address, flush=True)))
"""


def post(address, seed, prompt="a castle", timeout=120, **fields):
    body = {"prompt": prompt, "safegen": {"seed": seed, **fields}}
    return httpx2.post(address + PATH, json=body, timeout=timeout)


def decode(answer):
    data = base64.b64decode(answer.json()["data"][0]["b64_json"])
    return np.asarray(Image.open(io.BytesIO(data)), dtype=int)


def test_64_clients_get_the_images_of_their_seeds_while_others_leave(serving):
    config = ServerConfig(stacks=("s",), workers=2, batch_window=0.005, max_queue=256)
    engine = LocalEngine(config, open_session=open_light)

    def client(seed):
        time.sleep(seed % 7 / 100)
        if seed % 4 == 3:  # leaves before its answer
            with pytest.raises(httpx2.TimeoutException):
                post(address, seed, "slow", timeout=0.05, steps=40 + seed % 3)
            return None
        return seed, post(address, seed, steps=10 + seed % 3)

    with serving(config, engine) as address:
        with ThreadPoolExecutor(64) as threads:
            found = [each for each in threads.map(client, range(128)) if each is not None]
        until = time.monotonic() + 10
        while (state := engine.state()).running + state.queued and time.monotonic() < until:
            time.sleep(0.05)
        assert (state.running, state.queued) == (0, 0)  # abandoned requests were dropped
    assert len(found) == 96
    for seed, answer in found:
        assert answer.status_code == 200, answer.text
        assert np.array_equal(decode(answer), np.asarray(noise(seed), dtype=int))


@contextmanager
def process(folder, **settings):
    """Run a server with the miniature in a process, and yield it, its address and its worker."""
    script, files = folder / "server.py", folder / "files"
    script.write_text(SCRIPT, encoding="utf-8")
    files.mkdir(exist_ok=True)
    config = ServerConfig(
        stacks=("mini",),
        guards=("judge-filter",),
        concept="skulls",
        self_test=False,
        port=0,
        threads=1,
        num_inference_steps=10,
        audit_log=folder / "audit.jsonl",
        **settings,
    )
    source = str(Path(__file__).parents[2] / "src")
    server = subprocess.Popen(
        [sys.executable, script, config.model_dump_json()],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"PYTHONPATH": source, "TMPDIR": str(files)},
    )
    with server:
        try:
            address = server.stdout.readline().strip()
            assert address, "the server did not start"
            children = psutil.Process(server.pid).children()
            yield (
                server,
                address,
                [c for c in children if "resource_tracker" not in str(c.cmdline())],
            )
        finally:
            server.kill()


def post_many(address, count):
    """Ask for images in threads; return the threads, and the answer or the error by seed."""
    found = {}

    def client(seed):
        try:
            found[seed] = post(address, seed)
        except httpx2.TransportError as error:
            found[seed] = error

    threads = [threading.Thread(target=client, args=(seed,)) for seed in range(count)]
    for thread in threads:
        thread.start()
    return threads, found


def gone(processes, seconds=10):
    until = time.monotonic() + seconds
    while any(p.is_running() and p.status() != "zombie" for p in processes):
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


@pytest.mark.slow
def test_a_signal_under_load_answers_every_request_of_the_miniature(tmp_path):
    with process(tmp_path, drain_timeout=2, max_batch_size=2) as (server, address, workers):
        alone = {seed: decode(post(address, seed)) for seed in range(4)}
        threads, found = post_many(address, 48)
        time.sleep(1)
        server.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join()
        assert server.wait(30) == 0
        assert gone(workers)
    assert len(workers) == 1
    assert not list((tmp_path / "files").iterdir())
    statuses = Counter(getattr(answer, "status_code", str(answer)) for answer in found.values())
    assert set(statuses) <= {200, 503}, statuses
    assert statuses[200]
    for seed, answer in found.items():
        if answer.status_code == 503:
            assert answer.json()["error"]["code"] == "draining"
        elif seed in alone:
            assert np.abs(decode(answer) - alone[seed]).max() <= 2
    lines = (tmp_path / "audit.jsonl").read_text(encoding="utf-8").splitlines()
    images = [image["status"] for line in lines for image in json.loads(line).get("images", ())]
    assert images.count("released") == statuses[200] + len(alone)


@pytest.mark.slow
def test_a_killed_server_leaves_no_worker_no_files_and_a_whole_audit_log(tmp_path):
    with process(tmp_path) as (server, address, workers):
        threads, found = post_many(address, 32)
        time.sleep(1)
        server.kill()
        assert gone(workers)
        for thread in threads:
            thread.join()
        released = [a for a in found.values() if getattr(a, "status_code", 0) == 200]
    assert not list((tmp_path / "files").iterdir())
    with process(tmp_path) as (server, address, workers):
        assert post(address, 1).status_code == 200
        server.terminate()
        server.wait(30)
    lines = (tmp_path / "audit.jsonl").read_text(encoding="utf-8").splitlines()
    images = [image for line in lines for image in json.loads(line).get("images", ())]
    assert len(images) >= len(released) + 1  # the audit log has an image before its client
