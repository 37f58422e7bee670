"""Server processes with the fake engine, and raw connections to them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from safegen.serve.config import ServerConfig

ROOT = Path(__file__).parents[3]


@contextmanager
def process(slow_seconds: float = 5.0, **settings) -> Iterator[tuple[subprocess.Popen, str]]:
    """Run a server in a process of its own, and yield it with its address."""
    config = ServerConfig(stacks=("fake",), port=0, **settings)
    command = [sys.executable, "-m", "tests.serve.operations.fake_server"]
    command += [config.model_dump_json(), str(slow_seconds)]
    paths = os.pathsep.join((str(ROOT / "src"), str(ROOT)))
    pipe = subprocess.PIPE
    server = subprocess.Popen(
        command, stdout=pipe, stderr=pipe, text=True, env=os.environ | {"PYTHONPATH": paths}
    )
    try:
        address = server.stdout.readline().strip()
        assert address, server.stderr.read()
        yield server, address
    finally:
        server.kill()
        server.communicate(timeout=20)


def connect(address: str, timeout: float = 10.0, buffer: int | None = None) -> socket.socket:
    """Return a connection to a server, with a receive buffer of a size."""
    parts = urlsplit(address)
    connection = socket.socket()
    if buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    connection.settimeout(timeout)
    connection.connect((parts.hostname, parts.port))
    return connection


def read_all(connection: socket.socket) -> bytes:
    """Return everything until the server closes a connection."""
    parts = []
    try:
        while part := connection.recv(2**16):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


def read_until(connection: socket.socket, end: bytes) -> bytes:
    """Return what a server sends up to some bytes."""
    data = b""
    while end not in data and (part := connection.recv(2**16)):
        data += part
    return data
