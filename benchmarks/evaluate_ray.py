"""Measure `safegen evaluate --engine ray`: two actors against one, and actors killed at random.

    python benchmarks/evaluate_ray.py --out evaluate_ray.json    # about 6 minutes on 2 quiet cores

The miniature draws 512 images, one thread per actor, in one process, on one actor and on two. A
rate counts after the first eighth of them, so start-up is left out. Then actors are killed at
random moments. The bytes of every run must be those of one process. `busy` is the share of the
machine's CPU time in use by all programs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import threading
import time
from contextlib import suppress
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import torch

from safegen.core.concept import load_concept
from safegen.core.generation import GenerationConfig
from safegen.evaluation.engines.ray import RayBatchEngine
from safegen.evaluation.evaluate import evaluate
from safegen.evaluation.own_prompts import concept_judge, concept_lists, prompt_protocol
from safegen.evaluation.protocol import Protocol
from safegen.evaluation.run.folder import CARD, SAMPLES, TIMINGS
from safegen.stack import Stack

IMAGES, BATCH, STEPS = 512, 16, 10
"""Images, images of a batch, and denoising steps."""
LISTS, PROMPTS = 4, 16
"""Lists of prompts, and prompts of each; the rest of the images are other seeds."""
WARM_UP = 1 / 8
"""Part of the images that are drawn before the rate counts."""
ONE_PROCESS = 0
"""Number of actors of the run without Ray."""


class Clock:
    """Times at which images were recorded, as the run reports them."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.times: list[tuple[int, float]] = []

    def __call__(self, description: str, done: int, total: int) -> None:
        if description.startswith("generating") and done:
            self.times.append((done, time.monotonic()))

    def rate(self) -> float:
        """Return images per second from the first record after the warm-up to the last."""
        total = self.times[-1][0]
        after = [(done, at) for done, at in self.times if done >= WARM_UP * total]
        (first, start), (last, end) = after[0], after[-1]
        return (last - first) / (end - start)


def make_protocol(images: int) -> Protocol:
    """Return a protocol of a number of images of the miniature."""
    concept = load_concept("skulls")
    lists = concept_lists(concept, limit=PROMPTS)[:LISTS]
    seeds = -(-images // (LISTS * PROMPTS))
    generation = GenerationConfig(num_inference_steps=STEPS, batch_size=BATCH, precision="fp32")
    judge = concept_judge(concept, None, labels=(), threshold=None, options=None)
    return prompt_protocol(
        concept, lists, judge=judge, seeds=tuple(range(1, seeds + 1)), generation=generation
    )


def run(protocol: Protocol, out: Path, workers: int) -> dict[str, Any]:
    """Evaluate the miniature, and return the rate."""
    engine = RayBatchEngine(workers=workers, threads=1) if workers else None
    clock = Clock()
    psutil.cpu_percent()
    evaluate(
        protocol, [Stack(name="mini", model="mini")], out, baselines="none", engine=engine,
        progress=clock,
    )  # fmt: skip
    seconds = time.monotonic() - clock.began
    return {
        "workers": workers,
        "images": clock.times[-1][0],
        "images_per_second": round(clock.rate(), 2),
        "seconds": round(seconds, 1),
        "start_seconds": round(clock.times[0][1] - clock.began, 1),
        "busy": round(psutil.cpu_percent() / 100, 2),
    }


def run_and_kill(protocol: Protocol, out: Path, kills: int, seed: int) -> dict[str, Any]:
    """Evaluate the miniature on two actors, and kill actors at random moments."""
    stop, killed, dice = threading.Event(), [0], random.Random(seed)

    def kill() -> None:
        while killed[0] < kills and not stop.is_set():
            # a batch that ends its actor four times would end the run
            wanted = count_records(out) + dice.randint(0, 2) * BATCH
            while count_records(out) < wanted and not stop.wait(0.05):
                pass
            if not stop.wait(dice.uniform(0.5, 3)) and (found := actors()):
                dice.choice(found).kill()
                killed[0] += 1

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        result = run(protocol, out, 2)
    finally:
        stop.set()
        thread.join()
    return result | {"killed": killed[0]}


def count_records(folder: Path) -> int:
    """Return the number of images that a run has recorded."""
    path = folder / SAMPLES
    return path.read_bytes().count(b"\n") if path.exists() else 0


def actors() -> list[psutil.Process]:
    """Return the processes of the actors of this process."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error, IndexError):
            if child.cmdline()[0].startswith("ray::BatchActor"):
                found.append(child)
    return found


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file of a run but the times."""
    files = [p for p in folder.rglob("*") if p.is_file() and p.name not in (TIMINGS, CARD)]
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


def measure(folder: Path, images: int, kills: int, repeats: int) -> list[dict[str, Any]]:
    """Return the results of all runs; the bytes of each are compared."""
    protocol, results = make_protocol(images), list[dict[str, Any]]()
    wanted: dict[str, bytes] = {}
    plan = [ONE_PROCESS, *(workers for _ in range(repeats) for workers in (1, 2))]
    rounds = 0
    while plan or sum(r.get("killed", 0) for r in results) < kills:
        out = folder / str(len(results))
        if plan:
            results.append(run(protocol, out, plan.pop(0)))
        else:
            left = kills - sum(r.get("killed", 0) for r in results)
            results.append(run_and_kill(protocol, out, left, rounds))
            rounds += 1
        wanted = wanted or contents(out)
        if contents(out) != wanted:
            raise SystemExit(f"the bytes of {results[-1]} are not those of one process")
        print(json.dumps(results[-1]), flush=True)
    return results


def describe(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the runs as a page of results."""
    columns = {
        "workers": "actors (0: one process)",
        "images": "images",
        "killed": "actors killed",
        "images_per_second": "images/s",
        "start_seconds": "first batch, s",
        "seconds": "whole run, s",
        "busy": "CPU time in use",
    }
    plain = [r for r in results if "killed" not in r]
    best = {n: max(r["images_per_second"] for r in plain if r["workers"] == n) for n in (1, 2)}
    killed = sum(r.get("killed", 0) for r in results)
    return {
        "title": "Evaluation on Ray",
        "summary": f"The miniature draws {results[0]['images']} images in {STEPS} steps, one "
        f"thread per actor. Two actors draw {best[2] / best[1]:.2f} times the images of one after "
        f"start-up (best of the runs). {killed} actors were killed at random. Every run has the "
        "bytes of one process.",
        "date": date.today().isoformat(),
        "machine": f"CPU, {os.cpu_count()} cores; fp32",
        "command": "`python benchmarks/evaluate_ray.py`",
        "n": f"{results[0]['images']} images per row",
        "tables": [
            {
                "title": "Runs",
                "text": f"Images per second count after the first {WARM_UP:.1%} of the images. "
                "CPU time is that of all programs on the machine.",
                "columns": list(columns.values()),
                "rows": [[run.get(name, 0) for name in columns] for run in results],
            }
        ],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        results = measure(Path(folder), arguments.images, arguments.kills, arguments.repeats)
    arguments.out.write_text(json.dumps(describe(results), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
