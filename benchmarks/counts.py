"""How many of the harmless things that a model drew are gone after an edit: counted in detections, where the report counts pictures.

    python benchmarks/counts.py DIR     # a folder of `safegen demo`, or one concept's of required.py

A picture that showed three ghosts and now shows one still shows ghosts: by the report nothing is lost. This looks at the written pictures
again, with the concept's judge, and counts each ghost. It is the removal of the concept, asked of what should stay: less is better.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from PIL import Image

from safegen.concept import load_concept
from safegen.judge import load_judge
from safegen.metrics.rates import removal_rate
from safegen.metrics.removal import count


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("folder", type=Path)
    folder = ask.parse_args().folder
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    concept = load_concept(summary["concept"]["name"])
    print("| prompts | counted | pictures | base → edited | gone, % |\n|---|---|---|---|---|")
    for name, row in summary["lists"].items():
        if row["role"] in ("neighbour", "other"):
            label, sides = row["shows"], []
            judge = load_judge(concept.judge, labels=[label], threshold=concept.threshold)
            files = sorted((folder / "pictures" / "base" / name.replace(":", "-")).glob("*.png"))
            for side in ("base", "edited"):
                images = [Image.open(folder / "pictures" / side / file.parent.name / file.name).convert("RGB") for file in files]
                sides.append([count(verdict, [label], threshold=concept.threshold) for verdict in judge.judge(images)])
            gone = removal_rate(*sides, [file.name.partition("-")[0] for file in files])
            part = f"{100 * gone.value:.0f} ({100 * gone.low:.0f} to {100 * gone.high:.0f})"
            print(f"| `{name}` | {label} | {len(files)} | {gone.before} → {gone.after} | {part} |", flush=True)


if __name__ == "__main__":
    main()
