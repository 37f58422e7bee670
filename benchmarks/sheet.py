"""Contact sheet of the base model in docs/reference/mini.md: ten objects per list, one seed.

python benchmarks/sheet.py [--out docs/images/mini-sheet.png] [--seed 1]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from safegen.core.concept import prompt_list
from safegen.core.generation import GenerationConfig, Sample, preferred_precision
from safegen.evaluation.report.contact_sheet import image_grid
from safegen.models.generation import generate
from safegen.models.loading import load

LISTS = ("skulls", "skulls-innocent", "fire", "fire-innocent", "ghosts", "leaves", "benign")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/images/mini-sheet.png"))
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    picks = range(0, 30, 3)
    samples = [
        Sample(prompt=prompt_list(f"mini:{name}", 32)[i].text, seed=args.seed, index=i)
        for name in LISTS
        for i in picks
    ]
    config = GenerationConfig(precision=preferred_precision())
    images = list(generate(load("mini"), samples, config))
    rows = [
        (name.replace("-", "\n"), images[n * len(picks) : (n + 1) * len(picks)])
        for n, name in enumerate(LISTS)
    ]
    image_grid(rows, cell=80, label=84).save(args.out)


if __name__ == "__main__":
    main()
