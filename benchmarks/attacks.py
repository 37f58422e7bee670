"""Every attack on every defense of the miniature model: docs/results/attacks.json.

    python benchmarks/attacks.py --patches DIR --out DIR [--stacks base,rece,...]
        [--attacks ring_a_bell,...] [--prompts 12]
    python benchmarks/attacks.py --out DIR --table docs/results/attacks.json --plot FILE.png

DIR of `--patches` has METHOD-0.safetensors, as `python benchmarks/edits.py --keep DIR` writes them.
Attacks of the static tier run once, on the base model; their prompts are then tried on every
stack. Attacks of the adaptive tier run against each stack. Each cell is a run in a folder of its
own, so the same command resumes, and several processes can share the work by `--stacks`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safegen.attacks.core.base import Attack
from safegen.attacks.core.run import AttackConfig, run_attack
from safegen.core.concept import Concept, load_concept
from safegen.core.errors import ConfigError, PatchError
from safegen.core.generation import GenerationConfig, preferred_precision
from safegen.core.registry import ATTACKS
from safegen.evaluation.evaluate import evaluate
from safegen.evaluation.run.folder import SCORES, Run
from safegen.stack import Stack, add_guards
from safegen.stack_loader import StackLoader
from safegen.workflows.attack import make_attack

EDITS = ("safegen", "safegen-plus", "shielddiff", "esd", "sdd", "rece", "uce", "concept_ablation")
STACKS = ("base", *EDITS, "sld-max", "safree", "safegen+sld-max")
SETTINGS: dict[str, dict[str, Any]] = {
    "concept_inversion": {"updates": 200},
    "latent_inversion": {"iterations": 2},
    "relearn": {"data": "concept", "updates": (25, 100)},
    "sneaky_prompt": {"queries": 20},
    "tree_search": {"depth": 2},
}
"""Settings of an attack that differ from its defaults."""
PROMPTS = {
    "compression": 8,
    "concept_inversion": 8,
    "latent_inversion": 8,
    "p4d": 6,
    "seeds": 6,
    "sneaky_prompt": 4,
    "tree_search": 4,
}
"""Number of prompts of an attack that is too slow for the common number."""
STEPS = 15
"""Denoising steps."""
UNUSABLE = "unusable.json"
"""File of a cell that cannot run, with the reason."""


def make_stack(name: str, patches: Path) -> Stack:
    """Return a stack of the table."""
    edit, _, guard = name.partition("+")
    if edit in ("sld-max", "safree"):
        edit, guard = "base", edit
    files = () if edit == "base" else (patches / f"{edit}-0.safetensors",)
    stack = Stack(name=name.replace("+", "-"), model="mini", patches=files)
    return add_guards(stack, [guard], "skulls") if guard else stack


def attack_cell(attack: Attack, stack: Stack, concept: Concept, n: int, folder: Path) -> None:
    """Attack a stack, or note why it cannot be attacked."""
    config = AttackConfig(
        limit=n,
        generation=GenerationConfig(
            precision=preferred_precision(), batch_size=16, num_inference_steps=STEPS
        ),
    )
    began = time.perf_counter()
    try:
        run_attack(attack, stack, concept, config, folder, loader=StackLoader())
    except (ConfigError, PatchError) as error:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / UNUSABLE).write_text(json.dumps(str(error)), encoding="utf-8")
    print(f"{folder}: {time.perf_counter() - began:.0f} s", flush=True)


def transfer(source: Path, stacks: list[Stack], folder: Path) -> None:
    """Try the prompts of a run on other stacks, and note those that cannot start that way."""
    run, loader = Run.open(source), StackLoader()
    lists = []
    for part in run.protocol.lists:
        file = source / str(part.source)
        lists.append(part.model_copy(update={"source": str(file) if file.exists() else part.name}))
    protocol = run.protocol.model_copy(update={"lists": tuple(lists)})
    kinds = {s.start.kind for s in protocol.samples() if s.start} - {"latents"}
    usable, reasons = [], {}
    for stack in stacks:
        try:
            with loader.open(stack) as loaded:
                for kind in kinds:
                    loaded.check_kind(kind)
            usable.append(stack)
        except (ConfigError, PatchError) as error:
            reasons[stack.name] = str(error)
    began = time.perf_counter()
    evaluate(protocol, usable, folder, baselines="none", loader=loader)
    reasons |= unusable(folder.parent)
    (folder.parent / UNUSABLE).write_text(json.dumps(reasons), encoding="utf-8")
    print(f"{folder}: {time.perf_counter() - began:.0f} s", flush=True)


def run_all(args: argparse.Namespace) -> None:
    """Run the cells that are missing."""
    concept = load_concept("skulls")
    for name in args.attacks.split(","):
        attack = make_attack(name, **SETTINGS.get(name, {}))
        n = PROMPTS.get(name, args.prompts)
        adaptive = attack.tier == "adaptive"
        for stack_name in args.stacks.split(",") if adaptive else ["base"]:
            folder = args.out / name / stack_name
            if not (folder / SCORES).exists() and not (folder / UNUSABLE).exists():
                attack_cell(attack, make_stack(stack_name, args.patches), concept, n, folder)
        if not adaptive:
            missing = [s for s in STACKS[1:] if not is_transferred(args.out / name, s)]
            others = [make_stack(other, args.patches) for other in missing]
            if others:
                folder = args.out / name / f"transfer-{missing[0]}"
                transfer(args.out / name / "base", others, folder)


def is_transferred(folder: Path, stack: str) -> bool:
    """Return whether the prompts of a static attack were tried on a stack, or cannot be."""
    return any(transferred(folder, stack)) or stack in unusable(folder)


def transferred(folder: Path, stack: str) -> Iterator[Path]:
    """Yield the runs of a static attack's prompts with a stack."""
    for scores in sorted(folder.glob(f"transfer*/{SCORES}")):
        if stack.replace("+", "-") in json.loads(scores.read_text(encoding="utf-8"))["stacks"]:
            yield scores.parent


def unusable(folder: Path) -> dict[str, str]:
    """Return the reasons of the stacks on which the prompts of a static attack cannot be tried."""
    file = folder / UNUSABLE
    reasons: dict[str, str] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return reasons


# the table

SHOWN = {
    "img2img": "strength=0.3",
    "inpaint": "strength=0.3",
    "relearn": "finetuned-100",
    "compression": "quantized-4",
}
"""Point of a curve that stands in the heat map."""
ALT = (
    "Heat map of attacks by defenses. Edits by words are dark under most attacks, edits by images "
    "are light except under relearning."
)
Figures = dict[str, dict[str, dict[str, Any]]]
"""Figures by attack and stack."""


def read_cells(out: Path) -> Figures:
    """Return the figures of every finished cell."""
    found: Figures = {}
    for attack in ATTACKS:
        for stack in STACKS:
            folder = out / attack / stack
            if (folder / UNUSABLE).exists():
                found.setdefault(attack, {})[stack] = {"unusable": True}
            elif (folder / SCORES).exists():
                found.setdefault(attack, {})[stack] = figures(folder, attack, stack)
            elif is_transferred(out / attack, stack):
                runs = [figures(run, attack, stack) for run in transferred(out / attack, stack)]
                found.setdefault(attack, {})[stack] = runs[0] if runs else {"unusable": True}
    return found


def figures(folder: Path, attack: str, stack: str) -> dict[str, Any]:
    """Return the rates of a cell: `before`, `after` by variant or stack, and `controls`; its cost.

    An attack that changes the stack is measured on its own prompts with the changed stack, or, if
    it changes no prompt, on the attacked prompts.
    """
    stacks = json.loads((folder / SCORES).read_text(encoding="utf-8"))["stacks"]
    name = stack.replace("+", "-")
    if name not in stacks:
        return {}
    lists = stacks[name]["lists"]
    before = {part: row["concept"] for part, row in lists.items() if row["role"] != "attack"}
    controls = {part: before.pop(part) for part in list(before) if part.startswith(f"{attack} ")}
    changed = (
        [] if folder.name.startswith("transfer") else [s for s in stacks if s not in (name, "base")]
    )
    after = {}
    for other in changed or [name]:
        rows = stacks[other]["lists"]
        own = {part: row for part, row in rows.items() if row["role"] == "attack"}
        for part, row in (own or rows).items():
            label = part.removeprefix(attack).strip() if own else other
            after[label or attack] = row["concept"]
    cost: dict[str, float] = {}
    journal = folder / "attack.jsonl"
    if journal.exists():
        for line in journal.read_text(encoding="utf-8").splitlines():
            for key, value in json.loads(line)["cost"].items():
                cost[key] = cost.get(key, 0) + value
    return {"before": before, "after": after, "controls": controls, "cost": cost}


def shown(attack: str, cell: dict[str, Any]) -> dict[str, Any] | None:
    """Return the rate of a cell that the heat map shows."""
    after = cell.get("after", {})
    return after.get(SHOWN.get(attack, ""), next(iter(after.values()), None))


def percent(rate: dict[str, Any] | None) -> Any:
    """Return a rate as percent with its interval."""
    return rate and [round(100 * rate[key]) for key in ("value", "low", "high")]


def tables(found: Figures) -> list[dict[str, Any]]:
    """Return the tables of the page."""
    by_tier = {
        tier: [a for a in found if make_attack(a).tier == tier] for tier in ("static", "adaptive")
    }
    out = []
    for tier, about in (
        ("static", "Found or made once, without the defended model, and tried on every stack."),
        ("adaptive", "Made against each stack."),
    ):
        names = by_tier[tier]
        rows = []
        for stack in STACKS:
            cells = [found[a].get(stack, {}) for a in names]
            rates = [percent(shown(a, c)) for a, c in zip(names, cells, strict=True)]
            rows.append(
                [
                    f"`{stack}`",
                    *("-" if "unusable" in c else r for c, r in zip(cells, rates, strict=True)),
                ]
            )
        columns = ["stack", *(f"`{a}`, n = {counts(found[a])}" for a in names)]
        text = f"Images that show the concept after the attack, percent. {about}"
        out.append({"title": f"The {tier} tier", "text": text, "columns": columns, "rows": rows})
    out[0]["images"] = {"attacks.png": ALT}
    out.append(curves(found))
    out.append(costs(found))
    return out


def counts(cells: dict[str, dict[str, Any]]) -> str:
    """Return the number of images of an attack's cells, as "12" or "6 to 12"."""
    found = {rate["n"] for cell in cells.values() for rate in cell.get("after", {}).values()}
    return " to ".join(map(str, sorted({min(found), max(found)}))) if found else "0"


def curves(found: Figures) -> dict[str, Any]:
    """Return the table of the attacks with several points."""
    rows = []
    for attack, cells in found.items():
        labels = list(dict.fromkeys(label for c in cells.values() for label in c.get("after", {})))
        if len(labels) < 2:
            continue
        for kind in ("after", "controls"):
            for label in labels:
                key = (
                    label
                    if kind == "after"
                    else next(
                        (k for c in cells.values() for k in c.get(kind, {}) if k.endswith(label)),
                        "",
                    )
                )
                values = [percent(cells.get(s, {}).get(kind, {}).get(key)) for s in STACKS]
                if any(values):
                    suffix = "" if kind == "after" else ", control"
                    rows.append([f"`{attack}` {label}{suffix}", *(v and v[0] for v in values)])
    text = "Percent. A control starts from an image without the concept."
    return {"title": "Curves", "text": text, "columns": ["attack", *STACKS], "rows": rows}


def costs(found: Figures) -> dict[str, Any]:
    """Return the table of costs."""
    rows = []
    for attack, cells in found.items():
        for stack in ("base", "safegen-plus"):
            cost = cells.get(stack, {}).get("cost")
            if cost:
                n = max(rate["n"] for rate in cells[stack]["after"].values())
                each = [
                    round(cost.get(key, 0) / n, 1)
                    for key in ("denoiser", "text_encoder", "queries", "seconds")
                ]
                rows.append([f"`{attack}`", f"`{stack}`", *each])
    columns = ["attack", "stack", "denoiser passes", "text encoder passes", "queries", "seconds"]
    text = "Per evaluated image; the evaluation itself is not counted. Seconds are of a busy core."
    return {"title": "Cost", "text": text, "columns": columns, "rows": rows}


def plot(found: Figures, out: Path) -> None:
    """Draw the heat map: attacks by stacks, the static tier first."""
    import matplotlib.pyplot as plt
    import numpy as np

    names = sorted(found, key=lambda a: (make_attack(a).tier != "static", list(found).index(a)))
    grid = np.full((len(STACKS), len(names)), np.nan)
    for column, attack in enumerate(names):
        for row, stack in enumerate(STACKS):
            if rate := shown(attack, found[attack].get(stack, {})):
                grid[row, column] = 100 * rate["value"]
    figure, axes = plt.subplots(figsize=(1.0 + 0.75 * len(names), 0.9 + 0.42 * len(STACKS)))
    axes.imshow(grid, cmap="YlOrRd", vmin=0, vmax=110, aspect="auto")
    for (row, column), value in np.ndenumerate(grid):
        unusable = "unusable" in found[names[column]].get(STACKS[row], {})
        text = f"{value:.0f}" if not np.isnan(value) else "-" if unusable else ""
        axes.text(
            column,
            row,
            text,
            ha="center",
            va="center",
            fontsize=9,
            color="white" if value > 75 else "black",
        )
    static = sum(make_attack(a).tier == "static" for a in names)
    axes.axvline(static - 0.5, color="black", linewidth=2)
    axes.set_xticks(range(len(names)), names, rotation=40, ha="left")
    axes.set_yticks(range(len(STACKS)), STACKS)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.set_xlabel("static tier | adaptive tier: images that show the concept, %")
    figure.savefig(out, bbox_inches="tight", dpi=110)


def main() -> None:
    ask = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ask.add_argument("--patches", type=Path, default=Path("patches"))
    ask.add_argument("--out", type=Path, required=True)
    ask.add_argument("--stacks", default=",".join(STACKS))
    ask.add_argument("--attacks", default=",".join(ATTACKS))
    ask.add_argument("--prompts", type=int, default=12)
    ask.add_argument("--table", type=Path, help="JSON file of a page: its tables are replaced")
    ask.add_argument("--plot", type=Path, help="PNG file for the heat map")
    args = ask.parse_args()
    if not args.table and not args.plot:
        run_all(args)
        return
    found = read_cells(args.out)
    if args.table:
        page = json.loads(args.table.read_text(encoding="utf-8")) if args.table.exists() else {}
        page["tables"] = tables(found)
        args.table.write_text(
            json.dumps(page, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
    if args.plot:
        plot(found, args.plot)


if __name__ == "__main__":
    main()
