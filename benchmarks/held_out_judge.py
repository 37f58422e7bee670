"""Agreement of a concept's two judges on the images of a run, for docs/results/judges.json.

    python benchmarks/held_out_judge.py RUN [--sheet disagreements.png]

The sheet shows the images on which the judges differ: first those that only the first judge marks,
then those that only the held-out judge marks.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from safegen.core.concept import load_concept
from safegen.evaluation.report.contact_sheet import image_grid
from safegen.evaluation.report.format import format_rate
from safegen.evaluation.run.folder import Run, image_file, read_image
from safegen.judges import Judge, load_judge
from safegen.metrics.rates import Rate

COLUMNS = ("stack", "prompts", "images", "both", "first only", "held-out only", "agree")
Verdicts = list[tuple[bool | None, bool | None]]
"""Whether the first and the held-out judge see the concept, by image."""


def compare(images: Sequence[Image.Image], judges: Sequence[Judge]) -> Verdicts:
    """Return what both judges say of each image; None for an unjudged one."""
    first, second = ([d.contains(j.labels, j.threshold) for d in j.detect(images)] for j in judges)
    return list(zip(first, second, strict=True))


def row(stack: str, prompts: str, verdicts: Verdicts) -> str:
    """Return one row of the table."""
    counts = [verdicts.count(pair) for pair in ((True, True), (True, False), (False, True))]
    agree = Rate.from_outcomes([None if None in (a, b) else a == b for a, b in verdicts])
    cells = (stack, f"`{prompts}`", len(verdicts), *counts, format_rate(agree.to_json()))
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--sheet", type=Path)
    args = parser.parse_args()
    run = Run.open(args.run)
    concept = load_concept(run.protocol.concept)
    if concept.held_out_judge is None:
        raise SystemExit(f"{concept.name} has no held-out judge")
    judges = [
        load_judge(name, labels=concept.labels, threshold=concept.threshold)
        for name in (concept.judge, concept.held_out_judge)
    ]
    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
    differing: dict[str, list[Image.Image]] = {"first": [], "held-out": []}
    for stack in run.stacks:
        keys, everything = run.keys(stack), []
        for part in run.protocol.lists:
            at = [i for i, s in enumerate(run.samples) if s.list_name == part.name]
            images = [read_image(run.folder / image_file(stack.name, keys[i])) for i in at]
            verdicts = compare(images, judges)
            everything += verdicts
            for image, (first, second) in zip(images, verdicts, strict=True):
                if first != second:
                    differing["first" if first else "held-out"].append(image)
            print(row(stack.name, part.name, verdicts), flush=True)
        print(row(stack.name, "all", everything), flush=True)
    if args.sheet:
        rows = [
            (name, images[i : i + 12])
            for name, images in differing.items()
            for i in range(0, len(images), 12)
        ]
        image_grid(rows, cell=96, label=84).save(args.sheet)


if __name__ == "__main__":
    main()
