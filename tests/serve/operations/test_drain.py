"""Start and stop of a server: readiness, signals, and every accepted request answered."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import signal
import socket
import threading
import time

import httpx2
import numpy as np
import pytest
from PIL import Image

from safegen.core.errors import ConfigError
from safegen.serve.app import build_app
from safegen.serve.config import ServerConfig
from safegen.serve.engine.base import EngineState
from safegen.serve.server import ImageServer
from tests.serve.conftest import FakeEngine, picture, running
from tests.serve.operations.processes import connect, process, read_all, read_until

PATH = "/v1/images/generations"


def post_slow(address, count):
    """Start requests in threads; return the threads and, by seed, what becomes of each.

    All of them have reached the engine.
    """
    found, client = {}, httpx2.Client(timeout=20)

    def post(seed):
        body = {"prompt": "a slow castle", "safegen": {"seed": seed}}
        try:
            found[seed] = client.post(address + PATH, json=body)
        except httpx2.TransportError as error:
            found[seed] = error

    threads = [threading.Thread(target=post, args=(seed,)) for seed in range(count)]
    for thread in threads:
        thread.start()
    until = time.monotonic() + 20
    while f"safegen_running {count}.0" not in client.get(f"{address}/metrics").text:
        assert time.monotonic() < until
        time.sleep(0.02)
    closer = threading.Thread(target=lambda: ([t.join() for t in threads], client.close()))
    closer.start()
    return [*threads, closer], found


def test_a_signal_under_load_answers_every_accepted_request():
    with process(slow_seconds=3) as (server, address):
        idle = connect(address)
        threads, found = post_slow(address, 16)
        begin = time.monotonic()
        server.send_signal(signal.SIGTERM)
        time.sleep(0.1)
        for thread in threads:
            thread.join()
        assert server.wait(10) == 0
        assert time.monotonic() - begin < 8
        for seed, answer in found.items():
            assert answer.status_code == 200, answer
            data = base64.b64decode(answer.json()["data"][0]["b64_json"])
            assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), picture(seed))
        with pytest.raises(httpx2.ConnectError):
            httpx2.get(f"{address}/health")
        idle.close()


def test_clients_that_go_on_while_the_server_stops_are_answered_or_cannot_connect():
    found, stop, client = [], threading.Event(), httpx2.Client(timeout=20)

    def post(address):
        while not stop.is_set():
            try:
                answer = client.post(address + PATH, json={"prompt": "a slow castle"})
                found.append(answer.status_code)
            except httpx2.ConnectError:
                stop.set()
            except httpx2.TransportError as error:
                found.append(error)

    with client, process(slow_seconds=0.05) as (server, address):
        threads = [threading.Thread(target=post, args=(address,)) for _ in range(12)]
        threads.append(threading.Thread(target=server.stderr.read))
        for thread in threads:
            thread.start()
        until = time.monotonic() + 20
        while found.count(200) < 24 and time.monotonic() < until:
            time.sleep(0.01)
        server.send_signal(signal.SIGTERM)
        assert server.wait(10) == 0
        stop.set()
        for thread in threads:
            thread.join()
    assert set(found) <= {200, 503}, found
    assert found.count(200) >= 24


def test_what_is_not_done_when_the_time_is_over_is_answered_with_503():
    with process(slow_seconds=30, drain_timeout=0.5) as (server, address):
        kept, probe = connect(address), connect(address)
        kept.sendall(b"GET /ready HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b'"ready":true' in read_until(kept, b"}")
        threads, found = post_slow(address, 12)
        server.send_signal(signal.SIGINT)
        time.sleep(0.15)
        # a connection that is open may still be used, and learns why it is not answered
        body = json.dumps({"prompt": "a castle"}).encode()
        head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        kept.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        assert b'"code":"draining"' in read_all(kept)
        kept.close()
        probe.sendall(b"GET /ready HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b"the server is being stopped" in read_all(probe)
        probe.close()
        for thread in threads:
            thread.join()
        assert server.wait(10) == 0
        for answer in found.values():
            assert answer.status_code == 503, answer
            assert answer.json()["error"]["code"] == "draining"
            assert answer.headers["retry-after"] == "5"


def test_the_second_signal_stops_at_once():
    with process(slow_seconds=30) as (server, address):
        threads, _ = post_slow(address, 3)
        server.send_signal(signal.SIGTERM)
        server.send_signal(signal.SIGINT)  # the same wish, as `timeout` sends it twice
        time.sleep(0.3)
        assert server.poll() is None
        server.send_signal(signal.SIGTERM)
        assert server.wait(3) == 128 + signal.SIGTERM
        for thread in threads:
            thread.join()


class SlowStart(FakeEngine):
    """Engine that starts when it may, or fails."""

    def __init__(self, error=None):
        super().__init__()
        self.go, self.error, self.has_stopped = threading.Event(), error, False

    async def start(self):
        while not self.go.is_set():
            await asyncio.sleep(0.01)
        if self.error is not None:
            raise self.error

    def state(self):
        is_ready = self.go.is_set()
        return EngineState(is_ready, "" if is_ready else "the stacks are being loaded", workers=1)

    async def stop(self):
        self.has_stopped = True


def test_health_answers_while_the_stacks_load_and_readiness_says_why_not():
    engine = SlowStart()
    app = build_app(ServerConfig(stacks=("fake",)), engine)
    server = ImageServer(ServerConfig(stacks=("fake",), port=0), app)
    with running(server, lambda: asyncio.run(server.run_service()), lambda: server.started):
        address = server.address
        assert httpx2.get(f"{address}/health").json() == {"status": "ok"}
        answer = httpx2.get(f"{address}/ready")
        assert answer.status_code == 503
        assert answer.json() == {"ready": False, "reason": "the stacks are being loaded"}
        answer = httpx2.post(address + PATH, json={"prompt": "a castle"})
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "starting"
        engine.go.set()
        until = time.monotonic() + 5
        while httpx2.get(f"{address}/ready").status_code != 200:
            assert time.monotonic() < until
        assert httpx2.post(address + PATH, json={"prompt": "a castle"}).status_code == 200
    assert engine.has_stopped


def test_a_failed_start_ends_the_server_with_its_error(tmp_path):
    engine = SlowStart(ConfigError("the self-test failed"))
    engine.go.set()
    config = ServerConfig(stacks=("fake",), port=0, audit_log=tmp_path / "audit.jsonl")
    server = ImageServer(config, build_app(config, engine))
    asyncio.run(server.run_service())
    assert str(server.error) == "the self-test failed"
    assert engine.has_stopped
    build_app(config, engine).state.service.audit.close()  # the log is unlocked


def test_an_address_that_is_taken_is_one_line():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        config = ServerConfig(stacks=("fake",), port=other.getsockname()[1])
        with pytest.raises(
            ConfigError, match=r"must be an address that is free, got '127\.0\.0\.1'"
        ):
            ImageServer(config, build_app(config, FakeEngine()))
