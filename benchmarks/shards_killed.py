"""Kill random shards of an evaluation at random moments, merge them, and compare the bytes.

    python benchmarks/shards_killed.py --kills 20        # some minutes on one thread

Each process evaluates one shard of the miniature model and gets SIGKILL after a random time; merges
are killed too. Afterwards every shard is run to its end and merged. The run must be that of one
process, byte for byte, except for its times.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

import safegen
from safegen.core.concept import load_concept
from safegen.core.generation import GenerationConfig
from safegen.data.shards import Shard
from safegen.evaluation.evaluate import evaluate
from safegen.evaluation.protocol import Protocol
from safegen.evaluation.run.folder import SAMPLES, TIMINGS, Run
from safegen.evaluation.verify import verify
from safegen.stack import Stack
from safegen.stack_loader import StackLoader

SHARDS = 3
PROTOCOL = Protocol.from_concept(
    load_concept("skulls"),
    prompts=6,
    seeds=[1],
    generation=GenerationConfig(num_inference_steps=4, batch_size=4),
)
STACKS = [
    Stack(name="base", model="mini"),
    Stack(name="negative", model="mini", negative_prompt="a skull"),
]


def start(job: Callable[[], object]) -> int:
    """Return the id of a new process that does a job; it has the loaded model of this one."""
    if child := os.fork():
        return child
    code = 1
    try:
        job()
        code = 0
    finally:
        os._exit(code)


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file of a run except its times and its report."""
    files = (p for p in folder.rglob("*") if p.is_file())
    own = (p for p in files if p.name != TIMINGS and p.stem != "report")
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in own}


def kill_shards(folder: Path, kills: int, seed: int) -> dict:
    """Return what happened to the shards of an evaluation and to the merged run."""
    loader, rng = StackLoader(device="cpu"), random.Random(seed)
    for stack in STACKS:
        loader.hash(stack)

    def evaluate_shard(number: int) -> None:
        part = Shard(index=number, count=SHARDS)
        out = folder / f"part-{number}"
        evaluate(PROTOCOL, STACKS, out, loader=loader, baselines="none", shard=part)

    def merge() -> None:
        parts = [folder / f"part-{i}" for i in range(1, SHARDS + 1)]
        safegen.merge(parts, out=folder / "merged" / "run")

    def evaluate_whole() -> None:
        evaluate(PROTOCOL, STACKS, folder / "one" / "run", loader=loader, baselines="none")

    def finish(job: Callable[[], object]) -> float:
        began = time.perf_counter()
        assert os.waitstatus_to_exitcode(os.waitpid(start(job), 0)[1]) == 0
        return time.perf_counter() - began

    def kill(job: Callable[[], object], limit: float) -> bool:
        child = start(job)
        time.sleep(rng.uniform(0, limit))
        os.kill(child, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL

    seconds = finish(evaluate_whole)
    killed, at = 0, []
    merges = max(1, kills // 5)
    while killed < kills - merges:
        number = rng.randint(1, SHARDS)
        part = folder / f"part-{number}"
        if kill(lambda number=number: evaluate_shard(number), 1.2 * seconds / SHARDS):
            killed += 1
            path = part / SAMPLES
            at.append(len(path.read_bytes().splitlines()) if path.exists() else -1)
        else:
            shutil.rmtree(part)  # it was finished first: begin again
    durations = [finish(lambda number=i: evaluate_shard(number)) for i in range(1, SHARDS + 1)]
    while killed < kills:
        if kill(merge, 0.5):
            killed += 1
        else:
            shutil.rmtree(folder / "merged")
    finish(merge)
    merged = folder / "merged" / "run"
    return {
        "kills": killed,
        "of_merges": merges,
        "images_when_killed": at,
        "images": sum(1 for _ in Run.open(merged).sample_records()),
        "seconds_of_one_process": round(seconds, 2),
        "seconds_of_shards_at_the_end": [round(value, 2) for value in durations],
        "faults": verify(Run.open(merged)),
        "equal_bytes": contents(merged) == contents(folder / "one" / "run"),
    }


def main() -> None:
    """Print what happened as one JSON value."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        result = kill_shards(Path(folder), options.kills, options.seed)
    text = json.dumps(result)
    print(text)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")
    if not result["equal_bytes"] or result["faults"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
