"""Clients that send or read too slowly, or too much: each ends in time, and memory is bounded."""

from __future__ import annotations

import json
import threading
import time

import httpx2
import psutil
import pytest

from safegen.serve.config import RequestLimits, ServerConfig
from tests.serve.conftest import FakeEngine, serving
from tests.serve.operations.processes import connect, process, read_all, read_until

LIMITS = RequestLimits(
    read_seconds=0.5,
    write_seconds=0.5,
    body_bytes=2**20,
    header_bytes=4096,
    json_values=5000,
    total_body_bytes=2 * 2**20,
    connections=8,
    prompt_chars=1_000_000,
)
PATH = "/v1/images/generations"
HEAD = (
    b"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
)


@pytest.fixture(scope="module")
def engine():
    return FakeEngine(slow_seconds=1.0)


@pytest.fixture(scope="module")
def address(engine):
    config = ServerConfig(stacks=("fake",), limits=LIMITS)
    with serving(config, engine) as address:
        yield address


@pytest.fixture(scope="module")
def client():
    with httpx2.Client(timeout=20) as client:
        yield client


def status_of(data):
    """Return the status, the headers and the JSON body of a raw response."""
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    return int(first.split()[1]), headers, json.loads(body) if body else None


@pytest.mark.parametrize("start", [b"", b"GET /health HTTP/1.1\r\nHost: localhost\r\n", HEAD])
def test_headers_that_never_end_close_the_connection(address, start):
    with connect(address) as connection:
        connection.sendall(start)
        begin = time.monotonic()
        while time.monotonic() < begin + 3:
            try:
                connection.sendall(b"X-A: b\r\n" if start else b"")
            except OSError:
                break
            time.sleep(0.1)
            connection.setblocking(False)
            try:
                if connection.recv(1) == b"":
                    break
            except BlockingIOError:
                pass
            except OSError:
                break
            finally:
                connection.settimeout(10)
        assert 0.3 < time.monotonic() - begin < 2


def test_a_second_request_of_a_connection_has_the_same_time(address):
    with connect(address) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b'"ok"' in read_until(connection, b"}")
        connection.sendall(b"GET /health HT")
        begin = time.monotonic()
        assert read_all(connection) == b""
        assert time.monotonic() - begin < 2


def test_a_body_that_never_ends_is_answered_with_408(address):
    with connect(address) as connection:
        connection.sendall(HEAD + b"Content-Length: 1000\r\n\r\n{")
        begin = time.monotonic()
        status, headers, body = status_of(read_all(connection))
        assert status == 408
        assert headers["connection"] == "close"
        assert body["error"]["message"] == "the body must arrive within 0.5 seconds"
        assert time.monotonic() - begin < 4


def test_a_client_that_goes_on_after_its_answer_is_closed(address):
    with connect(address) as connection:
        head = HEAD.replace(b"/v1/images/generations", b"/nothing")
        connection.sendall(head + b"Content-Length: 100000\r\n\r\n")
        begin = time.monotonic()
        while time.monotonic() < begin + 5:
            try:
                connection.sendall(b"x")
            except OSError:
                break
            time.sleep(0.1)
        assert time.monotonic() - begin < 3


def test_long_headers_are_refused(address):
    with connect(address) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-A: " + b"a" * 5000)
        status, _, body = status_of(read_all(connection))
        assert status == 400
        assert body["error"]["message"].endswith("at most 4096 bytes of headers")
    many = {f"x-{k}": "a" * 20 for k in range(500)}
    assert httpx2.get(f"{address}/health", headers=many).status_code == 431
    assert httpx2.get(f"{address}/health?{'a' * 4096}").status_code == 431


@pytest.mark.parametrize("data", [b"\x16\x03\x01\x02\x00\r\n\r\n", b"GET\r\n\r\n", b"\r\n" * 5000])
def test_what_is_not_http_is_answered_or_closed(address, data):
    with connect(address) as connection:
        connection.sendall(data)
        answer = read_all(connection)
        assert answer == b"" or status_of(answer)[0] == 400


def test_a_large_body_is_refused_by_its_length_before_it_is_sent(address):
    with connect(address) as connection:
        connection.sendall(HEAD + b"Expect: 100-continue\r\nContent-Length: 50000000\r\n\r\n")
        status, _, body = status_of(read_all(connection))
        assert status == 413
        assert body["error"]["code"] == "body_too_large"
        assert body["detail"] == "the body must have at most 1048576 bytes, got 50000000"


def test_a_large_body_without_a_length_is_refused_when_it_becomes_too_large(address):
    answer = httpx2.post(address + PATH, content=iter([b" " * 2**16] * 20), timeout=20)
    assert answer.status_code == 413
    assert answer.headers["connection"] == "close"


@pytest.mark.parametrize("value", [b"[]", b"{}", b"0"])
def test_json_of_many_values_is_refused_before_it_is_parsed(address, value):
    content = b'{"prompt": "a castle", "more": [%s]}' % b",".join([value] * LIMITS.json_values)
    headers = {"content-type": "application/json"}
    answer = httpx2.post(address + PATH, content=content, headers=headers, timeout=20)
    assert answer.status_code == 413
    assert answer.json()["detail"] == "the body must have at most 5000 commas and brackets"
    answer = httpx2.post(address + PATH, json={"prompt": "a, " * 4900}, timeout=20)
    assert answer.status_code == 200


def test_a_body_of_two_lengths_is_refused_and_what_follows_it_is_no_request(address, engine):
    before = len(engine.requests)
    with connect(address) as connection:
        lengths = b"Content-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n"
        body = b'{"prompt": "a"}'
        connection.sendall(HEAD + lengths + b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body))
        connection.sendall(HEAD + b"Content-Length: 15\r\n\r\n" + body)
        status, headers, answer = status_of(read_all(connection))
    assert status == 400
    assert headers["connection"] == "close"
    assert answer["error"]["code"] == "invalid_http"
    assert len(engine.requests) == before


def test_bodies_of_many_requests_are_limited_together(address, client):
    def post(found, size):
        answer = client.post(address + PATH, json={"prompt": "slow " * (size // 5)})
        found.append(answer.status_code)

    found = []
    threads = [threading.Thread(target=post, args=(found, 800_000)) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [200, 200, 503, 503, 503]
    post(found, 800_000)
    assert found[-1] == 200  # what was held is given back


def test_more_requests_than_permitted_get_503_and_health_is_still_answered(address, client):
    found = []

    def post():
        found.append(client.post(address + PATH, json={"prompt": "slow"}).status_code)

    threads = [threading.Thread(target=post) for _ in range(10)]
    for thread in threads:
        thread.start()
    time.sleep(0.2)
    assert client.get(f"{address}/health").status_code == 200
    for thread in threads:
        thread.join()
    assert sorted(found) == [200] * 8 + [503] * 2


def test_far_more_connections_than_permitted_are_closed(address):
    connections = [connect(address) for _ in range(30)]
    time.sleep(0.2)
    closed = 0
    for connection in connections:
        connection.setblocking(False)
        try:
            closed += connection.recv(1) == b""
        except BlockingIOError:
            pass
        except ConnectionResetError:
            closed += 1
        connection.close()
    assert closed >= 30 - 2 * LIMITS.connections - 1
    time.sleep(0.1)
    assert httpx2.get(f"{address}/health").status_code == 200


def test_a_client_that_does_not_read_is_closed_and_one_that_reads_slowly_is_not(address):
    body = json.dumps({"prompt": "a castle", "n": 2, "size": "1024x1024"}).encode()
    request = HEAD + f"Content-Length: {len(body)}\r\n\r\n".encode() + body
    with connect(address, buffer=4096) as connection:
        connection.sendall(request)
        time.sleep(2)
        data = read_all(connection)
        assert 0 < len(data) < 8_000_000
    with connect(address, buffer=2**18) as connection:
        connection.sendall(request)
        data = b""
        while part := connection.recv(2**20):
            data += part
            if len(data) < 2**21:
                time.sleep(0.02)
            if b"\r\n\r\n" in data:
                head, _, got = data.partition(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
                if len(got) >= length:
                    break
        assert status_of(data)[0] == 200


def test_bodies_of_50_megabytes_do_not_stay_in_memory():
    with process(limits=LIMITS) as (server, address):
        memory = psutil.Process(server.pid)
        httpx2.post(address + PATH, json={"prompt": "a castle"}).raise_for_status()
        before, most, found = memory.memory_info().rss, 0, []

        def send():
            def parts():
                for _ in range(800):
                    yield b" " * 2**16

            try:
                answer = httpx2.post(address + PATH, content=parts(), timeout=20)
                found.append(answer.status_code)
            except httpx2.TransportError as error:
                found.append(type(error).__name__)

        threads = [threading.Thread(target=send) for _ in range(6)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            most = max(most, memory.memory_info().rss)
            time.sleep(0.01)
        assert set(found) <= {413, 503}, found
        assert most - before < 24 * 2**20, (before, most)
        print(f"RSS {before / 2**20:.1f} -> {most / 2**20:.1f} MiB at most")
