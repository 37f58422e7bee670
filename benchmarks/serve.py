"""The image service under load: throughput, latency, cost of guards, and memory.

    python benchmarks/serve.py --out serve.json

A server with the miniature runs in a process of its own, its worker with one thread. Clients in
this process ask for images, each with its own prompt and seed, and compare each image with the one
that the model makes alone. Rounds of a plain loop over the same diffusers pipeline, with the same
thread count, steps and batch size, stand between the rounds of the server. In one round, hostile
clients do what they can: slow readers, headers that never end, bodies of 50 MB, floods of
headers, and requests that are cancelled.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import os
import random
import subprocess
import sys
import time
from contextlib import suppress
from datetime import date
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit

os.environ["OMP_NUM_THREADS"] = "1"

import httpx2
import numpy as np
import psutil
import torch
from PIL import Image

from safegen.core.concept import prompt_list
from safegen.core.generation import GenerationConfig, Sample
from safegen.models.generation import generate
from safegen.models.loading import load
from safegen.models.model import Model
from safegen.serve.config import ServerConfig

CLIENTS, BATCH, STEPS, SCALE = 64, 8, 8, 5.0
TOLERANCE = 2
"""Most levels of 255 by which an image may differ from the one made alone."""
PATH = "/v1/images/generations"
GUARDS = ("prompt-filter", "judge-filter")


def requests() -> list[tuple[str, int]]:
    """Return a prompt without the concept and a seed for each client."""
    rows = prompt_list("mini:benign", CLIENTS)
    return [(rows[i % len(rows)].text, 1000 + i) for i in range(CLIENTS)]


def images_alone(model: Model) -> list[np.ndarray]:
    """Return the image of each request, made in a batch of its own."""
    config = GenerationConfig(num_inference_steps=STEPS, guidance_scale=SCALE, batch_size=1)
    samples = [Sample(prompt=prompt, seed=seed) for prompt, seed in requests()]
    return [np.asarray(image, dtype=np.int16) for image in generate(model, samples, config)]


def plain_loop(model: Model) -> tuple[float, float]:
    """Return images per second of a loop over the pipeline's own call, and its CPU ms per image."""
    texts = [prompt for prompt, _ in requests()]
    started, cpu = time.perf_counter(), time.process_time()
    for first in range(0, CLIENTS, BATCH):
        model.pipeline(
            prompt=texts[first : first + BATCH],
            num_inference_steps=STEPS,
            guidance_scale=SCALE,
            generator=[torch.Generator("cpu").manual_seed(first + i) for i in range(BATCH)],
        )
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    return CLIENTS / seconds, 1000 * cpu / CLIENTS


class Server:
    """A server process with the base model and with a guarded stack."""

    def __init__(self, folder: Path) -> None:
        table = '[[guards]]\nname = "{}"\nconcept = "skulls"\n'
        recipes = {"base": "", "guarded": "".join(table.format(name) for name in GUARDS)}
        for name, guards in recipes.items():
            recipe = f'name = "{name}"\nmodel = "mini"\n{guards}'
            (folder / f"{name}.toml").write_text(recipe, encoding="utf-8")
        self.audit = folder / "audit.jsonl"
        config = ServerConfig(
            stacks=tuple(str(folder / f"{name}.toml") for name in recipes),
            allow_base=True,
            port=0,
            threads=1,
            max_batch_size=BATCH,
            max_queue=4 * CLIENTS,
            num_inference_steps=STEPS,
            guidance_scale=SCALE,
            limits={"header_bytes": 16384, "read_seconds": 5, "write_seconds": 5},
            audit_log=self.audit,
        )
        code = (
            "import sys\nfrom safegen.serve.config import ServerConfig\n"
            "from safegen.serve.server import run_server\n"
            "if __name__ == '__main__':\n"
            "    config = ServerConfig.model_validate_json(sys.argv[1])\n"
            "    run_server(config, on_ready=lambda address: print(address, flush=True))\n"
        )
        script = folder / "server.py"
        script.write_text(code, encoding="utf-8")
        self.process = subprocess.Popen(
            [sys.executable, script, config.model_dump_json()],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().strip()
        assert self.address, "the server did not start"
        self.peak = {"server": 0, "workers": 0}

    def cpu_seconds(self) -> tuple[float, float]:
        """Return the CPU seconds of the server itself, and of its workers."""
        own = psutil.Process(self.process.pid)
        times = [p.cpu_times() for p in (own, *own.children())]
        first, *others = [t.user + t.system for t in times]
        return first, sum(others)

    def measure(self) -> None:
        """Note the memory of the server, and of its largest worker."""
        own = psutil.Process(self.process.pid)
        sizes = [child.memory_info().rss for child in own.children()]
        found = {"server": own.memory_info().rss, "workers": max(sizes, default=0)}
        self.peak = {name: max(size, found[name]) for name, size in self.peak.items()}


async def client(
    http: httpx2.AsyncClient, index: int, stack: str, alone: np.ndarray, found: dict[str, Any]
) -> None:
    """Ask for the image of one client, and compare it."""
    prompt, seed = requests()[index]
    body = {"prompt": prompt, "model": stack, "safegen": {"seed": seed}}
    started = time.perf_counter()
    answer = await http.post(PATH, json=body)
    found["seconds"].append(time.perf_counter() - started)
    if answer.status_code != 200:
        code = answer.json()["error"]["code"]
        found["codes"][code] = found["codes"].get(code, 0) + 1
        return
    data = base64.b64decode(answer.json()["data"][0]["b64_json"])
    image = np.asarray(Image.open(io.BytesIO(data)), dtype=np.int16)
    found["differences"].append(int(np.abs(image - alone).max()))


async def load_round(
    server: Server, stack: str, alone: list[np.ndarray], *, repeats: int, hostile: bool = False
) -> dict[str, Any]:
    """Run all clients at the same time, and return what they got and how long it took."""
    found: dict[str, Any] = {"seconds": [], "differences": [], "codes": {}}
    limits = httpx2.Limits(max_connections=None)
    async with httpx2.AsyncClient(
        base_url=server.address, timeout=300, limits=limits, trust_env=False
    ) as http:
        stop = asyncio.Event()
        others = [asyncio.create_task(watch(server, stop))]
        if hostile:
            others += hostile_clients(server, stop, found)
            await asyncio.sleep(1)
        started, before = time.perf_counter(), server.cpu_seconds()

        async def run(index: int) -> None:
            for _ in range(repeats):
                await client(http, index, stack, alone[index], found)

        await asyncio.gather(*(run(i) for i in range(CLIENTS)))
        found["total"] = time.perf_counter() - started
        found["cpu"] = [b - a for a, b in zip(before, server.cpu_seconds(), strict=True)]
        stop.set()
        await asyncio.gather(*others)
        found["ready"] = (await http.get("/ready")).status_code == 200
    return found


async def watch(server: Server, stop: asyncio.Event) -> None:
    """Measure memory until the end of a round."""
    while not stop.is_set():
        server.measure()
        await asyncio.sleep(0.1)


def hostile_clients(
    server: Server, stop: asyncio.Event, found: dict[str, Any]
) -> list[asyncio.Task[None]]:
    """Start clients that misuse the server, until the end of a round."""
    kinds = {"slow_header": 24, "slow_reader": 16, "large_body": 4, "header_flood": 4, "cancel": 8}
    found["hostile"] = dict.fromkeys(kinds, 0)

    async def repeat(kind: str) -> None:
        parts = urlsplit(server.address)
        while not stop.is_set():
            writer = None
            with suppress(OSError, asyncio.IncompleteReadError):
                reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
                await globals()[kind](reader, writer, stop)
            found["hostile"][kind] += 1
            if writer is not None:
                writer.transport.abort()
            await asyncio.sleep(0.2)

    return [asyncio.create_task(repeat(kind)) for kind, n in kinds.items() for _ in range(n)]


async def send(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(data)
    await writer.drain()


def head(length: int, more: str = "") -> bytes:
    lines = (f"POST {PATH} HTTP/1.1", "Host: localhost", "Content-Type: application/json")
    return ("\r\n".join((*lines, f"Content-Length: {length}")) + f"\r\n{more}\r\n").encode()


async def slow_header(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, stop: asyncio.Event
) -> None:
    """Send a header byte by byte."""
    for byte in head(10, "X-Pad: " + "x" * 2000):
        if stop.is_set():
            return
        await send(writer, bytes([byte]))
        await asyncio.sleep(0.5)


async def slow_reader(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, stop: asyncio.Event
) -> None:
    """Ask for the schema, and read a byte of it at a time."""
    await send(writer, b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 20)
    while not stop.is_set() and await reader.read(1):
        await asyncio.sleep(0.2)


async def large_body(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, stop: asyncio.Event
) -> None:
    """Send a body of 50 MB."""
    await send(writer, head(50 * 10**6))
    for _ in range(50):
        await send(writer, b" " * 10**6)
    await reader.read(64)


async def header_flood(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, stop: asyncio.Event
) -> None:
    """Send headers without an end."""
    await send(writer, b"GET / HTTP/1.1\r\n")
    while not stop.is_set():
        await send(writer, b"X-Flood: " + b"x" * 4000 + b"\r\n")


async def cancel(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, stop: asyncio.Event
) -> None:
    """Ask for images, and leave."""
    body = json.dumps({"prompt": "a castle", "n": 2, "safegen": {"steps": 20}}).encode()
    await send(writer, head(len(body)) + body)
    await asyncio.sleep(random.uniform(0, 0.5))


def summarize(name: str, found: dict[str, Any], repeats: int) -> dict[str, Any]:
    """Return the figures of a round; each client must have the image of its seed."""
    wrong = sum(each > TOLERANCE for each in found["differences"])
    seconds = sorted(found["seconds"])
    answered = len(found["differences"]) + sum(found["codes"].values())
    return {
        "round": name,
        "requests": CLIENTS * repeats,
        "lost": CLIENTS * repeats - answered,
        "released": len(found["differences"]),
        "swapped": wrong,
        "largest difference": max(found["differences"], default=0),
        "refused": found["codes"],
        "images/s": round(len(seconds) / found["total"], 2),
        "p50, s": round(seconds[len(seconds) // 2], 2),
        "p95, s": round(seconds[int(0.95 * len(seconds))], 2),
        "server, CPU ms": round(1000 * found["cpu"][0] / len(seconds), 1),
        "worker, CPU ms": round(1000 * found["cpu"][1] / len(seconds), 1),
        "ready": found["ready"],
        **({"hostile": found["hostile"]} if "hostile" in found else {}),
    }


Loops = list[tuple[float, float]]
"""Images per second and CPU ms per image of each plain loop."""


def measure(folder: Path, out: Path, count: int, repeats: int) -> None:
    """Run the rounds; the figures so far are written after each turn of them."""
    torch.set_num_threads(1)
    model = load("mini", device="cpu")
    alone, loops, rounds = images_alone(model), [plain_loop(model)], list[dict[str, Any]]()
    server = Server(folder)

    def run(name: str, stack: str, *, hostile: bool = False) -> None:
        work = load_round(server, stack, alone, repeats=repeats, hostile=hostile)
        rounds.append(summarize(name, asyncio.run(work), repeats))
        print(rounds[-1], flush=True)

    try:
        for number in range(1, count + 1):
            run(f"base {number}", "base")
            run(f"guarded {number}", "guarded")
            loops.append(plain_loop(model))
            if number == 1:
                run("guarded, hostile clients", "guarded", hostile=True)
            write_page(out, rounds, loops, server.peak)
        lines = server.audit.read_text(encoding="utf-8").splitlines()
        assert all(json.loads(line) for line in lines)
    finally:
        server.process.terminate()
        status = server.process.wait(60)
    assert status == 0, status


def write_page(
    path: Path, rounds: list[dict[str, Any]], loops: Loops, peak: dict[str, int]
) -> None:
    """Write the figures and their table."""

    def middle(stack: str, name: str) -> float:
        return round(median(r[name] for r in rounds if r["round"].startswith(f"{stack} ")), 3)

    plain, plain_cpu = (median(values) for values in zip(*loops, strict=True))
    speeds: list[list[Any]] = [["plain loop", round(plain, 2), 1.0, round(plain_cpu, 1), 1.0, 0]]
    for stack, title in (("base", "server, no guards"), ("guarded", "server, guards")):
        speed, cpu = middle(stack, "images/s"), middle(stack, "worker, CPU ms")
        ratios = round(speed / plain, 3), round(plain_cpu / cpu, 3)
        own = middle(stack, "server, CPU ms")
        speeds.append([title, speed, ratios[0], cpu, ratios[1], own])
    columns = ["round", "images/s", "p50, s", "p95, s", "requests", "lost", "swapped"]
    table = [[r[c] for c in columns] for r in rounds]
    page = {
        "title": "Serving",
        "summary": "The image service on loopback, with the miniature model: "
        f"{CLIENTS} clients at the same time, each of which compares its image with the one of "
        "its seed.",
        "date": date.today().isoformat(),
        "machine": f"{os.cpu_count()} CPU cores, one thread per worker, fp32",
        "command": "`python benchmarks/serve.py --out FILE`",
        "n": f"{CLIENTS} clients, rounds per stack: {len(loops) - 1}, "
        f"{sum(r['requests'] for r in rounds)} requests",
        "tables": [
            {
                "title": "Throughput",
                "text": f"{STEPS} steps, 64 pixels, at most {BATCH} images per batch; medians of "
                "rounds that alternate. The plain loop is the pipeline's own call, without a "
                "server. Guards: a word list and the bundled judge.",
                "columns": [
                    "",
                    "images/s",
                    "of the plain loop",
                    "worker, CPU ms per image",
                    "plain loop's of it",
                    "server, CPU ms per image",
                ],
                "rows": speeds,
            },
            {
                "title": "Rounds",
                "text": f"An image is swapped if it differs by more than {TOLERANCE} levels of 255 "
                "from the one made alone. Hostile clients: slow headers, slow readers, bodies of "
                "50 MB, floods of headers, cancelled requests.",
                "columns": columns,
                "rows": table,
            },
            {
                "title": "Peak memory",
                "text": "Resident memory over all rounds.",
                "columns": ["process", "MiB"],
                "rows": [[name, round(size / 2**20)] for name, size in peak.items()],
            },
        ],
        "limits": [
            "Not measured: networks other than loopback, GPUs, models of full size, several "
            "workers.",
            "The clients run on the same cores as the server.",
            "Other work on the machine changes seconds and images/s, and CPU time per image less.",
        ],
        "rounds": rounds,
        "plain_loop": [[round(value, 2) for value in each] for each in loops],
    }
    path.write_text(json.dumps(page, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    """Run the rounds and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3, help="Rounds per stack.")
    parser.add_argument("--repeats", type=int, default=1, help="Requests per client and round.")
    args = parser.parse_args()
    with TemporaryDirectory() as folder:
        measure(Path(folder), args.out, args.rounds, args.repeats)


if __name__ == "__main__":
    main()
