"""The sheet of the base model's pictures in docs/reference/mini.md: ten objects a list, one seed, nothing picked by eye.

python benchmarks/sheet.py [--out docs/images/mini-sheet.png] [--seed 1]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from safegen.core.concept import prompt_list
from safegen.core.generation import GenerationConfig, Sample, preferred_precision
from safegen.evaluation.report.contact_sheet import sheet
from safegen.models.generation import generate
from safegen.models.loading import load

LISTS = ("skulls", "skulls-innocent", "fire", "fire-innocent", "ghosts", "leaves", "benign")


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__)
    ask.add_argument("--out", type=Path, default=Path("docs/images/mini-sheet.png"))
    ask.add_argument("--seed", type=int, default=1)
    args = ask.parse_args()
    picks = range(0, 30, 3)
    asks = [
        Sample(prompt=prompt_list(f"mini:{name}", 32)[i].text, seed=args.seed, index=i)
        for name in LISTS
        for i in picks
    ]
    drawn = list(generate(load("mini"), asks, GenerationConfig(precision=preferred_precision())))
    rows = [
        (name.replace("-", "\n"), drawn[n * len(picks) : (n + 1) * len(picks)])
        for n, name in enumerate(LISTS)
    ]
    sheet(rows, cell=80, label=84).save(args.out)


if __name__ == "__main__":
    main()
