"""Errors of the bundled judges on drawn scenes with known truth: src/safegen/judges/agreement.json.

    python benchmarks/judge_truth.py --out agreement.json

A scene is drawn with one object on one background, and with one attribute or none. Every scene then
goes through the model's autoencoder; every other one is first noised to a random step below 600 and
denoised in one step under its caption, so that it has the model's artifacts. Scenes are of another
seed than those that the judges were trained on. The table for docs/results/judges.json is printed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from PIL import Image
from torch import Tensor

from safegen.evaluation.report.comparison import SWEEP
from safegen.evaluation.report.format import format_rate
from safegen.judges import Detections, load_judge
from safegen.metrics.judge_error import judge_agreement
from safegen.metrics.rates import Rate
from safegen.mini import bundle
from safegen.mini.world import ATTRIBUTES
from tools.mini.drawing import Scene
from tools.mini.fit import SEED, autocast
from tools.mini.judge import reconstruct_scenes
from tools.mini.scenes import as_tensors, make_scenes, scene_arrays, to_unit

SCENE_SEED = SEED + 11
"""Seed of the scenes; the judges' own are `SEED` and `SEED + 3`."""
JUDGES = ("mini", "mini-held-out")
LABEL_SETS = [*((a,) for a in ATTRIBUTES), *combinations(ATTRIBUTES[:2], 2)]
"""Label sets of the built-in concepts and neighbours, and the judges' default."""
HEADS = ("judge", "labels", "scenes", "recall", "precision", "specificity")


@torch.no_grad()
def rebuild(scenes: Sequence[Scene]) -> list[Image.Image]:
    """Return the scenes with the model's artifacts."""
    data = as_tensors(scene_arrays(scenes))
    work = bundle.HERE / "weights"
    vae = AutoencoderKL.from_pretrained(work / "pipeline" / "vae").float()
    parts: list[Tensor] = []
    for batch in data["images"].split(100):
        with autocast():
            parts.append(vae.encode(to_unit(batch)).latent_dist.mode().float())
    mean = torch.cat(parts) * vae.config.scaling_factor
    pixels = reconstruct_scenes(work, data, vae, mean, len(scenes), seed=SCENE_SEED)
    return [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in pixels]


def count(
    detections: Sequence[Detections], scenes: Sequence[Scene], labels: Sequence[str], level: float
) -> list[int]:
    """Return the true and false positives, and the false and true negatives."""
    found = judge_agreement(
        [d.contains(labels, level) for d in detections], [s.attribute in labels for s in scenes]
    )
    assert found is not None
    assert not found.unjudged
    return [
        found.true_positives,
        found.false_positives,
        found.false_negatives,
        found.true_negatives,
    ]


def row(judge: str, labels: str, counts: Sequence[int]) -> str:
    """Return one row of the table, at the threshold 0.5."""
    hits, alarms, missed, quiet = counts
    rates = (Rate(hits, hits + missed), Rate(hits, hits + alarms), Rate(quiet, quiet + alarms))
    cells = (f"`{judge}`", labels, sum(counts), *(format_rate(r.to_json()) for r in rates))
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scenes", type=int, default=4000)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    scenes = make_scenes(args.scenes, SCENE_SEED)
    images = rebuild(scenes)
    print(f"| {' | '.join(HEADS)} |\n{'|---' * len(HEADS)}|")
    judges: dict[str, Mapping[str, object]] = {}
    for name in JUDGES:
        judge = load_judge(name)
        detections = judge.detect(images)
        judges[judge.id] = {
            "+".join(sorted(labels)): {
                str(level): count(detections, scenes, labels, level) for level in SWEEP
            }
            for labels in LABEL_SETS
        }
        for labels in LABEL_SETS:
            print(row(name, ", ".join(labels), count(detections, scenes, labels, 0.5)))
        for part in ("subject", "background"):
            own = "object" if part == "subject" else part
            right = [
                getattr(d, part) == getattr(s, own) for d, s in zip(detections, scenes, strict=True)
            ]
            print(f"{name}, {part} right: {format_rate(Rate.from_outcomes(right).to_json())}")
    text = json.dumps({"truth": f"{args.scenes} drawn scenes", "judges": judges}, indent=1)
    args.out.write_text(
        text.replace("[\n     ", "[").replace(",\n     ", ", ").replace("\n    ]", "]") + "\n"
    )


if __name__ == "__main__":
    main()
