"""Measure the cost of a large run outside its model: plan, resume, score, verify, report.

    python benchmarks/big_run.py --out big_runs.json           # about 8 minutes on one thread
    python benchmarks/big_run.py --samples 2000 8000           # a quick look

A synthetic run of N samples on two stacks, the bundled `mini` and a patch of it: half of the
prompts ask for the concept. Its journals and its images (8 x 8 pixels, with hashes and metadata)
are those that `safegen evaluate` writes; the detections are drawn at random. Each step runs in a
process of its own. Seconds are of the CPU, after the imports and with the model loaded; memory is
the largest resident set above that state.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image

from safegen.core.concept import load_concept
from safegen.core.files import encode_image
from safegen.core.generation import GenerationConfig
from safegen.evaluation.evaluate import evaluate, expand_baselines
from safegen.evaluation.own_prompts import prompt_protocol, read_lists
from safegen.evaluation.protocol import Protocol
from safegen.evaluation.protocol_file import write_protocol
from safegen.evaluation.report.page import write_report
from safegen.evaluation.run import folder as names
from safegen.evaluation.run.card import prepare
from safegen.evaluation.run.folder import Run, image_file, write_json
from safegen.evaluation.run.journal import to_lines
from safegen.evaluation.run.records import (
    ChangeRecord,
    DetectionsRecord,
    JudgeRecord,
    SampleRecord,
    TimingRecord,
)
from safegen.evaluation.scoring.score import score_run
from safegen.evaluation.verify import verify
from safegen.judges import load_judge
from safegen.judges.base import Detection, Detections
from safegen.metrics.image import pixel_mae
from safegen.models.checkpoint.metadata import PatchMetadata
from safegen.models.selectors import select_parameters
from safegen.patches.patch import Patch
from safegen.stack import Stack, load_stack
from safegen.stack_loader import StackLoader

STEPS = ("plan", "resume", "score", "verify", "report")
WORDS = {
    "plan": "read the prompts and write the plan",
    "resume": "resume the finished run",
    "score": "score",
    "verify": "verify",
    "report": "report",
}
PROMPTS, PATCH, RUN = "prompts.jsonl", "patch.safetensors", "run"
HIT = {"base": 0.9, "given": 0.1}
"""Share of the images of prompts for the concept in which it is detected, by kind of stack."""
OBJECTS = ("castle", "cat", "boat", "tree", "house", "bird", "flower", "car")


def write_inputs(folder: Path, samples: int) -> None:
    """Write a file of prompts, a protocol on it, and a patch of the bundled model."""
    with (folder / PROMPTS).open("w", encoding="utf-8") as file:
        for i in range(samples):
            subject = OBJECTS[i % len(OBJECTS)]
            names_it = i < samples // 2
            prompt = f"a drawing of a {subject}{' with skulls' if names_it else ''}, number {i}"
            row = {"id": i, "prompt": prompt, "role": "explicit" if names_it else "benign"}
            file.write(json.dumps(row | {"subject": subject}) + "\n")
    model, _ = StackLoader().model("mini")
    own = dict(model.denoiser.named_parameters())
    weights = {name: own[name] * 0.7 for name in select_parameters(model.denoiser, "attn2")}
    Patch(weights, PatchMetadata(base=model.hash, method="test")).save(folder / PATCH)


def build_protocol(folder: Path) -> Protocol:
    """Return the protocol on the file of prompts, as `safegen evaluate --prompts` builds it."""
    concept = load_concept("skulls")
    lists = read_lists([str(folder / PROMPTS)], concept)
    return prompt_protocol(concept, lists, generation=GenerationConfig(num_inference_steps=2))


def stacks_of(folder: Path) -> list[Stack]:
    """Return the two stacks."""
    return [load_stack("mini"), load_stack(f"calm=mini+{folder / PATCH}")]


def plan(folder: Path, loader: StackLoader) -> Run:
    """Return a new run: its protocol, its plan and its card."""
    protocol, out = build_protocol(folder), folder / RUN
    expanded = expand_baselines(protocol, stacks_of(folder), "none")
    run = prepare(protocol, protocol.samples(), expanded, out, loader)
    write_protocol(protocol, out)
    return run


def fill(folder: Path, judge: str) -> None:
    """Write the images and the journals of a finished run."""
    run, rng = Run.open(folder / RUN), random.Random(0)
    pixels, base = np.random.default_rng(0), dict[int, Image.Image]()
    generation = run.protocol.generation.model_dump(mode="json")
    space = tuple(load_judge("mini", labels=["skulls"]).label_space)
    record = JudgeRecord(judge=judge, name="mini", options={}, label_space=space)
    (run.folder / names.JUDGES).write_text(to_lines([record]))
    journals = {
        name: (run.folder / name).open("w")
        for name in (names.SAMPLES, names.DETECTIONS, names.CHANGES, names.TIMINGS)
    }
    for stack in run.stacks:
        (run.folder / names.IMAGES / stack.name).mkdir(parents=True)
        for i, (sample, key) in enumerate(zip(run.samples, run.keys(stack), strict=True)):
            image = Image.fromarray(pixels.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            metadata = {"key": key, "stack": stack.hash, "prompt_sha256": sample.prompt_sha256}
            metadata |= {"seed": sample.seed, "index": sample.index, "generation": generation}
            data, file = encode_image(image, metadata), image_file(stack.name, key)
            (run.folder / file).write_bytes(data)
            common = {"key": key, "stack": stack.name}
            digest = hashlib.sha256(data).hexdigest()
            made = SampleRecord.of(sample, **common, file=file, sha256=digest, blank=False)
            hit = sample.role == "explicit" and rng.random() < HIT[stack.kind]
            items = (Detection("skulls", 0.9),) if hit else ()
            seen = Detections(items, sample.subject if rng.random() < 0.9 else "cat")
            found = DetectionsRecord(**common, judge=judge, detections=seen)
            lines = [(names.SAMPLES, made), (names.DETECTIONS, found)]
            if stack.kind == "base":
                base[i] = image
            else:
                change = pixel_mae(base[i], image)
                lines.append(
                    (names.CHANGES, ChangeRecord(**common, baseline=stack.baseline, change=change))
                )
            if i % run.protocol.generation.batch_size == 0:
                timing = TimingRecord(stage="generate", stack=stack.name, batch=i // 32, images=32)
                lines.append((names.TIMINGS, timing.model_copy(update={"seconds": 1.0})))
            for name, line in lines:
                journals[name].write(to_lines([line]))
    for journal in journals.values():
        journal.close()


def make_run(folder: Path, samples: int) -> None:
    """Write a finished run of some samples, with its scores."""
    write_inputs(folder, samples)
    run = plan(folder, StackLoader())
    fill(folder, load_judge("mini", labels=["skulls"]).id)
    write_json(run.folder / names.SCORES, score_run(Run.open(run.folder)))


def step(name: str, folder: Path) -> Callable[[], object]:
    """Return a step that is ready to run: the model is loaded, the run is not read."""
    run = folder / RUN
    if name == "plan":
        loader = StackLoader()
        for stack in stacks_of(folder):
            loader.hash(stack)
        shutil.rmtree(folder / "new", ignore_errors=True)
        (folder / "new").mkdir()
        for file in (PROMPTS, PATCH):
            os.link(folder / file, folder / "new" / file)
        return lambda: plan(folder / "new", loader)
    if name == "resume":
        loader = StackLoader()
        for stack in stacks_of(folder):
            loader.hash(stack)
        load_judge("mini", labels=["skulls"])
        options: dict[str, Any] = {"baselines": "none", "loader": loader, "until": "judge"}
        return lambda: evaluate(build_protocol(folder), stacks_of(folder), run, **options)
    if name == "score":
        return lambda: score_run(Run.open(run))
    if name == "verify":
        return lambda: _check(verify(Run.open(run)))
    return lambda: write_report({"run": Run.open(run)}, folder / "report")


def _check(faults: list[str]) -> None:
    if faults:
        raise SystemExit(f"the synthetic run has faults: {faults[:5]}")


def run_step(name: str, folder: Path) -> dict[str, float]:
    """Return the CPU seconds and the peak memory in MB that a step adds to a process."""
    act = step(name, folder)
    memory = _reset_peak()
    before = resource.getrusage(resource.RUSAGE_SELF)
    act()
    after = resource.getrusage(resource.RUSAGE_SELF)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": round(seconds, 2), "mb": round((_memory("VmHWM") - memory) / 1e6, 1)}


def _reset_peak() -> int:
    """Set the recorded peak of this process to its present memory, and return that in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmRSS")


def _memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def measure(samples: int, parent: Path, steps: list[str]) -> dict[str, Any]:
    """Return the cost of each step of a run, and the size of its page."""
    folder, row = parent / str(samples), dict[str, Any](samples=samples, images=2 * samples)
    if not (folder / RUN / names.SCORES).exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        _call("make", folder, samples)
    for name in steps:
        row[name] = _call(name, folder, samples)
    if (page := folder / "report" / names.REPORT).exists():
        text = page.read_text(encoding="utf-8")
        row["page"] = {"mb": round(page.stat().st_size / 1e6, 2), "pictures": text.count("<img ")}
    print(json.dumps(row), flush=True)
    return row


def _call(name: str, folder: Path, samples: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--step", name, "--folder", folder, "--samples", samples]
    done = subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE, text=True)
    values: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return values


def main() -> None:
    """Measure, or run one step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, nargs="+", default=[8_000, 100_000])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--folder", type=Path, help="keep the runs here")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--step", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step == "make":
        make_run(options.folder, options.samples[0])
        print(json.dumps({}))
        return
    if options.step:
        print(json.dumps(run_step(options.step, options.folder)))
        return
    with TemporaryDirectory() as temporary:
        parent = options.folder or Path(temporary)
        rows = [measure(samples, parent, options.steps) for samples in options.samples]
    if options.out:
        options.out.write_text(json.dumps(page(rows), indent=1) + "\n", encoding="utf-8")


def page(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the page of results."""
    first, last = rows[0], rows[-1]
    factor = last["samples"] / first["samples"]
    table = []
    for name in (name for name in STEPS if name in first):
        known = next(row for row in reversed(rows) if name in row)
        seconds = [row.get(name, {}).get("seconds") for row in rows]
        ratio = seconds[-1] and round(seconds[-1] / seconds[0], 1)
        rate = round(1000 * known[name]["seconds"] / known["images"], 2)
        memory = [row.get(name, {}).get("mb") for row in rows]
        table.append([WORDS[name], *seconds, ratio, rate, *memory])
    sizes = [f"{row['samples']:,}" for row in rows]
    return {
        "title": "Large runs",
        "summary": "What a run of many samples costs outside its model: planning it, reading it to "
        "resume, scoring, verifying and reporting it. The run is synthetic: two stacks, and images "
        "of 8 x 8 pixels, so that the cost of the files and journals is measured and not that of "
        "decoding images.",
        "date": date.today().isoformat(),
        "machine": "CPU, 1 thread",
        "command": "`python benchmarks/big_run.py`",
        "n": "one process for each figure; a blank was not measured",
        "tables": [
            {
                "title": "CPU seconds and memory",
                "text": "Columns are numbers of samples; each has two images. `ratio` is of "
                f"{sizes[-1]} to {sizes[0]} samples, where linear is {factor:.1f}. Memory is what "
                "the step adds to the process, in MB. Larger images add the time to decode them, "
                "and features of an extractor the memory of their numbers.",
                "columns": [
                    "step",
                    *(f"{size}, s" for size in sizes),
                    "ratio",
                    "s per 1,000 images",
                    *(f"{size}, MB" for size in sizes),
                ],
                "rows": table,
            },
            {
                "title": "Size of the page",
                "text": "The report shows an even choice of each list and up to eight further "
                "failures, so it does not grow with the run.",
                "columns": ["samples", "images of the run", "images on the page", "page, MB"],
                "rows": [
                    [row["samples"], row["images"], row["page"]["pictures"], row["page"]["mb"]]
                    for row in rows
                    if "page" in row
                ],
            },
        ],
        "limits": [
            "Features of an extractor stay in memory while a run is scored: 4 kB for each image at "
            "512 features.",
            "A run that is resumed keeps the records of all its images in memory.",
        ],
    }


if __name__ == "__main__":
    main()
