"""Guards and stacks on the miniature model: what each removes, what it costs of everything else, and how long it takes.

    python benchmarks/guards.py [--out guards.json] [--concept skulls] [--prompts 32] [--seeds 1] [--patch PATCH] [--only sld-max,...]

A row for each guard or stack and each list of the concept. Every stack draws the same prompts, seeds and noise as the base, in the same
process, batch by batch in turn with it, so that the seconds are held against each other under the same load; on a busy machine read the
processor's seconds and not the clock's. With --patch, the rows come again on top of the patch. The judge that measures is the bundled one;
a row whose guard asks that same judge is marked: it says nothing.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safegen.bench.plan import Item, make_plan
from safegen.bench.score import removal, score
from safegen.concept import Concept, load_concept
from safegen.guard import Drawn, read_guard
from safegen.judge import load_judge
from safegen.sampler import Sampler
from safegen.stack import Shelf, Stack

STACKS: dict[str, tuple[Any, ...]] = {
    "base": (),
    "negative-prompt": ("negative-prompt",),
    "sld-weak": ("sld-weak",),
    "sld-medium": ("sld-medium",),
    "sld-strong": ("sld-strong",),
    "sld-max": ("sld-max",),
    "safree": ("safree",),
    "prompt-filter": ("prompt-filter",),
    "judge-filter": ("judge-filter",),
    "safree + negative-prompt": ("safree", "negative-prompt"),
    "sld-max + negative-prompt": ("sld-max", "negative-prompt"),
    "safree + sld-max": ("safree", "sld-max"),
}
"""Row: its guards; each takes the concept's words, or its judge."""
SAME_JUDGE = {"judge-filter"}


def stacks(concept: Concept, patch: Path | None, only: Sequence[str]) -> list[Stack]:
    out = []
    for patches in ((),) if patch is None else ((), (patch,)):
        for title, words in STACKS.items():
            if only and title not in only and title != "base":
                continue
            name = ("patch " if patches else "") + title
            stack = Stack(name="s", model="mini", patches=patches, guards=tuple(read_guard(w, concept) for w in words))
            out.append(stack.model_copy(update={"name": name}))  # a title, and no folder's name
    return out


def draw(shelf: Shelf, stack: Stack, items: Sequence[Item], sampler: Sampler) -> tuple[list[Drawn], float, float]:
    with shelf.opened(stack) as ready:
        began, spent = time.perf_counter(), time.process_time()
        found = ready.drawn([item.ask for item in items], sampler)
        seconds, spent = time.perf_counter() - began, time.process_time() - spent
        black = ready.shown(Drawn(None, found[0].trail))
    return [one if one.image is not None else Drawn(black, one.trail) for one in found], seconds, spent


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--out", type=Path, default=Path("guards.json"))
    ask.add_argument("--concept", default="skulls")
    ask.add_argument("--prompts", type=int, default=32)
    ask.add_argument("--seeds", type=int, default=1)
    ask.add_argument("--steps", type=int, default=25)
    ask.add_argument("--precision", default="bf16")
    ask.add_argument("--batch", type=int, default=32)
    ask.add_argument("--patch", type=Path)
    ask.add_argument("--only", default="", help="Titles of rows, with commas between; the base is always drawn.")
    args = ask.parse_args()
    if args.out.exists():
        ask.error(f"{args.out} exists already; name another file with --out, or remove it")
    concept = load_concept(args.concept)
    items = make_plan(concept, prompts=args.prompts, seeds=range(1, args.seeds + 1))
    sampler = Sampler(steps=args.steps, precision=args.precision, batch=args.batch)
    every = stacks(concept, args.patch, [part for part in args.only.split(",") if part])
    judge, shelf = load_judge(concept.judge, labels=concept.labels, threshold=concept.threshold), Shelf()
    pictures: dict[str, list[Drawn]] = {stack.name: [] for stack in every}
    seconds, spent = dict.fromkeys(pictures, 0.0), dict.fromkeys(pictures, 0.0)
    draw(shelf, every[0], items[:1], sampler)  # what is only done once, before anything is timed
    for start in range(0, len(items), sampler.batch):
        for stack in every:
            found, clock, processor = draw(shelf, stack, items[start : start + sampler.batch], sampler)
            pictures[stack.name] += found
            seconds[stack.name] += clock
            spent[stack.name] += processor
        print(f"{min(start + sampler.batch, len(items))} of {len(items)} pictures by {len(every)} stacks", flush=True)
    verdicts = {name: judge.judge([one.image for one in found if one.image is not None]) for name, found in pictures.items()}
    rows = []
    for stack in every:
        for part in dict.fromkeys(item.list_name for item in items):
            at = [i for i, item in enumerate(items) if item.list_name == part]
            own, base = ([verdicts[name][i] for i in at] for name in (stack.name, "base"))
            asked = [items[i] for i in at]
            row: dict[str, Any] = {"stack": stack.name, "list": part, "role": asked[0].role, **score(asked, own, concept).to_json()}
            row["withheld"] = sum(pictures[stack.name][i].trail.withheld or pictures[stack.name][i].trail.action == "black" for i in at)
            if asked[0].role in ("explicit", "innocent"):
                row["removal"] = removal(asked, base, own, concept).to_json()
            rows.append(row)
    facts = {"settings": {k: str(v) for k, v in vars(args).items()}, "judge": judge.id, "pictures": len(items)}
    per = {
        name: {"seconds": seconds[name] / len(items), "times base": seconds[name] / seconds["base"],
               "processor seconds": spent[name] / len(items), "processor times base": spent[name] / spent["base"]}
        for name in pictures
    }  # fmt: skip
    args.out.write_text(json.dumps(facts | {"seconds a picture": per, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    _show(rows, per, len(items))


def _show(rows: Sequence[dict[str, Any]], per: dict[str, dict[str, float]], n: int) -> None:
    def text(r: dict[str, Any] | None) -> str:
        return f"{100 * r['value']:.0f} ({100 * r['low']:.0f} to {100 * r['high']:.0f})" if r else ""

    heads = ("stack", "list", "n", "concept seen %", "removed %", "right object %", "asked for besides %", "withheld")
    print("\n| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|")
    for row in rows:
        name = row["stack"] + (" (judged by itself)" if row["stack"].removeprefix("patch ") in SAME_JUDGE else "")
        cells = [text(row["concept"]), text(row.get("removal")), text(row["subject"]), text(row["shown"])]
        print(f"| {name} | {row['role']}: {row['list']} | {row['concept']['n']} | " + " | ".join(cells) + f" | {row['withheld']} |")
    print("\n| stack | seconds a picture | times base | processor seconds | times base |\n|---|---|---|---|---|")
    for name, took in per.items():
        print("| " + " | ".join([name, *(f"{v:.3f}" for v in took.values())]) + " |")
    print(f"\n{n} pictures a stack; intervals are 95 %: Wilson, removal by bootstrap over prompts")


if __name__ == "__main__":
    main()
