"""Picture of the README: base model, edited model, and the edited model on harmless prompts.

python benchmarks/before_after.py PATCH [--out docs/images/before-after.png] [--seed 1]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from safegen.core.concept import prompt_list
from safegen.core.generation import GenerationConfig, Sample, preferred_precision
from safegen.evaluation.report.contact_sheet import image_grid
from safegen.models.generation import generate
from safegen.models.loading import load
from safegen.patches.patch import Patch

COLUMNS = 10
CELL, LABEL = 78, 84
"""Pixels of an image and of the labels: three rows are 250 pixels high."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("patch", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs/images/before-after.png"))
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    model, config = load("mini"), GenerationConfig(precision=preferred_precision())
    samples = {
        name: [
            Sample(prompt=row.text, seed=args.seed, index=i)
            for i, row in enumerate(prompt_list(f"mini:{name}", 3 * COLUMNS)[::3])
        ]
        for name in ("skulls", "benign")
    }
    base = list(generate(model, samples["skulls"], config))
    with Patch.load(args.patch).apply(model):
        edited = list(generate(model, samples["skulls"], config))
        harmless = list(generate(model, samples["benign"], config))
    rows = [("base", base), ("edited", edited), ("edited,\nharmless\nprompts", harmless)]
    image_grid(rows, cell=CELL, label=LABEL).save(args.out)


if __name__ == "__main__":
    main()
