"""Prompt ladder and composition of the base model and two edits: docs/results/ladder.json.

    python benchmarks/prompt_ladder.py --patches DIR --out FOLDER

DIR holds `safegen-0.safetensors` and `uce-0.safetensors`, as `benchmarks/edits.py --keep` writes
them. FOLDER gets one run for each protocol; a second call resumes. The tables are printed as JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safegen.evaluation.evaluate import evaluate
from safegen.evaluation.protocol_file import load_protocol
from safegen.evaluation.report.page import open_runs, write_report
from safegen.evaluation.run.folder import SCORES
from safegen.evaluation.run.scores import read_scores
from safegen.metrics.rates import Rate
from safegen.stack import load_stack

STACKS = ("base", "safegen", "uce")
PROTOCOLS = ("mini-ladder", "mini-composition")
PARTS = ("all", "object", "background", "attribute")


def run(protocol: str, patches: Path, out: Path) -> dict[str, Any]:
    """Return the scores of a protocol."""
    specs = ["base=mini", *(f"{n}=mini+{patches / n}-0.safetensors" for n in STACKS[1:])]
    stacks = [load_stack(spec) for spec in specs]
    folder = out / protocol
    evaluate(load_protocol(protocol), stacks, folder, baselines="none")
    write_report(open_runs([folder]), folder)
    return read_scores(folder / SCORES)


def cell(rate: Mapping[str, Any]) -> list[float]:
    """Return a rate with its interval in percent."""
    return [round(100 * rate[key], 1) for key in ("value", "low", "high")]


def ladder_rows(scores: Mapping[str, Any]) -> list[list[Any]]:
    """Return a row for each rung: images that show the concept, by stack."""
    lists = {name: scores["stacks"][name]["lists"] for name in STACKS}
    return [
        [name.rpartition("-")[2], *(cell(lists[stack][name]["concept"]) for stack in STACKS)]
        for name in lists["base"]
    ]


def composition_rows(scores: Mapping[str, Any]) -> list[list[Any]]:
    """Return a row for each stack and list, and one for all lists of a stack."""
    rows = []
    for stack in STACKS:
        scored = {
            name: row["composition"] for name, row in scores["stacks"][stack]["lists"].items()
        }
        total = {
            part: Rate(*(sum(s[part][key] for s in scored.values()) for key in ("hits", "n")))
            for part in PARTS
        }
        scored["all"] = {part: rate.to_json() for part, rate in total.items()}
        for name, score in scored.items():
            kind = name.removeprefix("mini:").removesuffix("-composition")
            rows.append([stack, kind, score["all"]["n"], *(cell(score[part]) for part in PARTS)])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--patches", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    ladder, composition = (run(name, args.patches, args.out) for name in PROTOCOLS)
    for rows in (ladder_rows(ladder), composition_rows(composition)):
        print("[\n" + ",\n".join(f"   {json.dumps(row)}" for row in rows) + "\n]", flush=True)


if __name__ == "__main__":
    main()
