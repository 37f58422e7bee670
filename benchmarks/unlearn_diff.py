"""UnlearnDiffAtk in one process, several prompts a batch, beside a process for each prompt.

    python benchmarks/unlearn_diff.py --folder DIR --out docs/results/unlearn_diff_cost.json

The released code starts a process for each prompt, which imports its libraries and loads the models
anew, and attacks one prompt at a time. Here one process loads the model once and updates all
prefixes in one batch. Both sides run in this script, one after the other, as processes of the same
file with the same settings, prompts, seeds and number of threads; every pass is counted. DIR has
the result of each process, so the same command resumes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

STEPS = 8
"""Denoising steps of an image."""


def attack(args: argparse.Namespace) -> dict[str, Any]:
    """Attack the prompts from `args.first` on, and return costs, texts and seconds."""
    began = time.perf_counter()
    from safegen.attacks.core.base import AttackContext
    from safegen.attacks.core.prompts import attack_protocol
    from safegen.attacks.core.run import AttackConfig
    from safegen.attacks.core.target import Target
    from safegen.attacks.unlearn_diff import UnlearnDiff
    from safegen.core.concept import load_concept
    from safegen.core.generation import GenerationConfig
    from safegen.judges import load_judge
    from safegen.stack import Stack
    from safegen.stack_loader import StackLoader

    concept = load_concept(args.concept)
    settings = UnlearnDiff(
        num_timesteps=args.num_timesteps, iterations=args.iterations, batch_size=args.count
    )
    config = AttackConfig(
        limit=args.first + args.count, generation=GenerationConfig(num_inference_steps=STEPS)
    )
    samples = attack_protocol(settings, concept, config).samples()[args.first :]
    judge = load_judge(concept.judge, labels=concept.labels, threshold=concept.threshold)
    stack = Stack(name="base", model="mini", patches=tuple(args.patch))
    with StackLoader().open(stack) as loaded:
        target = Target(loaded, concept, judge, config.generation)
        with target.counted(), tempfile.TemporaryDirectory() as folder:
            attacker = settings.build(AttackContext(target, Path(folder)))
            ready = time.perf_counter()
            records = attacker.attack(samples)
            done = time.perf_counter()
        cost = target.cost
    return {
        "load": ready - began,
        "attack": done - ready,
        "denoiser": cost.denoiser,
        "queries": cost.queries,
        "texts": [record.prompt for record in records],
        "successes": sum(bool(record.success) for record in records),
    }


def run_process(args: argparse.Namespace, first: int, count: int) -> dict[str, Any]:
    """Attack `count` prompts in a process of their own, and return its result and seconds."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        options = [f"--first={first}", f"--count={count}", f"--result={result}"]
        options += [f"--{name}={getattr(args, name.replace('-', '_'))}" for name in SAME]
        options += [f"--patch={path}" for path in args.patch]
        began, before = time.perf_counter(), os.times()
        subprocess.run([sys.executable, __file__, *options], check=True)
        seconds, after = time.perf_counter() - began, os.times()
        found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    cpu = after.children_user - before.children_user
    cpu += after.children_system - before.children_system
    return {"seconds": seconds, "cpu": cpu, **found}


def run_side(args: argparse.Namespace, count: int) -> dict[str, Any]:
    """Attack all prompts in processes of `count` prompts, and return sums over the processes.

    A process that has finished before, with this folder, is not repeated.
    """
    runs = []
    for first in range(0, args.prompts, count):
        result = args.folder / f"{first}-{count}.json"
        if not result.exists():
            result.write_text(json.dumps(run_process(args, first, count)), encoding="utf-8")
        runs.append(json.loads(result.read_text(encoding="utf-8")))
    sums = {name: sum(run[name] for run in runs) for name in runs[0] if name != "texts"}
    texts = [text for run in runs for text in run["texts"]]
    return {"processes": len(runs), **sums, "texts": texts}


SAME = ("concept", "num-timesteps", "iterations")
"""Options that both sides share."""


def page(args: argparse.Namespace, one: dict[str, Any], many: dict[str, Any]) -> dict[str, Any]:
    """Return the page of results."""
    ratio, work = many["seconds"] / one["seconds"], many["attack"] / one["attack"]
    equal = sum(a == b for a, b in zip(one["texts"], many["texts"], strict=True))
    names = {
        "processes": "processes",
        "seconds": "seconds, all",
        "cpu": "CPU seconds, all",
        "load": "seconds, libraries, model and images",
        "attack": "seconds, attack",
        "denoiser": "denoiser passes",
        "queries": "images",
        "successes": "prompts with the concept",
    }
    rows = [
        [
            label,
            *(
                side[key] if isinstance(side[key], int) else f"{side[key]:.1f}"
                for side in (one, many)
            ),
        ]
        for key, label in names.items()
    ]
    edit = f"with {len(args.patch)} patch(es)" if args.patch else "unedited"
    return {
        "title": "Cost of UnlearnDiffAtk",
        "summary": (
            f"One process with all {args.prompts} prompts in a batch takes {one['seconds']:.0f} "
            f"seconds, a process for each prompt {many['seconds']:.0f}: {ratio:.1f} times as long "
            f"(CPU seconds: {many['cpu'] / one['cpu']:.1f} times). "
            f"Without libraries and loading, the attack alone takes {work:.1f} times as long. "
            f"{equal} of {args.prompts} found texts are equal."
        ),
        "model": f"the bundled model `mini` ({edit})",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"CPU, {os.environ['OMP_NUM_THREADS']} thread(s)",
        "command": (
            f"`python benchmarks/unlearn_diff.py --prompts {args.prompts} "
            f"--num-timesteps {args.num_timesteps} --iterations {args.iterations}`"
        ),
        "n": f"{args.prompts} benign prompts, one run of each side",
        "tables": [
            {
                "title": "One process and many",
                "text": (
                    f"Timesteps: {args.num_timesteps}, updates at each: {args.iterations}; images "
                    f"of {STEPS} steps. A pass is one row of a batch, forward or backward."
                ),
                "columns": ["", "one process", "a process for each prompt"],
                "rows": rows,
            }
        ],
        "limits": [
            "The search ends when the concept is seen. On an edited model it is longer, and the "
            "ratio is nearer to that of the attack alone.",
            "One run of each side on a machine that other work shares.",
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--concept", default="skulls")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--num-timesteps", type=int, default=10)
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--patch", type=Path, action="append", default=[])
    parser.add_argument("--folder", type=Path, default=Path("unlearn-diff-cost"))
    parser.add_argument("--out", type=Path, default=Path("unlearn_diff_cost.json"))
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--count", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.result:
        args.result.write_text(json.dumps(attack(args)), encoding="utf-8")
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    args.folder.mkdir(parents=True, exist_ok=True)
    found = page(args, run_side(args, args.prompts), run_side(args, 1))
    args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(found["summary"])


if __name__ == "__main__":
    main()
