"""What the pictures' rates hide: harmless things that are gone one by one, and traces of the concept that the judge does not call it.

    python benchmarks/counts.py DIR     # a folder of `safegen demo`, or one concept's of
    required.py

A picture that showed three ghosts and now shows one still shows ghosts: by the report nothing is
lost. The first table looks at the written pictures again, with the concept's judge, and counts each
ghost. It is the removal of the concept, asked of what should stay: less is better.

A half-gone skull may score too little to be called one. The second table lowers the judge's
threshold and counts the pictures with anything left that reaches it. A lower threshold sees the
concept where it never was, too: what it sees in the base model's harmless pictures says how often,
and what an edit leaves is told from that only above it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from PIL import Image

from safegen.core.concept import Concept, load_concept
from safegen.judges import Detections, load_judge
from safegen.metrics.rates import Rate, removal_rate
from safegen.metrics.removal import count

FAINT = (0.5, 0.4, 0.3, 0.2)
"""Thresholds that a trace is looked for at; a judge keeps nothing below the last."""


def look(
    folder: Path, name: str, labels: list[str], concept: Concept
) -> dict[str, dict[str, Detections]]:
    """Return what the judge says of one list's pictures, by side and file name."""
    judge, out = load_judge(concept.judge, labels=labels, threshold=concept.threshold), {}
    for side in ("base", "edited"):
        files = sorted((folder / "pictures" / side / name.replace(":", "-")).glob("*.png"))
        out[side] = dict(
            zip(
                [f.name for f in files],
                judge.detect([Image.open(f).convert("RGB") for f in files]),
                strict=True,
            )
        )
    return out


def gone_one_by_one(folder: Path, summary: dict[str, Any], concept: Concept) -> list[str]:
    """Return the first table."""
    out = ["| prompts | counted | pictures | base → edited | gone, % |", "|---|---|---|---|---|"]
    for name, row in summary["lists"].items():
        if row["role"] in ("neighbour", "other"):
            label = row["shows"]
            sides = look(folder, name, [label], concept)
            files = list(sides["base"])
            counts = [
                [count(sides[side][file], [label], threshold=concept.threshold) for file in files]
                for side in ("base", "edited")
            ]
            gone = removal_rate(*counts, [file.partition("-")[0] for file in files])
            part = f"{100 * gone.value:.0f} ({100 * gone.low:.0f} to {100 * gone.high:.0f})"
            out.append(
                f"| `{name}` | {label} | {len(files)} | {gone.before} → {gone.after} | {part} |"
            )
    return out


def faint(folder: Path, summary: dict[str, Any], concept: Concept) -> list[str]:
    """Return the second table."""
    out = ["| prompts | side | pictures | " + " | ".join(f"score ≥ {t}, %" for t in FAINT) + " |"]
    out.append("|" + "---|" * (3 + len(FAINT)))
    for name, row in summary["lists"].items():
        if row["role"] == "other":
            continue
        sides = look(folder, name, list(concept.labels), concept)
        for side, found in sides.items():
            cells = []
            for t in FAINT:
                seen = Rate.from_outcomes([d.contains(concept.labels, t) for d in found.values()])
                low, high = seen.interval
                cells.append(f"{100 * seen.value:.1f} ({100 * low:.1f} to {100 * high:.1f})")
            out.append(f"| `{name}` | {side} | {len(found)} | " + " | ".join(cells) + " |")
    return out


def main() -> None:
    ask = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ask.add_argument("folder", type=Path)
    folder = ask.parse_args().folder
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    concept = load_concept(summary["concept"]["name"])
    for table in (gone_one_by_one, faint):
        print("\n".join(table(folder, summary, concept)) + "\n", flush=True)


if __name__ == "__main__":
    main()
