"""Ablation of SafeGen's settings: which one removes the concept, and which part does the work.

    python benchmarks/ablation.py [--concept skulls] [--prompts 32] [--seeds 1]
        [--rows paper,x0,...] [--out ablation.jsonl]
    python benchmarks/ablation.py --try '{"weight_mosaic": 0.47, "training": {"updates": 530}}'
    python benchmarks/ablation.py --table ablation.jsonl      # the rows so far, as Markdown

One row per setting, all on the same prompts and seed. Rows are appended as they finish. Prompts are
the 129th and following of each list, seeds the 11th and following: the required figures
(`required.py`) are measured on the first 64 with seeds 1 to 3, so that no default is chosen on what
it is measured by.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from pathlib import Path
from typing import Any

from common import concept_judge, generate_and_judge, list_rates, select_samples

from safegen.core.concept import load_concept
from safegen.core.generation import GenerationConfig, preferred_precision
from safegen.data.triplets.triplets import Triplets
from safegen.edits.safegen import SafeGen
from safegen.edits.training.config import Training
from safegen.models.loading import load
from safegen.workflows.edit import make_edit

SKIPPED, SEED = 128, 11
"""First prompts of each list, left to the required figures.

The first seed, which those do not use.
"""
PAPER = {"target": "paper", "teacher": False, "captions": (), "adversary": 0.0, "fade": 0.0}


def rows(concept: str) -> dict[str, SafeGen]:
    """Every row's settings: the default, and the default with one thing changed.

    The paper's, and the paper's at our learning rate.
    """
    default = make_edit("safegen", concept=concept)
    assert isinstance(default, SafeGen)

    def change(**settings: Any) -> SafeGen:
        return SafeGen.model_validate(default.model_dump() | settings)

    def train(**settings: Any) -> Training:
        return default.training.model_copy(update=settings)

    weights = {"weight_mosaic": 0.1, "weight_preserve": 0.9}
    return {
        "default": default,
        "paper with our training": change(**PAPER, **weights, timesteps=(0, 1000)),
        "paper with our training and weights": change(**PAPER, timesteps=(0, 1000)),
        "target: paper": change(target="paper"),
        "anchor: noise": change(target={"name": "x0", "anchor": "noise"}),
        "captions: none": change(captions=()),
        "fade: none": change(fade=0.0),
        "adversary: none": change(adversary=0.0),
        "adversary moves: unsafe": change(adversary_moves="unsafe"),
        "timesteps: all": change(timesteps=(0, 1000)),
        "weights: 0.1 / 0.9": change(**weights),
        "teacher: none": change(teacher=False),
        "16 of 32 objects": default,
        "updates: half": change(training=train(updates=default.training.updates // 2)),
        "paper": SafeGen.preset("paper"),
        "clamp: 1": change(target={"name": "x0", "clamp": 1.0}),
        "lr: a quarter": change(training=train(lr=default.training.lr / 4)),
    }


HALF = "16 of 32 objects"
"""Row with half of the triplets: the bundled ones cycle through the 32 objects."""


def attempt(concept: str, changes: str) -> SafeGen:
    """Return the default with changes, JSON such as {"flip": true, "training": {"lr": 8e-4}}."""
    said = json.loads(changes)
    training = make_edit("safegen", concept=load_concept(concept)).model_dump()[
        "training"
    ] | said.pop("training", {})
    edit = make_edit("safegen", concept=load_concept(concept), training=training, **said)
    assert isinstance(edit, SafeGen)
    return edit


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__)
    ask.add_argument("--concept", default="skulls")
    ask.add_argument("--prompts", type=int, default=32)
    ask.add_argument("--seeds", type=int, default=1)
    ask.add_argument("--rows", default="")
    ask.add_argument(
        "--try",
        dest="tried",
        action="append",
        default=[],
        help="changes of the default, as JSON; repeat it",
    )
    ask.add_argument("--triplets", type=Path, help="others than the concept's bundled ones")
    ask.add_argument("--out", type=Path, default=Path("ablation.jsonl"))
    ask.add_argument(
        "--keep", type=Path, help="a folder for the patches, ROW.safetensors; not kept unless told"
    )
    ask.add_argument(
        "--precision",
        choices=("fp32", "bf16"),
        default=preferred_precision(),
        help="arithmetic of drawing, and of training where a row leaves it open",
    )
    ask.add_argument("--table", type=Path)
    args = ask.parse_args()
    if args.table:
        print(
            markdown(
                [json.loads(text) for text in args.table.read_text(encoding="utf-8").splitlines()]
            )
        )
        return
    every = rows(args.concept)
    wanted = args.rows.split(",") if args.rows else [] if args.tried else list(every)
    if unknown := set(wanted) - set(every):
        ask.error(f"no row named {', '.join(sorted(unknown))}; known: {', '.join(every)}")
    for changes in args.tried:
        every[changes] = attempt(args.concept, changes)
    wanted += args.tried
    concept = load_concept(args.concept)
    samples = select_samples(
        concept,
        prompts=args.prompts,
        seeds=range(SEED, SEED + args.seeds),
        skip=SKIPPED,
        lists=[names[0] for names in concept.lists.values()],  # one list per role
    )
    judge, triplets = concept_judge(concept), Triplets.load(args.triplets or concept.triplets or "")
    half = tuple(row for i, row in enumerate(triplets.rows) if i % 32 < 16)
    model, config = load("mini"), GenerationConfig(precision=args.precision)
    base = generate_and_judge(model, samples, config, judge)
    for name in wanted:
        began, edit = time.perf_counter(), every[name]
        if edit.training.precision == "auto":
            training = edit.training.model_copy(update={"precision": args.precision})
            edit = edit.model_copy(update={"training": training})
        patch = edit.apply(model, Triplets(triplets.folder, half) if name == HALF else triplets)
        seconds = time.perf_counter() - began
        if args.keep:
            patch.save(args.keep / f"{re.sub('[^a-z0-9.]+', '-', name)}.safetensors")
        with patch.apply(model):
            edited = generate_and_judge(model, samples, config, judge)
        row = {
            "row": name,
            "concept": args.concept,
            "precision": config.precision,
            "seconds": round(seconds, 1),
            "settings": edit.model_dump(mode="json"),
            "triplets": triplets.hash,
            "lists": list_rates(samples, base, edited, concept),
        }
        with args.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(line(row), flush=True)


def line(row: dict[str, Any]) -> str:
    """Return a row of the printed table."""
    parts = [f"{row['row']:<34} {row['seconds']:6.1f} s"]
    for name, entry in row["lists"].items():
        short, e, b = name.partition(":")[2], entry["edited"], entry["base"]
        if "removal" in entry:
            parts.append(f"{short} NRR {100 * entry['removal']['value']:.1f}")
        elif e["shown"]:
            parts.append(
                f"{short} {100 * b['shown']['value']:.0f}>{100 * e['shown']['value']:.0f} "
                f"mosaic {100 * e['mosaicked']['value']:.0f}"
            )
        else:
            parts.append(
                f"{short} object {100 * b['subject']['value']:.0f}>"
                f"{100 * e['subject']['value']:.0f} "
                f"mosaic {100 * e['mosaicked']['value']:.0f}"
            )
    return " | ".join(parts)


def markdown(found: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table: percentages, 95 % intervals in brackets."""
    names = list(found[0]["lists"])
    heads = ["setting", "edit, s"]
    for name in names:
        entry, short = found[0]["lists"][name], name.partition(":")[2]
        heads += (
            [f"{short}: removed"]
            if "removal" in entry
            else [f"{short}: drawn" if entry["base"]["shown"] else f"{short}: right object"]
        )
    heads += ["mosaicked, most of these lists", "benign: changed by"]
    out = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in found:
        cells = [row["row"], f"{row['seconds']:.0f}"]
        for name in names:
            entry = row["lists"][name]
            if "removal" in entry:
                r = entry["removal"]
                cells.append(f"{100 * r['value']:.1f} ({100 * r['low']:.1f}–{100 * r['high']:.1f})")
            else:
                key = "shown" if entry["base"]["shown"] else "subject"
                cells.append(
                    f"{100 * entry['base'][key]['value']:.0f} → "
                    f"{100 * entry['edited'][key]['value']:.0f}"
                )
        calm = [row["lists"][name] for name in names if "removal" not in row["lists"][name]]
        cells += [
            f"{100 * max(e['edited']['mosaicked']['value'] for e in calm):.0f}",
            f"{100 * calm[-1]['change']['value']:.1f}",
        ]
        out.append("| " + " | ".join(cells) + " |")
    return "\n".join(out)


if __name__ == "__main__":
    main()
