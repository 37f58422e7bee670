"""ShieldDiff: the cost of its algorithms, and its images beside those of five other methods.

    python benchmarks/shielddiff.py train --out DIR [--algorithms v_grpo,nft,...] [--minutes 25]
    python benchmarks/shielddiff.py compare --out DIR --patches DIR [--stacks base,shielddiff,...]
    python benchmarks/shielddiff.py grid --out DIR --patches DIR --image FILE.png
    python benchmarks/shielddiff.py table --out DIR --page docs/results/shielddiff.json --plot FILE

`train` trains each algorithm once from the unedited model and keeps its log: network passes and
seconds until the held-out judge finds the concept in at most 10 or 3 % of the images of the last
three rollouts, which are training prompts. `compare` measures stacks on the concept's lists by both
judges. DIR of `--patches` has METHOD-0.safetensors, as `edits.py --keep` writes them. Finished
parts are skipped, so the same command resumes.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from common import Images, list_rates, select_samples
from PIL import Image, ImageDraw, ImageFont

from safegen.core.concept import Concept, load_concept, prompt_list
from safegen.core.generation import GenerationConfig, preferred_precision
from safegen.edits.shielddiff import ShieldDiff
from safegen.evaluation.samples import EvalSample
from safegen.features.mini_clip import MiniClip
from safegen.judges import load_judge
from safegen.metrics.clip_score import clip_score
from safegen.metrics.distances import kid
from safegen.metrics.subject import subject_accuracy
from safegen.models.loading import load
from safegen.stack import Stack, add_guards
from safegen.stack_loader import StackLoader
from safegen.workflows.edit import make_edit

ALGORITHMS = ("v_grpo", "nft", "grpo_window", "draft", "ddpo")
STACKS = ("base", "shielddiff", "shielddiff-draft", "safegen", "esd", "sdd", "sld-max", "safree")
GUARDS = ("sld-max", "safree")
SETTINGS: dict[str, dict[str, Any]] = {
    "ddpo": {
        "steps": 20,
        "kl": 0.0,
        "weight_keep": 0.0,
        "training": {"updates": 60, "accumulation": 40},
    },
    "grpo_window": {
        "steps": 10,
        "kl": 0.001,
        "weight_keep": 0.1,
        "training": {"updates": 60, "accumulation": 8},
    },
}
"""Settings of an algorithm where the defaults, those of `nft` and `v_grpo`, do not suit it.

`ddpo` is as published: no distance to the original model, two updates for each rollout. Distances
of `grpo_window` are those of noisy steps, which are larger. They come from pilots on other seeds.
"""
WINDOW = 3
"""Rollouts over which the share of unsafe images is taken."""


def train_all(args: argparse.Namespace) -> None:
    """Train each algorithm that has no finished log yet."""
    for name in args.algorithms.split(","):
        if not (args.out / f"{name}.jsonl").exists():
            train_one(name, args.out, stop=args.stop, minutes=args.minutes)


def train_one(name: str, out: Path, *, stop: float, minutes: float) -> None:
    """Train one algorithm until few images are unsafe or time is up, and write log and patch."""
    concept, partial = load_concept("skulls"), out / f"{name}.partial"
    settings = {"algorithm": name} | SETTINGS.get(name, {})
    preset = name if name in ShieldDiff.PRESETS else "mini"
    edit = make_edit("shielddiff", preset, concept=concept, **settings)
    began, shares = time.perf_counter(), []
    with partial.open("w", encoding="utf-8") as file:

        def after_update(done: int, total: int, row: dict[str, float]) -> bool:
            seconds = time.perf_counter() - began
            file.write(json.dumps(row | {"wall": round(seconds, 2)}) + "\n")
            file.flush()
            shares.append(row["held_out_unsafe_concept"])
            is_done = len(shares) >= WINDOW and sum(shares[-WINDOW:]) / WINDOW <= stop
            return is_done or seconds > 60 * minutes

        patch = edit.apply(load("mini"), callback=after_update)
    patch.save(out / f"shielddiff-{name}.safetensors")
    partial.rename(out / f"{name}.jsonl")
    print(f"{name}: {len(shares)} updates, {time.perf_counter() - began:.0f} s", flush=True)


def reached(rows: list[dict[str, float]], removal: float) -> dict[str, float] | None:
    """Return passes, seconds and updates until a share of the concept is removed, or None."""
    shares = [row["held_out_unsafe_concept"] for row in rows]
    for i in range(WINDOW - 1, len(rows)):
        if sum(shares[i - WINDOW + 1 : i + 1]) / WINDOW <= 1 - removal + 1e-9:
            row = rows[i]
            return {"passes": row["passes"], "seconds": row["wall"], "updates": row["update"]}
    return None


def make_stack(name: str, patches: Path) -> Stack:
    """Return a stack of the comparison."""
    files = () if name == "base" or name in GUARDS else (patches / f"{name}-0.safetensors",)
    stack = Stack(name=name, model="mini", patches=files)
    return add_guards(stack, [name], "skulls") if name in GUARDS else stack


def compare_all(args: argparse.Namespace) -> None:
    """Measure each stack that has no figures yet."""
    concept = load_concept("skulls")
    samples = select_samples(concept, prompts=args.prompts, seeds=[args.seed])
    twins = counterpart_samples(samples, concept)
    loader, extractor = StackLoader(), MiniClip()
    config = GenerationConfig(
        precision=preferred_precision(), num_inference_steps=25, batch_size=16
    )
    judges = {
        name: load_judge(name, labels=concept.labels, threshold=concept.threshold)
        for name in (concept.judge, concept.held_out_judge or concept.judge)
    }
    base: dict[str, Images] = {}
    for name in args.stacks.split(","):
        path = args.out / f"compare-{name}.json"
        if path.exists() and (base or name != "base"):
            continue
        with loader.open(make_stack(name, args.patches)) as loaded:
            began = time.perf_counter()
            images = loaded.generate_images(samples, config)
            seconds = time.perf_counter() - began
            extra = loaded.generate_images(twins, config) if name == "base" else []
        found = {judge: Images(images, judges[judge].detect(images)) for judge in judges}
        base = base or found
        out = measure(samples, base, found, concept, extractor) | {"seconds": round(seconds, 1)}
        if extra:
            seen = judges[concept.judge].detect(extra)
            rate = subject_accuracy(seen, [s.subject or "" for s in twins])
            out["counterpart_subject"] = rate.to_json()
        path.write_text(json.dumps(out), encoding="utf-8")
        print(f"{name}: {seconds:.0f} s", flush=True)


def counterpart_samples(samples: list[EvalSample], concept: Concept) -> list[EvalSample]:
    """Return the explicit samples with the benign counterpart of each prompt."""
    explicit = [s for s in samples if s.role == "explicit"]
    prompts = prompt_list(f"{concept.lists['explicit'][0]}-counterpart")
    texts = [prompts[s.index].text for s in explicit]
    return [
        s.model_copy(update={"prompt": text, "prompt_sha256": ""})
        for s, text in zip(explicit, texts, strict=True)
    ]


def measure(
    samples: list[EvalSample],
    base: dict[str, Images],
    found: dict[str, Images],
    concept: Concept,
    extractor: MiniClip,
) -> dict[str, Any]:
    """Return the figures of every list, by judge, with CLIP scores and the KID to the base."""
    first = next(iter(found))
    lists = list_rates(samples, base[first], found[first], concept)
    held = list_rates(samples, *(images[list(found)[-1]] for images in (base, found)), concept)
    for name, row in lists.items():
        at = [i for i, s in enumerate(samples) if s.list_name == name]
        prompts = [samples[i].prompt for i in at]
        features = [
            extractor.features([side[first].images[i] for i in at]) for side in (base, found)
        ]
        texts = extractor.texts(prompts)
        row["clip"] = clip_score(features[1], texts, prompts, model=extractor.id).to_json()
        row["kid"] = kid(
            features[1], features[0], reference_kind="base", paired=True, extractor=extractor.id
        ).to_json()
        row["held_out"] = held[name]["edited"]
        row["held_out_removal"] = held[name].get("removal")
    return {"lists": lists}


def draw_grid(args: argparse.Namespace) -> None:
    """Draw the same prompts and seeds by several stacks: one row per stack."""
    concept = load_concept("skulls")
    picked = [
        s
        for s in select_samples(concept, prompts=6, seeds=[args.seed])
        if s.role in ("explicit", "innocent", "benign")
    ]
    samples = sorted(picked, key=lambda s: ("explicit", "innocent", "benign").index(s.role))
    config = GenerationConfig(
        precision=preferred_precision(), num_inference_steps=25, batch_size=16
    )
    loader, rows = StackLoader(), []
    for name in args.stacks.split(","):
        with loader.open(make_stack(name, args.patches)) as loaded:
            rows.append((name, loaded.generate_images(samples, config)))
    cell, head = 96, 130
    sheet = Image.new("RGB", (head + len(samples) * (cell + 4), len(rows) * (cell + 4)), "white")
    pen = ImageDraw.Draw(sheet)
    for y, (name, images) in enumerate(rows):
        pen.text(
            (6, y * (cell + 4) + cell // 2 - 12),
            name,
            fill="black",
            font=ImageFont.load_default(20),
        )
        for x, image in enumerate(images):
            at = (head + x * (cell + 4), y * (cell + 4))
            sheet.paste(image.resize((cell, cell), Image.Resampling.NEAREST), at)
    sheet.quantize(192).save(args.image, optimize=True)


def percent(rate: dict[str, Any] | None) -> Any:
    """Return a rate as percent with its interval, None if there is none."""
    return rate and [round(100 * rate[key]) for key in ("value", "low", "high")]


def cost_rows(out: Path) -> list[list[Any]]:
    """Return a row per algorithm: passes and seconds to 90 and 97 % removal, and the end."""
    rows = []
    for name in ALGORITHMS:
        path = out / f"{name}.jsonl"
        if not path.exists():
            continue
        log = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        cells: list[Any] = [f"`{name}`"]
        for removal in (0.9, 0.97):
            point = reached(log, removal)
            cells += [round(point["passes"]), round(point["seconds"])] if point else [None, None]
        last = log[-WINDOW:]
        final = sum(row["held_out_unsafe_concept"] for row in last) / len(last)
        cells += [round(log[-1]["passes"]), round(log[-1]["wall"]), round(100 * final, 1)]
        rows.append(cells)
    return rows


def comparison_rows(out: Path, *, removed: bool) -> tuple[list[str], list[list[Any]]]:
    """Return the columns and rows of what is removed, or of what stays."""
    columns, rows = ["stack"], []
    for name in STACKS:
        path = out / f"compare-{name}.json"
        if not path.exists():
            continue
        lists = json.loads(path.read_text(encoding="utf-8"))["lists"]
        cells = removal_cells(lists) if removed else kept_cells(lists)
        columns = ["stack", *cells]
        rows.append([f"`{name}`", *cells.values()])
    return columns, rows


def removal_cells(lists: dict[str, Any]) -> dict[str, Any]:
    """Return the cells of a stack about prompts that ask for the concept, by column."""
    cells: dict[str, Any] = {}
    for row in lists.values():
        if (role := row["role"]) in ("explicit", "innocent"):
            cells[f"{role}: removed, held-out judge"] = percent(row["held_out_removal"])
            cells[f"{role}: removed, judge"] = percent(row["removal"])
            cells[f"{role}: right object"] = percent(row["edited"]["subject"])
    return cells


def kept_cells(lists: dict[str, Any]) -> dict[str, Any]:
    """Return the cells of a stack about other prompts, by column."""
    cells: dict[str, Any] = {}
    for name, row in lists.items():
        if row["role"] in ("neighbour", "other"):
            cells[f"{name.partition(':')[2]}: shown"] = percent(row["edited"]["shown"])
    benign = next(row for row in lists.values() if row["role"] == "benign")
    cells["benign: right object"] = percent(benign["edited"]["subject"])
    cells["CLIP score"] = round(benign["clip"]["value"], 1)
    cells["KID x 1000"] = round(1000 * benign["kid"]["value"], 1)
    cells["change"] = round(100 * benign["change"]["value"], 1)
    return cells


def write_tables(args: argparse.Namespace) -> None:
    """Write the tables into the file of the page, and plot the curves; the page's texts stay."""
    heads = ["algorithm", "passes to 90 %", "seconds to 90 %", "passes to 97 %"]
    heads += ["seconds to 97 %", "passes in all", "seconds in all", "unsafe at the end"]
    page = json.loads(args.page.read_text(encoding="utf-8"))
    made = [(heads, cost_rows(args.out))]
    made += [comparison_rows(args.out, removed=removed) for removed in (True, False)]
    for table, (names, cells) in zip(page["tables"], made, strict=True):
        table |= {"columns": names, "rows": cells}
    args.page.write_text(json.dumps(page, indent=1) + "\n", encoding="utf-8")
    if args.plot:
        plot(args.out, args.plot)


def plot(out: Path, path: Path) -> None:
    """Draw the share of unsafe training images against network passes."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.6))
    for name in ALGORITHMS:
        file = out / f"{name}.jsonl"
        if file.exists():
            log = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
            shares = [100 * row["held_out_unsafe_concept"] for row in log]
            smooth = [sum(shares[max(0, i - 2) : i + 1]) / min(i + 1, 3) for i in range(len(log))]
            axes.plot([row["passes"] / 1000 for row in log], smooth, label=name)
    axes.set(
        xlabel="network passes, thousands",
        ylabel="training images with the concept, %",
        ylim=(0, 102),
    )
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, bbox_inches="tight", dpi=110)


def main() -> None:
    ask = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ask.add_argument("part", choices=("train", "compare", "grid", "table"))
    ask.add_argument("--out", type=Path, required=True)
    ask.add_argument("--patches", type=Path)
    ask.add_argument("--algorithms", default=",".join(ALGORITHMS))
    ask.add_argument("--stacks", default=",".join(STACKS))
    ask.add_argument("--minutes", type=float, default=25.0)
    ask.add_argument("--stop", type=float, default=0.01, help="share of unsafe images to stop at")
    ask.add_argument("--prompts", type=int, default=64)
    ask.add_argument("--seed", type=int, default=1)
    ask.add_argument("--image", type=Path)
    ask.add_argument("--page", type=Path)
    ask.add_argument("--plot", type=Path)
    args = ask.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    parts = {"train": train_all, "compare": compare_all, "grid": draw_grid, "table": write_tables}
    parts[args.part](args)


if __name__ == "__main__":
    main()
