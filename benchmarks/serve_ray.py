"""Measure `safegen serve` by engine and replicas: throughput and latency at 16 clients.

    python benchmarks/serve_ray.py --out serve_ray.json    # about 4 minutes on two quiet cores

The miniature behind its judge, one thread per replica. Each server is started anew, answers a
round that is not counted, and then a round in which every client sends its requests one after the
other. `busy` is the share of the machine's CPU time in use by all programs in that round.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx2
import psutil

CLIENTS, WARM_UP, REQUESTS = 16, 2, 6
"""Clients, and requests of each before and in the measurement."""
STEPS = 10
SERVER = """
stacks = ["mini"]
guards = ["judge-filter"]
concept = "skulls"
num_inference_steps = {steps}
guidance_scale = 5.0
threads = 1
workers = {replicas}
engine = "{engine}"
port = {port}
"""


def measure(engine: str, replicas: int) -> dict[str, Any]:
    """Return the throughput and the latency of one server."""
    with TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        path, log = Path(folder) / "server.toml", Path(folder) / "log.txt"
        values = {"steps": STEPS, "replicas": replicas, "engine": engine, "port": port}
        path.write_text(SERVER.format(**values))
        started = time.monotonic()
        with log.open("w") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "safegen", "serve", "--config", str(path)],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
        address = f"http://127.0.0.1:{port}"
        try:
            wait_until_ready(process, address, log)
            result = {"engine": engine, "replicas": replicas}
            result["start_seconds"] = round(time.monotonic() - started, 1)
            load(address, WARM_UP)
            psutil.cpu_percent()
            result |= load(address, REQUESTS)
            result["busy"] = round(psutil.cpu_percent() / 100, 2)
            result["megabytes"] = round(memory(process) / 1e6)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(90)
    return result


def wait_until_ready(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    """Wait until a server answers requests."""
    until = time.monotonic() + 120
    while time.monotonic() < until and process.poll() is None:
        try:
            if httpx2.get(f"{address}/ready", timeout=5).status_code == 200:
                return
        except httpx2.HTTPError:
            pass
        time.sleep(0.2)
    raise RuntimeError(f"the server did not start: {log.read_text()[-1000:]}")


def load(address: str, requests: int) -> dict[str, Any]:
    """Return what happens if every client sends a number of requests one after the other."""
    started = time.monotonic()
    with ThreadPoolExecutor(CLIENTS) as pool:
        found = list(pool.map(lambda client: run_client(address, client, requests), range(CLIENTS)))
    seconds, times = time.monotonic() - started, sorted(t for each in found for t in each)
    return {
        "n": len(times),
        "seconds": round(seconds, 2),
        "images_per_second": round(len(times) / seconds, 2),
        "p50_seconds": round(statistics.median(times), 2),
        "p95_seconds": round(times[int(0.95 * (len(times) - 1))], 2),
    }


def run_client(address: str, client: int, requests: int) -> list[float]:
    """Return the seconds of each request of a client."""
    times = []
    with httpx2.Client(timeout=120) as session:
        for number in range(requests):
            body = {"prompt": "a castle", "safegen": {"seed": 1000 * client + number}}
            started = time.monotonic()
            answer = session.post(f"{address}/v1/images/generations", json=body)
            times.append(time.monotonic() - started)
            if answer.status_code != 200:
                raise RuntimeError(answer.text[:300])
    return times


def memory(process: subprocess.Popen[bytes]) -> int:
    """Return the bytes that a server and its processes hold, shared pages once."""
    parent = psutil.Process(process.pid)
    return sum(p.memory_full_info().pss for p in [parent, *parent.children(recursive=True)])


def describe(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the runs as a page of results."""
    columns = {
        "engine": "engine",
        "replicas": "workers or replicas",
        "images_per_second": "images/s",
        "p50_seconds": "p50, s",
        "p95_seconds": "p95, s",
        "busy": "CPU time in use",
        "megabytes": "memory, MB",
        "start_seconds": "start, s",
    }
    return {
        "title": "Engines of the server",
        "summary": "`safegen serve` with worker processes and with replicas of Ray: the miniature "
        f"behind its judge, {STEPS} steps, one thread per worker, {CLIENTS} clients that send one "
        "request after the other.",
        "date": date.today().isoformat(),
        "machine": f"CPU, {os.cpu_count()} cores, which also run the clients; fp32",
        "command": "`python benchmarks/serve_ray.py`",
        "n": f"{CLIENTS * REQUESTS} requests of one image per row",
        "tables": [
            {
                "title": "Throughput and latency",
                "text": "CPU time is that of all programs on the machine during the requests; "
                "memory counts shared pages once.",
                "columns": list(columns.values()),
                "rows": [[run[name] for name in columns] for run in runs],
            }
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--runs", default="ray:1,local:1,ray:2,local:2")
    arguments = parser.parse_args()
    runs = []
    for run in arguments.runs.split(","):
        engine, _, replicas = run.partition(":")
        runs.append(measure(engine, int(replicas)))
        print(json.dumps(runs[-1]), flush=True)
        arguments.out.write_text(json.dumps(describe(runs), indent=1) + "\n")


if __name__ == "__main__":
    main()
