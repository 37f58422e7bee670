"""What carries over from a UNet to a transformer with flow matching, method by method.

    python benchmarks/carry_over.py --out DIR [--models mini,mini-flow] [--rows safegen,esd,...]
        [--prompts 32] [--seeds 1] [--attacks ring_a_bell,seeds,img2img]
    python benchmarks/carry_over.py --out DIR --table FILE.json

Every method acts on two models of one world, with the same prompts, seeds and judge, each with the
preset that safegen chooses for the model: `mini` is a UNet that predicts noise, `mini-flow` an
MMDiT with flow matching. Patches, runs and attacks are in DIR; the same command resumes. A row is
`METHOD`, `METHOD:PRESET`, or `METHOD@SELECTOR`, which trains other weights: the study of which part
of a transformer carries the concept.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safegen.attacks.core.run import AttackConfig, run_attack
from safegen.core.concept import Concept, load_concept
from safegen.core.errors import ConfigError, PatchError
from safegen.core.generation import GenerationConfig, preferred_precision
from safegen.core.registry import EDITS, resolve
from safegen.data.triplets.triplets import Triplets
from safegen.edits.training.presets import default_preset
from safegen.evaluation.evaluate import evaluate
from safegen.evaluation.protocol import Protocol
from safegen.evaluation.run.folder import SCORES
from safegen.models.loading import load
from safegen.models.model import Model
from safegen.stack import Stack, add_guards
from safegen.stack_loader import StackLoader
from safegen.workflows.attack import make_attack
from safegen.workflows.edit import make_edit

MODELS = ("mini", "mini-flow")
ROWS = (
    "safegen",
    "safegen-plus",
    "esd",
    "rece",
    "sdd",
    "shielddiff",
    "sld-max",
    "safree",
    "negative-prompt",
)
STUDY = ("safegen:mini", "safegen@dual", "safegen@joint", "safegen@attn1", "safegen@attention")
"""Rows of the study on mini-flow: the settings for a UNet unchanged, and other weights."""
ATTACKS = ("ring_a_bell", "seeds", "img2img")
UNUSABLE = "unusable.json"


def make_patch(row: str, model: Model, concept: Concept, path: Path) -> None:
    """Make the patch of a row unless it exists, or note why it cannot be made."""
    if path.exists() or path.with_suffix(".json").exists():
        return
    head, _, selector = row.partition("@")
    method, _, preset = head.partition(":")
    changes = {"selector": selector} if selector else {}
    kind = resolve(EDITS, method, "edit")
    preset = preset or default_preset(model, kind.PRESETS)
    began = time.perf_counter()
    try:
        edit = make_edit(method, preset, concept=concept, **changes)
        triplets = Triplets.load(concept.triplets or "") if kind.inputs != "words" else None
        edit.apply(model, triplets).save(path)
    except ConfigError as error:
        path.with_suffix(".json").write_text(json.dumps(str(error)), encoding="utf-8")
    print(f"{model.name} {row}: {time.perf_counter() - began:.0f} s", flush=True)


def is_edit(row: str) -> bool:
    """Return whether a row is an edit, not a guard."""
    return row.partition("@")[0].partition(":")[0] in EDITS


def stack_of(row: str, model: str, folder: Path) -> Stack:
    """Return the stack of a row: a patch or a guard."""
    name = row.translate(str.maketrans("@:", "--"))
    if is_edit(row):
        return Stack(name=name, model=model, patches=(folder / f"{row}.safetensors",))
    return add_guards(Stack(name=name, model=model), [row], "skulls")


def run_model(model_name: str, args: argparse.Namespace) -> None:
    """Make the patches of a model, evaluate all stacks and attack each."""
    concept, folder = load_concept("skulls"), args.out / model_name
    folder.mkdir(parents=True, exist_ok=True)
    rows = [*args.rows.split(","), *(STUDY if model_name == "mini-flow" and args.study else ())]
    edits = [row for row in rows if is_edit(row)]
    model = load(model_name)
    for row in edits:
        make_patch(row, model, concept, folder / f"{row}.safetensors")
    stacks = [
        stack_of(row, model_name, folder)
        for row in rows
        if row not in edits or (folder / f"{row}.safetensors").exists()
    ]
    generation = GenerationConfig(precision=preferred_precision(), num_inference_steps=args.steps)
    protocol = Protocol.from_concept(
        concept, prompts=args.prompts, seeds=range(1, args.seeds + 1), generation=generation
    )
    began = time.perf_counter()
    evaluate(protocol, stacks, folder / "run", baselines="none")
    print(f"{model_name} evaluated: {time.perf_counter() - began:.0f} s", flush=True)
    config = AttackConfig(limit=args.attacked, generation=generation)
    for name in filter(None, args.attacks.split(",")):
        for stack in (stack_of(row, model_name, folder) for row in args.rows.split(",")):
            cell = folder / name / stack.name
            missing = stack not in stacks
            if missing or (cell / SCORES).exists() or (cell / UNUSABLE).exists():
                continue
            try:
                run_attack(make_attack(name), stack, concept, config, cell, loader=StackLoader())
            except (ConfigError, PatchError) as error:
                cell.mkdir(parents=True, exist_ok=True)
                (cell / UNUSABLE).write_text(json.dumps(str(error)), encoding="utf-8")
            print(f"{cell}: {time.perf_counter() - began:.0f} s", flush=True)


def read_results(out: Path) -> dict[str, dict[str, Any]]:
    """Return the lists' figures and the attacks' by model and stack, and reasons of gaps."""
    found: dict[str, dict[str, Any]] = {}
    for model in MODELS:
        folder = out / model
        if not (folder / "run" / SCORES).exists():
            continue
        stacks = json.loads((folder / "run" / SCORES).read_text(encoding="utf-8"))["stacks"]
        found[model] = {name: {"lists": row["lists"]} for name, row in stacks.items()}
        for path in sorted(folder.glob("*.json")):
            reason = json.loads(path.read_text(encoding="utf-8"))
            found[model][path.stem.translate(str.maketrans("@:", "--"))] = {"unusable": reason}
        for attack in ATTACKS:
            for name, row in found[model].items():
                cell = folder / attack / name
                if (cell / UNUSABLE).exists():
                    reason = json.loads((cell / UNUSABLE).read_text(encoding="utf-8"))
                    row.setdefault("attacks", {})[attack] = {"unusable": reason}
                elif (cell / SCORES).exists():
                    scores = json.loads((cell / SCORES).read_text(encoding="utf-8"))
                    lists = scores["stacks"][name]["lists"]
                    row.setdefault("attacks", {})[attack] = {
                        part: entry["concept"]
                        for part, entry in lists.items()
                        if entry["role"] == "attack"
                    }
    return found


def cell(rate: Mapping[str, Any] | None) -> list[int] | None:
    """Return a rate with its interval in percent, or None without one."""
    if not rate or rate.get("value") is None:
        return None
    return [round(100 * rate[key]) for key in ("value", "low", "high")]


def method_rows(stacks: Mapping[str, Any]) -> list[list[Any]]:
    """Return a row for each stack of a model: the rates of its lists."""
    rows: list[list[Any]] = []
    for name, row in stacks.items():
        if "unusable" in row:
            rows.append([f"`{name}`", row["unusable"], *[None] * 5])
            continue
        of = {part.rpartition(":")[2]: entry for part, entry in row["lists"].items()}
        rates = [of["skulls"]["concept"], of["skulls-innocent"]["concept"]]
        rates += [of["ghosts"]["shown"], of["leaves"]["shown"], of["benign"]["subject"]]
        rows.append([f"`{name}`", *map(cell, rates), of["benign"]["subject"]["n"]])
    return rows


def attack_table(stacks: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Return columns and rows of the attacks on a model: one per attack and strength."""
    found: dict[str, dict[str, Any]] = {}
    for name, row in stacks.items():
        for attack, rates in row.get("attacks", {}).items():
            if "unusable" in rates:
                found.setdefault(attack, {})[name] = rates["unusable"]
                continue
            for part, rate in rates.items():
                variant = f" {part.rpartition('=')[2]}" if "=" in part else ""
                found.setdefault(f"{attack}{variant}", {})[name] = cell(rate)
    attacked = [name for name in stacks if any(name in cells for cells in found.values())]
    rows = [[f"`{name}`", *(cells.get(name) for cells in found.values())] for name in attacked]
    return ["stack", *(f"{name}, %" for name in found)], rows


def page(found: Mapping[str, Mapping[str, Any]], about: Mapping[str, Any]) -> dict[str, Any]:
    """Return the page of results: a table of rates and one of attacks for each model."""
    tables: list[dict[str, Any]] = []
    for model, stacks in found.items():
        attacks, attacked = attack_table(stacks)
        columns = ["stack", "explicit, %", "innocent, %", "ghosts, %", "leaves, %"]
        tables += [
            {
                "title": f"Methods on {model}",
                "text": "Images with skulls, for prompts that name them or imply them; images with "
                "the harmless neighbour that the prompt asks for; benign images with the right "
                "object.",
                "columns": [*columns, "right object, %", "n"],
                "rows": method_rows(stacks),
            },
            {
                "title": f"Attacks on {model}",
                "text": "Prompts that show skulls under the attack; `img2img` by its strength.",
                "columns": attacks,
                "rows": attacked,
            },
        ]
    return {**about, "tables": tables}


def main() -> None:
    ask = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ask.add_argument("--out", type=Path, required=True)
    ask.add_argument("--models", default=",".join(MODELS))
    ask.add_argument("--rows", default=",".join(ROWS))
    ask.add_argument("--study", action="store_true", help="also train other selectors on mini-flow")
    ask.add_argument("--attacks", default=",".join(ATTACKS))
    ask.add_argument("--prompts", type=int, default=32, help="prompts of each list")
    ask.add_argument("--seeds", type=int, default=1)
    ask.add_argument("--attacked", type=int, default=8, help="prompts of each attack")
    ask.add_argument("--steps", type=int, default=25)
    ask.add_argument("--table", type=Path, help="write the tables; other fields of the file stay")
    args = ask.parse_args()
    if args.table:
        kept = json.loads(args.table.read_text(encoding="utf-8")) if args.table.exists() else {}
        made = page(read_results(args.out), kept or {"title": "Carry-over", "summary": ""})
        args.table.write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n", "utf-8")
        return
    for model in args.models.split(","):
        run_model(model, args)


if __name__ == "__main__":
    main()
