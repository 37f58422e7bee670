"""Every edit side by side on the miniature model: the table in docs/results/edits.json.

    python benchmarks/edits.py [--concept skulls] [--prompts 64] [--seeds 3]
        [--rows safegen,uce,...] [--out edits.jsonl]
    python benchmarks/edits.py --table edits.jsonl      # the rows so far, as Markdown

One row per edit, all on the same prompts, seeds, sampler and judge. Rows are appended as they
finish. A row is `METHOD`, `METHOD:PRESET` or a patch's file; rows joined with `+` are applied one
after the other. Prompts are the first of each list with seeds 1 to 3, as in the required figures
(`required.py`): choose settings elsewhere (`--skip 128 --seed 11`, as the ablation does).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from common import Images, concept_judge, generate_and_judge, list_rates, select_samples

from safegen.core.concept import Concept, load_concept
from safegen.core.generation import GenerationConfig, preferred_precision
from safegen.core.registry import EDITS, resolve
from safegen.data.triplets.triplets import Triplets
from safegen.evaluation.samples import EvalSample
from safegen.features.mini_clip import MiniClip
from safegen.metrics.clip_score import clip_score
from safegen.metrics.distances import kid
from safegen.metrics.paired import mcnemar
from safegen.metrics.subject import subject_retention
from safegen.models.loading import load
from safegen.models.model import Model
from safegen.patches.patch import Patch
from safegen.workflows.edit import make_edit


def make_patch(
    row: str, model: Model, concept: Concept, training: dict[str, Any]
) -> tuple[Patch, dict[str, Any], float | None]:
    """Return one edit's patch, its settings and its seconds, None where it does not say.

    Or a patch's file, read.
    """
    if row.endswith(".safetensors"):
        patch = Patch.load(Path(row))
        parts = [part.metadata.to_json() for part in patch.metadata.parts] or [
            patch.metadata.to_json()
        ]
        settings = [dict(part.get("settings", {})) for part in parts]
        told = [part.get("seconds") for part in parts]
        spent = (
            None if None in told else sum(map(float, told))
        )  # a LoRA's file does not say how long it took
        return patch, settings[0] if len(settings) == 1 else {"parts": settings}, spent
    method, _, preset = row.partition(":")
    kind = resolve(EDITS, method, "edit")
    changes = {"training": training} if training and kind.is_trained else {}
    edit = make_edit(method, preset or "mini", concept=concept, **changes)
    triplets = None
    if edit.inputs != "words":
        triplets = Triplets.load(concept.triplets or "")
    began = time.perf_counter()
    patch = edit.apply(model, triplets)
    return patch, edit.model_dump(mode="json"), time.perf_counter() - began


def size_of(patch: Patch) -> int:
    """Return the bytes of a patch's file."""
    with tempfile.TemporaryDirectory() as folder:
        patch.save(Path(folder) / "p.safetensors")
        return (Path(folder) / "p.safetensors").stat().st_size


def forget_peak() -> None:
    """Let the peak that `peak_mib` reads begin anew, where the system can (Linux)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_mib() -> int | None:
    """Return the most memory that the process has held since `forget_peak`, in MiB.

    None where the system does not say.
    """
    with suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return round(
            int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) / 1024
        )
    return None


def measure(
    extractor: MiniClip, samples: list[EvalSample], base: Images, edited: Images, concept: Concept
) -> dict[str, Any]:
    """Return every list's figures."""
    lists = list_rates(samples, base, edited, concept)
    for name, row in lists.items():
        at = [i for i, s in enumerate(samples) if s.list_name == name]
        part, prompts = [samples[i] for i in at], [samples[i].prompt for i in at]
        texts, features = extractor.texts(prompts), {}
        for stack, images in (("base", base), ("edited", edited)):
            features[stack] = extractor.features([images.images[i] for i in at])
            row[f"clip_{stack}"] = clip_score(
                features[stack], texts, prompts, model=extractor.id
            ).to_json()
        if len(part) >= 8:  # fewer images give no meaningful KID
            new, old = features["edited"], features["base"]
            row["kid"] = kid(
                new, old, reference_kind="base", paired=True, extractor=extractor.id
            ).to_json()
        before, after = ([side.detections[i] for i in at] for side in (base, edited))
        try:
            subjects = [s.subject or "" for s in part]
            row["coherence"] = subject_retention(before, after, subjects).to_json()
        except ValueError as error:  # the base model never shows the subject
            row["coherence"], row["coherence_undefined"] = None, str(error)
        if row["role"] in ("explicit", "innocent"):
            row["seen"] = [d.contains(concept.labels, concept.threshold) for d in after]
    return lists


def main() -> None:
    ask = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ask.add_argument("--concept", default="skulls")
    ask.add_argument("--prompts", type=int, default=64)
    ask.add_argument("--skip", type=int, default=0, help="first prompts of each list to leave out")
    ask.add_argument("--seeds", type=int, default=3)
    ask.add_argument("--seed", type=int, default=1, help="the first seed")
    ask.add_argument("--steps", type=int, default=25)
    ask.add_argument(
        "--updates", type=int, help="updates of every edit that trains, to see that all works"
    )
    ask.add_argument("--rows", default=",".join(EDITS))
    ask.add_argument("--lists", default="", help="measure on these lists only")
    ask.add_argument("--out", type=Path, default=Path("edits.jsonl"))
    ask.add_argument(
        "--keep",
        type=Path,
        help="a folder for the patches, ROW-0.safetensors and on; not kept unless told",
    )
    ask.add_argument("--table", type=Path)
    ask.add_argument(
        "--plot",
        type=Path,
        help="with --table, also draw removed (innocent) against changed (last list) to this file",
    )
    args = ask.parse_args()
    if args.table:
        found = [json.loads(text) for text in args.table.read_text(encoding="utf-8").splitlines()]
        print(markdown(found))
        print("\n".join(["", *compared(found)]))
        if args.plot:
            plot(found, args.plot)
        return
    concept = load_concept(args.concept)
    samples = select_samples(
        concept,
        prompts=args.prompts,
        seeds=range(args.seed, args.seed + args.seeds),
        skip=args.skip,
        lists=args.lists.split(",") if args.lists else (),
    )
    judge, extractor, model = concept_judge(concept), MiniClip(), load("mini")
    config = GenerationConfig(precision=preferred_precision(), num_inference_steps=args.steps)
    base = generate_and_judge(model, samples, config, judge)
    training = {"updates": args.updates, "warmup": 0} if args.updates else {}
    for row in args.rows.split(","):
        out: dict[str, Any] = {
            "row": row,
            "concept": args.concept,
            "precision": config.precision,
            "edits": [],
            "seconds": 0.0,
            "bytes": 0,
        }
        with ExitStack() as on:
            _ = model.hash
            forget_peak()
            for part in row.split("+"):
                patch, settings, seconds = make_patch(part, model, concept, training)
                if args.keep:
                    patch.save(
                        args.keep / f"{row.replace(':', '-')}-{len(out['edits'])}.safetensors"
                    )
                on.enter_context(patch.apply(model))
                out["edits"].append(
                    {"method": part, "settings": settings, "metadata": patch.metadata.to_json()}
                )
                out["seconds"] = (
                    None
                    if None in (seconds, out["seconds"])
                    else round(out["seconds"] + seconds, 1)
                )
                out["bytes"] += size_of(patch)
            out["edit_peak_mib"] = (
                peak_mib()
            )  # model and edits, without what drawing and judging take
            edited = generate_and_judge(model, samples, config, judge)
        out["lists"] = measure(extractor, samples, base, edited, concept)
        with args.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(out) + "\n")
        print(markdown([out]).splitlines()[-1], flush=True)


def markdown(found: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table: percentages, 95 % intervals in brackets."""

    def rate(r: dict[str, Any] | None) -> str:
        return (
            f"{100 * r['value']:.1f} ({100 * r['low']:.1f}–{100 * r['high']:.1f})"
            if r
            else "none to remove"
        )

    names = list(found[0]["lists"])
    heads = ["edit", "s", "MB"]
    for name in names:
        entry, short = found[0]["lists"][name], name.partition(":")[2]
        heads.append(
            f"{short}: removed"
            if "removal" in entry
            else f"{short}: {'drawn' if entry['base']['shown'] else 'right object'}"
        )
        heads += [f"{short}: right object"] if "removal" in entry else []
    heads += [
        "CLIP, last list",
        "KID to base × 1000",
        "coherence kept, least",
        "changed by",
        "mosaicked, most",
        "peak MiB while editing",
    ]
    out = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in found:
        cells = [
            row["row"],
            "not told" if row["seconds"] is None else f"{row['seconds']:.1f}",
            f"{row['bytes'] / 1e6:.1f}",
        ]
        for name in names:
            entry = row["lists"][name]
            if "removal" in entry:
                cells += [
                    rate(entry["removal"]),
                    f"{100 * entry['edited']['subject']['value']:.0f}",
                ]
            else:
                key = "shown" if entry["base"]["shown"] else "subject"
                cells.append(
                    f"{100 * entry['base'][key]['value']:.0f} → "
                    f"{100 * entry['edited'][key]['value']:.0f}"
                )
        calm = [row["lists"][name] for name in names if "removal" not in row["lists"][name]] or [
            row["lists"][n] for n in names
        ]
        last, kept = (
            calm[-1],
            [e["coherence"]["value"] for e in row["lists"].values() if e["coherence"]],
        )
        cells += [f"{last['clip_base']['value']:.1f} → {last['clip_edited']['value']:.1f}"]
        cells += [
            f"{1000 * last['kid']['value']:.2f}" if "kid" in last else "too few",
            f"{100 * min(kept):.0f}" if kept else "",
        ]
        cells += [_peak(row)]
        cells[-1:-1] = [
            f"{100 * calm[-1]['change']['value']:.1f}",
            f"{100 * max(e['edited']['mosaicked']['value'] for e in calm):.0f}",
        ]
        out.append("| " + " | ".join(cells) + " |")
    return "\n".join(out)


def compared(found: list[dict[str, Any]]) -> list[str]:
    """Return the exact McNemar test of each pair of rows on the same images."""

    def seen(row: dict[str, Any]) -> list[bool | None]:
        return [hit for e in row["lists"].values() for hit in e.get("seen", [])]

    out = []
    for i, one in enumerate(found):
        for other in found[i + 1 :]:
            a, b = seen(one), seen(other)
            if a and len(a) == len(b):
                m = mcnemar(a, b)
                names = f"{one['row']} alone {m.only_a}, with {other['row']} alone {m.only_b}"
                out.append(f"- concept seen with {names}, of {m.n}: exact p = {m.p:.2g}")
    return out


def _peak(row: dict[str, Any]) -> str:
    """Return an edit's peak.

    Rows of an older script have only the process's so far, which is a bound from above.
    """
    if row.get("edit_peak_mib") is not None:
        return str(row["edit_peak_mib"])
    return f"at most {row['peak_mib']}" if "peak_mib" in row else "not known"


def plot(found: list[dict[str, Any]], out: Path) -> None:
    """Draw what is left on innocent prompts against the change of benign images, to a file."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4.5))
    for row in found:
        gone = [
            e["removal"]
            for e in row["lists"].values()
            if e.get("removal") and e["role"] == "innocent"
        ]
        calm = [e for e in row["lists"].values() if e["role"] == "benign"]
        if gone and calm:
            x, y = 100 * calm[-1]["change"]["value"], 100 * (1 - gone[0]["value"])
            spread = [[y - 100 * (1 - gone[0]["high"])], [100 * (1 - gone[0]["low"]) - y]]
            axes.errorbar([x], [y], yerr=spread, marker="o", capsize=3, label=row["row"])
    axes.set(
        xlabel="benign pictures changed by, % (less is better)",
        ylabel="left on innocent prompts, %, with 95 % interval",
        xlim=(0, None),
    )
    axes.legend(frameon=False, loc="upper right")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, bbox_inches="tight", dpi=110)


if __name__ == "__main__":
    main()
