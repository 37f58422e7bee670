"""Measure the cost of closed forms for 1, 10 and 100 concepts, and that removal did not change.

    python benchmarks/closed_forms.py full --out closed-forms.json       # about 3 minutes, 6 GB
    python benchmarks/closed_forms.py captions --out closed-forms.json   # about 3 minutes, 6 GB
    python benchmarks/closed_forms.py mini --out closed-forms.json       # about 4 minutes

`full` and `captions` have the sizes of Stable Diffusion 1.4 and random weights, on one thread;
times are CPU seconds of `apply` after loading. `mini` compares each edit with its equations
written out for one projection at a time. A part adds its table to those in the file.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import torch

import safegen
from safegen.core.concept import load_concept
from safegen.core.generation import GenerationConfig
from safegen.core.quiet import silence_libraries
from safegen.edits.base import Edit
from safegen.edits.functional.closed_form import embed, projections, reduce_rows
from safegen.edits.training.samples import read_captions
from safegen.models.model import Model
from safegen.patches.patch import Patch
from safegen.workflows.edit import make_edit
from safegen.workflows.plan.probe import measured

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import concept_judge, generate_and_judge, list_rates, select_samples

from tests.edits.written_out import erase_rounds, relative_distance
from tools.interop.files import random_model

KINDS = ("wooden", "golden", "tiny", "broken", "painted", "striped", "glass", "old", "wet", "paper")
THINGS = ("chair", "bridge", "clock", "boat", "mask", "lamp", "wheel", "piano", "tower", "kite")
PHRASES = tuple(f"a {kind} {thing}" for thing in THINGS for kind in KINDS)
CONCEPTS = (1, 10, 100)
METHODS = ("uce", "rece", "double_projections")


@contextmanager
def encoding_time(model: Model) -> Iterator[list[float]]:
    """Yield a list that gets the CPU seconds of each pass of the text encoder."""
    spent: list[float] = []
    began = [0.0]

    def start(*_: Any) -> None:
        began[0] = time.process_time()

    def stop(*_: Any) -> None:
        spent.append(time.process_time() - began[0])

    encoder = model.pipeline.text_encoder
    hooks = encoder.register_forward_pre_hook(start), encoder.register_forward_hook(stop)
    try:
        yield spent
    finally:
        for hook in hooks:
            hook.remove()


def cost_row(model: Model, edit: Edit, concepts: int, captions: int) -> list[Any]:
    """Return method, concepts, captions, CPU seconds in total, encoding and else, and MB added."""
    with encoding_time(model) as spent, measured(model) as cost:
        began = time.process_time()
        patch = edit.apply(model)
        seconds = time.process_time() - began
    assert patch.metadata.moved
    megabytes = round((cost.memory - cost.before) / 1e6)
    times = [round(x, 1) for x in (seconds, sum(spent), seconds - sum(spent))]
    return [f"`{edit.method()}`", concepts, captions, *times, megabytes]


def full_table(with_captions: bool) -> dict[str, Any]:
    """Return the table of costs at the sizes of Stable Diffusion 1.4, with captions or without."""
    model = random_model()
    model.pipeline.to(torch.float32)
    began = time.process_time()
    _ = model.hash
    hashing = round(time.process_time() - began, 1)
    model.encode_text([""])  # warms up
    captions = load_concept("skulls").captions if with_captions else ()
    text = (
        "Random weights, fp32, preset `full`, one phrase for each concept. CPU seconds of one "
        "thread after loading: in total, in the text encoder, and all else. Memory is the peak "
        f"above that of the loaded model. Its hash took {hashing} s before that."
    )
    rows = []
    for method in METHODS[:1] if with_captions else METHODS:
        for concepts in CONCEPTS[:1] if with_captions else CONCEPTS:
            edit = make_edit(method, "full", erase=PHRASES[:concepts], captions=captions)
            rows.append(cost_row(model, edit, concepts, len(read_captions(captions))))
            print(*rows[-1], sep="\t", flush=True)
    times = ["CPU, s", "encoding, s", "solving, s"]
    return {
        "title": "With the captions of `skulls`" if with_captions else "Cost at full size",
        "text": text,
        "columns": ["method", "concepts", "captions", *times, "added, MB"],
        "rows": rows,
    }


def written_out(model: Model, edit: Any) -> dict[str, torch.Tensor]:
    """Return the weights of an edit by its equations for one projection at a time, float64."""
    original = projections(model)["hidden"]
    listed = read_captions(edit.captions)
    scales = edit.model_dump(include={"erase_scale", "preserve_scale", "lamb"})

    def rows(texts: Any, tokens: str) -> torch.Tensor:
        found = [torch.cat(spans) for spans in embed(model, texts, part="hidden", tokens=tokens)]
        return torch.cat(found)

    keys = rows(edit.erase, edit.tokens)
    targets = rows([edit.guide] * len(edit.erase), edit.tokens)
    held = [rows(listed, "all") / len(listed) ** 0.5]
    if edit.preserve:
        held.insert(0, rows(edit.preserve, edit.tokens))
    rounds = (
        {"rounds": edit.rounds, "ridge": edit.ridge} if edit.method() == "rece" else {"rounds": 0}
    )
    preserved = reduce_rows(torch.cat(held))
    return erase_rounds(original, keys, targets, preserved, **rounds, **scales)


def removal_text(rates: dict[str, Any]) -> str:
    """Return the removal of a list with its interval, or that the base shows nothing."""
    removal = rates["removal"]
    if removal is None:
        return "not defined"
    if removal["value"] is None:
        return "not defined"
    value, low, high = (100 * removal[key] for key in ("value", "low", "high"))
    return f"{value:.1f} % [{low:.1f}, {high:.1f}], {removal['before']} to {removal['after']}"


def mini_table(prompts: int) -> dict[str, Any]:
    """Return the table of distances and removals on the miniature model."""
    model, config, names = (
        safegen.load("mini"),
        GenerationConfig(num_inference_steps=10),
        ("skulls", "fire"),
    )
    concepts = {name: load_concept(name) for name in names}
    judges = {name: concept_judge(concept) for name, concept in concepts.items()}
    judges["benign"] = judges["skulls"]
    samples = {
        name: select_samples(
            concept, prompts=prompts, seeds=(0,), lists=concept.lists["explicit"][:1]
        )
        for name, concept in concepts.items()
    }
    benign = concepts["skulls"].lists["benign"][:1]
    samples["benign"] = select_samples(
        concepts["skulls"], prompts=prompts, seeds=(0,), lists=benign
    )
    bases = {
        name: generate_and_judge(model, part, config, judges[name])
        for name, part in samples.items()
    }

    def rates(patch: Patch, name: str) -> dict[str, Any]:
        """Return the rates of a concept's list, or of the benign one."""
        with patch.apply(model):
            images = generate_and_judge(model, samples[name], config, judges[name])
        concept = concepts.get(name, concepts["skulls"])
        (found,) = list_rates(samples[name], bases[name], images, concept).values()
        return found

    rows = []
    for method in METHODS:
        for erased in (names[:1], names):
            words = tuple(word for name in erased for word in concepts[name].words)
            edit = make_edit(method, "mini", concept="skulls", erase=words)
            patch, apart, same = edit.apply(model), "", None
            if method != "double_projections":
                want = written_out(model, edit)
                apart = f"{relative_distance(edit.solve(model), want):.0e}"
                same = Patch({n: w.float() for n, w in want.items()}, patch.metadata)
            change = f"{100 * rates(patch, 'benign')['change']['value']:.1f} %"
            for name in erased:
                removals = [removal_text(rates(one, name)) if one else "" for one in (patch, same)]
                row = [f"`{method}`", ", ".join(erased), name, apart, *removals, change]
                print(*row, sep="\t", flush=True)
                rows.append(row)
    return {
        "title": "Removal on the miniature model",
        "text": "Weights of each edit beside those of its equations, written out for one "
        "projection at a time: largest relative distance in float64, and removal (with its "
        "interval, and detections before and after) of both on "
        f"{len(samples['skulls'])} prompts of the concept's explicit list, seed 0, 10 steps. "
        f"Change: mean absolute difference of {len(samples['benign'])} benign images.",
        "columns": ["method", "erased", "measured", "distance", "removal", "written out", "change"],
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("full", "captions", "mini"))
    parser.add_argument("--out", type=Path, default=Path("closed-forms.json"))
    parser.add_argument("--prompts", type=int, default=64, help="prompts of a list, on mini")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with silence_libraries():
        is_mini = args.part == "mini"
        table = mini_table(args.prompts) if is_mini else full_table(args.part == "captions")
    known = json.loads(args.out.read_text(encoding="utf-8"))["tables"] if args.out.exists() else []
    tables = sorted(
        [table, *(old for old in known if old["title"] != table["title"])],
        key=lambda table: ("Cost", "With", "Removal").index(table["title"].split()[0]),
    )
    report = {
        "title": "Closed forms",
        "summary": "What closed forms cost at the sizes of Stable Diffusion 1.4 for 1, 10 and "
        "100 concepts, and their distance from their equations.",
        "model": "random weights of Stable Diffusion 1.4's sizes; `mini`",
        "date": str(date.today()),
        "machine": "CPU, 1 thread, fp32",
        "n": "one run of each edit",
        "command": "`python benchmarks/closed_forms.py full`, `captions` and `mini`",
        "tables": tables,
        "limits": [
            "At full size nothing was generated: the weights are random.",
            "Rows run in one process, from top to bottom: memory that an earlier row left free is "
            "used again and not counted.",
            "Encoding is 85 million multiplications for each of 77 positions of a text, in fp32. "
            "Captions are preserved at every position, padding included: 576 captions are 44,352 "
            "positions. The concept `nudity` and the presets `paper` preserve no captions.",
        ],
    }
    args.out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
