"""Hashes of everything that a refactoring must not change; deleted when the refactoring is done.

python benchmarks/baseline.py --out baseline.json [--part generate guards edits smoke demo]
python benchmarks/baseline.py --compare before.json after.json
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
PROMPTS = [
    "a castle covered in skulls",
    "a cat at dusk",
    "a castle with its grinning friends",
    "a boat on fire",
    "a tree with ghosts",
    "a robot",
]
SHORT = ["training.updates=3", "training.warmup=1", "training.batch=4"]
EDITS = {
    "safegen": SHORT,
    "safegen-plus": SHORT,
    "esd": SHORT,
    "sdd": SHORT,
    "duo": SHORT,
    "concept_ablation": SHORT,
    "uce": [],
    "rece": [],
}
CLIP = {
    "judge": "clip",
    "labels": ["unsafe"],
    "options": {
        "weights": "mini",
        "unsafe": ["skulls", "a castle covered in skulls"],
        "safe": ["a cat"],
    },
}
GUARDS: dict[str, list[Any]] = {
    "sld-max": ["sld-max"],
    "sld-weak": ["sld-weak"],
    "negative-prompt": ["negative-prompt"],
    "safree": ["safree"],
    "prompt-filter": ["prompt-filter"],
    "judge-filter": ["judge-filter"],
    "dual-latent": ["dual-latent"],
    "safree+negative": ["safree", "negative-prompt"],
    "sld-max+safree": ["sld-max", "safree"],
    "crops": [{"name": "crops", **CLIP, "probes": 2, "steps": 4}],
    "pno": [
        {
            "name": "pno",
            "concept": "skulls",
            "weights": "mini",
            "unsafe": ["skulls"],
            "safe": ["a cat"],
            "restarts": 1,
            "iterations": 2,
            "permutations": 5,
        }
    ],
}


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def command(*words: object) -> str:
    found = subprocess.run(
        [sys.executable, "-m", "safegen", *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
    )
    if found.returncode:
        raise SystemExit(f"{words}: {found.stderr[-2000:]}")
    return found.stdout


def pixels(path: Path) -> str:
    from PIL import Image

    with Image.open(path) as image:
        return sha(image.convert("RGB").tobytes())


def generate(work: Path, name: str, *more: object) -> dict[str, str]:
    words = [w for p in PROMPTS for w in ("--prompt", p)]
    command(
        "generate",
        "mini",
        *words,
        "--seed",
        1,
        "--batch",
        4,
        "--threads",
        1,
        "--out",
        work / name,
        *more,
    )
    return {path.name: pixels(path) for path in sorted((work / name).glob("0*.png"))}


def part_generate(work: Path) -> dict[str, Any]:
    return {"plain": generate(work, "plain")}


def part_guards(work: Path) -> dict[str, Any]:
    out = {}
    for name, guards in GUARDS.items():
        recipe = work / f"{name}.toml"
        rows = [
            json.dumps(guard)
            if isinstance(guard, str)
            else "{" + ", ".join(f"{k} = {toml(v)}" for k, v in guard.items()) + "}"
            for guard in guards
        ]
        words = [w for g in guards if isinstance(g, str) for w in ("--guard", g)]
        if words:
            out[name] = generate(work, name, *words, "--concept", "skulls", "--steps", 8)
        else:
            recipe.write_text(f'model = "mini"\nguards = [{", ".join(rows)}]\n', encoding="utf-8")
            texts = [w for p in PROMPTS for w in ("--prompt", p)]
            command(
                "generate",
                "--stack",
                recipe,
                *texts,
                "--seed",
                1,
                "--batch",
                4,
                "--threads",
                1,
                "--steps",
                8,
                "--out",
                work / name,
            )
            out[name] = {path.name: pixels(path) for path in sorted((work / name).glob("0*.png"))}
    return out


def toml(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k} = {toml(v)}" for k, v in value.items()) + "}"
    return json.dumps(value)


def part_edits(work: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    out = {}
    for name, changes in EDITS.items():
        path = work / f"{name}.safetensors"
        words = [w for c in changes for w in ("--set", c)]
        pictured = (
            ["--triplets", "mini:skulls"] if name in ("safegen", "safegen-plus", "duo") else []
        )
        command(
            "edit",
            "mini",
            "--method",
            name,
            "--concept",
            "skulls",
            *pictured,
            *words,
            "--threads",
            1,
            "--out",
            path,
        )
        tensors = load_file(path)
        digest = hashlib.sha256()
        for key in sorted(tensors):
            digest.update(f"{key} {tuple(tensors[key].shape)} {tensors[key].dtype}\n".encode())
            digest.update(tensors[key].float().contiguous().numpy().tobytes())
        out[name] = digest.hexdigest()
    return out


def part_smoke(work: Path) -> dict[str, Any]:
    patch = work / "uce-smoke.safetensors"
    command(
        "edit", "mini", "--method", "uce", "--concept", "skulls", "--threads", 1, "--out", patch
    )
    command(
        "evaluate",
        "--protocol",
        "mini-smoke",
        "--stack",
        f"edited=mini+{patch}",
        "--threads",
        1,
        "--out",
        work / "smoke",
    )
    run = work / "smoke"
    out: dict[str, Any] = {}
    for line in (run / "samples.jsonl").read_text().splitlines():
        row = json.loads(line)
        file = row.get("file") or f"pictures/{row['stack']}/{row['key']}.png"
        out[f"{row['stack']} {row['id']} {row.get('seed')}"] = (
            pixels(run / file) if (run / file).exists() else "none"
        )
    scores = json.loads(next(run.glob("scores*.json")).read_text())
    return {"pictures": out, "figures": numbers(scores["stacks"])}


def numbers(tree: Any, where: str = "") -> dict[str, Any]:
    if isinstance(tree, dict):
        return {k: v for key in tree for k, v in numbers(tree[key], f"{where}/{key}").items()}
    if isinstance(tree, list):
        return {k: v for i, one in enumerate(tree) for k, v in numbers(one, f"{where}/{i}").items()}
    return {where: tree} if isinstance(tree, (int, float)) and not isinstance(tree, bool) else {}


def part_demo(work: Path) -> dict[str, Any]:
    command("demo", "--fast", "--threads", 1, "--out", work / "demo")
    stacks = json.loads((work / "demo" / "scores.json").read_text())["stacks"]
    rates, figures = ("concept", "subject", "mosaicked", "shown"), {}
    for name, base in stacks["base"]["lists"].items():
        edited = stacks["edited"]["lists"][name]
        row = {
            "prompts": base["prompts"],
            "base": {key: base[key] for key in rates if key in base},
            "edited": {key: edited[key] for key in rates if key in edited},
        }
        compared = ("change", "removal", "removal_images")
        figures[name] = numbers(row | {key: edited[key] for key in compared if key in edited})
    return figures


def compare(before: Path, after: Path) -> None:
    a, b = (numbers_and_texts(json.loads(path.read_text())) for path in (before, after))
    gaps = [
        f"{key}: {a.get(key)} -> {b.get(key)}"
        for key in sorted({*a, *b})
        if a.get(key) != b.get(key)
    ]
    print(f"{len(a)} values before, {len(b)} after, {len(gaps)} differ")
    print("\n".join(gaps[:60]))
    raise SystemExit(bool(gaps))


def numbers_and_texts(tree: Any, where: str = "") -> dict[str, Any]:
    if isinstance(tree, dict):
        return {
            k: v for key in tree for k, v in numbers_and_texts(tree[key], f"{where}/{key}").items()
        }
    return {where: tree}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument(
        "--part", nargs="*", default=["generate", "guards", "edits", "smoke", "demo"]
    )
    parser.add_argument("--compare", nargs=2, type=Path)
    given = parser.parse_args()
    if given.compare:
        compare(*given.compare)
    found = json.loads(given.out.read_text()) if given.out.exists() else {}
    for part in given.part:
        with tempfile.TemporaryDirectory() as work:
            found[part] = globals()[f"part_{part}"](Path(work))
        given.out.write_text(json.dumps(found, indent=1))
        print(part, "done", flush=True)


if __name__ == "__main__":
    main()
