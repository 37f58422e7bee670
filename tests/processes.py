"""Processes of one job, forked from the tests, so that they need no imports of their own."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

SECONDS = 60.0
"""Time after which processes that wait for each other are killed."""


def run_processes(count: int, job: Callable[[int], Any]) -> list[Any]:
    """Return what `job(rank)` returns in each process, its exception, or None for a killed one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        results = [Path(folder) / str(rank) for rank in range(count)]
        pids = [_fork(rank, count, port, job, path) for rank, path in enumerate(results)]
        _wait(pids)
        return [pickle.loads(path.read_bytes()) if path.exists() else None for path in results]


def _fork(rank: int, count: int, port: int, job: Callable[[int], Any], path: Path) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of threads
        if pid := os.fork():
            return pid
    try:
        _be_process(rank, count, port)
        try:
            result = job(rank)
        except BaseException as error:
            traceback.print_exc()
            result = error
        path.write_bytes(pickle.dumps(result))
    finally:
        os._exit(0)


def _be_process(rank: int, count: int, port: int) -> None:
    import torch

    torch.set_num_threads(1)  # OpenMP's threads did not survive the fork
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    values |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    os.environ.update({name: str(value) for name, value in values.items()})


def _wait(pids: list[int]) -> None:
    deadline, running = time.monotonic() + SECONDS, set(pids)
    while running:
        running = {pid for pid in running if os.waitpid(pid, os.WNOHANG)[0] == 0}
        if time.monotonic() > deadline:
            for pid in running:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            raise AssertionError(f"{len(running)} of {len(pids)} processes did not end")
        time.sleep(0.01)
