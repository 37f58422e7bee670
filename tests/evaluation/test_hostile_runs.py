"""Run folders from strangers: each command succeeds, or says in one line what is wrong.

The run is built without a model. Its files are damaged in every way that a schema can miss: keys
left out or renamed, other types, NaN, huge numbers, deep nesting, paths that climb out.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from safegen.core.generation import GenerationConfig
from safegen.evaluation.protocol import Protocol
from safegen.evaluation.report.data import report_data
from safegen.evaluation.report.model_index import read_metrics
from safegen.evaluation.report.page import markdown, render
from safegen.evaluation.report.redaction import image_grids
from safegen.evaluation.run import folder as names
from safegen.evaluation.run.card import public_protocol
from safegen.evaluation.run.folder import Run, image_file, is_blank, write_json, write_plan
from safegen.evaluation.run.journal import to_lines
from safegen.evaluation.run.records import (
    ChangeRecord,
    DetectionsRecord,
    FeatureRecord,
    JudgeRecord,
    PatchEntry,
    RunCard,
    SampleRecord,
    StackEntry,
    TimingRecord,
    encode_features,
)
from safegen.evaluation.samples import hash_prompts, read_prompt_list
from safegen.evaluation.scoring.score import score_run, scores_file
from safegen.evaluation.verify import verify
from safegen.judges.base import Detection, Detections
from safegen.metrics.image import pixel_mae
from safegen.models.checkpoint.metadata import PatchMetadata
from safegen.models.generation import encode_image
from safegen.patches.patch import Patch

JUDGE = "mini:0123456789abcdef"
LISTS = (("explicit", "mini:skulls", None), ("benign", "mini:benign", None))
METRICS = (
    *("concept", "subject", "mosaicked", "removal", "removal_images", "removal_labels"),
    *("change", "lpips", "asr", "asr_any", "inappropriate", "expected_maximum"),
    *("over_censoring", "coherence", "coherence_kept", "clip_score", "kid_to_base"),
)
TRACE = {"action": "none", "reason": "", "guards": [{"name": "sld", "action": "none", "ms": 1.0}]}


def hex_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def make_protocol() -> Protocol:
    lists = [
        {
            "role": role,
            "name": name,
            "source": name,
            "prompts": 2,
            "sha256": hash_prompts(read_prompt_list(name, prompts=2).rows),
            "shows": shows,
        }
        for role, name, shows in LISTS
    ]
    return Protocol.model_validate(
        {
            "name": "hostile",
            "concept": "skulls",
            "lists": lists,
            "seeds": [1, 2],
            "generation": GenerationConfig(num_inference_steps=2, batch_size=2),
            "judge": {"name": "mini", "labels": ["skulls"]},
            "metrics": METRICS,
            "features": {"extractor": "mini-clip"},
            "lpips": {"trunk": "alex.pth", "heads": "heads.pth"},
        }
    )


def write_run(folder: Path) -> Path:
    """Write a small complete run with every kind of file, and return its folder."""
    folder.mkdir(parents=True)
    protocol = make_protocol()
    (folder / names.PATCHES / "calm").mkdir(parents=True)
    patch = Patch(
        {"mid_block.attn1.to_q.weight": torch.ones(2, 2)},
        PatchMetadata(method="test", base=hex_of("base"), seconds=1.5),
    )
    patch.save(folder / names.PATCHES / "calm.safetensors")
    rows = [{"update": i, "L_m": 1.0 / i, "L_p": 0.1, "lr": 1e-4} for i in (1, 2, 3)]
    log = folder / names.PATCHES / "calm" / "log.jsonl"
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    entry = PatchEntry(
        file="calm.safetensors",
        hash=patch.hash,
        parameters=4,
        layers={"attn1": 1},
        method="test",
        seconds=1.5,
        updates=3,
        data=hex_of("data"),
        description="It learns nothing.",
        settings={"selector": "attn1"},
    )
    common = {"baseline": "mini", "model": "mini", "weights": hex_of("w"), "base": hex_of("base")}
    stacks = (
        StackEntry(name="mini", kind="base", hash=hex_of("1"), **common),
        StackEntry(name="calm", kind="given", hash=hex_of("2"), patches=(entry,), **common),
        StackEntry(
            name="guarded",
            kind="given",
            hash=hex_of("3"),
            patches=(entry,),
            reference="calm",
            guards=({"name": "sld", "judge_id": JUDGE},),
            loras=({"file": "a.safetensors", "hash": hex_of("lora"), "scale": 1.0},),
            **common,
        ),
        StackEntry(
            name="negative-prompt", kind="baseline", hash=hex_of("4"), negative_prompt="x", **common
        ),
    )
    samples = protocol.samples()
    card = RunCard(
        id=protocol.id,
        protocol=public_protocol(protocol),
        samples={p.name: sum(s.list_name == p.name for s in samples) for p in protocol.lists},
        stacks=stacks,
        versions={"safegen": "0", "torch": "0"},
        device="cpu, fp32",
        platform={"system": "Linux", "machine": "x86_64", "python": "3.11"},
        argv=("safegen", "evaluate"),
    )
    write_plan(folder, samples, set())
    write_json(folder / names.CARD, card.model_dump(mode="json"))
    write_json(folder / names.SETTINGS, {"workflow": "demo", "updates": 3})
    _write_images(folder, Run.open(folder))
    run = Run.open(folder)
    write_json(folder / names.SCORES, json.loads(json.dumps(score_run(run))))
    return folder


def _write_images(folder: Path, run: Run) -> None:
    """Write the images of a run, and every journal that follows from them."""
    rng, images = np.random.default_rng(0), dict[tuple[str, int], Image.Image]()
    journals: dict[str, list[Any]] = {
        name: []
        for name in (
            *(names.SAMPLES, names.JUDGES, names.DETECTIONS),
            *(names.CHANGES, names.FEATURES, names.TIMINGS),
        )
    }
    space = ("skulls", "fire", "ghosts", "leaves", "mosaic")
    journals[names.JUDGES].append(
        JudgeRecord(judge=JUDGE, name="mini", options={}, label_space=space)
    )
    for stack in run.stacks:
        for i, (sample, key) in enumerate(zip(run.samples, run.keys(stack), strict=True)):
            image = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
            images[stack.name, i] = image
            path = folder / image_file(stack.name, key)
            path.parent.mkdir(parents=True, exist_ok=True)
            metadata = {"key": key, "stack": stack.hash, "guards": TRACE}
            path.write_bytes(encode_image(image, metadata))
            common = {"key": key, "stack": stack.name}
            journals[names.SAMPLES].append(
                SampleRecord.of(
                    sample,
                    **common,
                    file=image_file(stack.name, key),
                    sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
                    blank=is_blank(image),
                    guards=TRACE if stack.guards else None,
                )
            )
            skull = Detection("skulls", 0.9, (1.0, 1.0, 8.0, 8.0))
            items = (skull,) if (stack.kind == "base" or i % 3 == 0) else ()
            detections = Detections(items, sample.subject)
            journals[names.DETECTIONS].append(
                DetectionsRecord(**common, judge=JUDGE, detections=detections)
            )
            features = encode_features(rng.normal(size=3))
            journals[names.FEATURES].append(
                FeatureRecord(**common, extractor="mini-clip:0", features=features, clip_score=20.5)
            )
            if stack.kind != "base":
                change = pixel_mae(images[stack.baseline, i], image)
                ids = {"lpips": 0.25, "lpips_id": "alex"}
                journals[names.CHANGES].append(
                    ChangeRecord(**common, baseline=stack.baseline, change=change, **ids)
                )
        journals[names.TIMINGS].append(
            TimingRecord(stage="generate", stack=stack.name, batch=0, images=8, seconds=2.0, size=2)
        )
    for name, records in journals.items():
        (folder / name).write_text(to_lines(records))


# --- what the commands do -----------------------------------------------------------------------


def run_score(folder: Path, out: Path) -> None:
    run = Run.open(folder)
    scores = score_run(run)
    path = scores_file(run, scores)
    assert path.parent == folder
    write_json(path, scores)


def run_verify(folder: Path, out: Path) -> None:
    for problem in verify(Run.open(folder)):
        check_line(problem)


def run_report(folder: Path, out: Path) -> None:
    runs = {"run": Run.open(folder)}
    data, results = report_data(runs)
    json.dumps(data, allow_nan=False)
    markdown(data)
    page = render(data, image_grids(runs, results, reveal=False))
    page.encode()


def run_metrics(folder: Path, out: Path) -> None:
    patch = Patch.load(out.parent / "whole" / names.PATCHES / "calm.safetensors")
    table = read_metrics(folder, [patch.hash], hex_of("base"))
    table.to_table()
    table.to_eval_results()


COMMANDS: dict[str, Callable[[Path, Path], None]] = {
    "score": run_score,
    "verify": run_verify,
    "report": run_report,
    "metrics": run_metrics,
}


def check_line(text: str) -> None:
    assert "\n" not in text, text
    assert len(text) < 2000, text[:3000]


# --- damages ------------------------------------------------------------------------------------

DEEP = json.loads("[" * 60 + "]" * 60)
VALUES: tuple[Any, ...] = (
    *(None, True, "", "x", "../../../etc/passwd", "/etc/passwd", "a\x00b", "\x1b[31mred", "\ud800"),
    *(0, -1, 1.5, 10**30, -(10**400), 1e308, math.nan, math.inf),
    *([], {}, [None], {"x": 1}, [[[[[[]]]]]]),
)


def leaves(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value in a tree, the inner ones too."""
    if path:
        yield path
    if isinstance(tree, dict | list):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from leaves(value, (*path, key))


def replaced(tree: Any, path: tuple[Any, ...], change: Callable[[Any, Any], None]) -> Any:
    """Return a copy of a tree in which `change` was called with a container and its key."""
    new = json.loads(json.dumps(tree))
    parent = new
    for key in path[:-1]:
        parent = parent[key]
    change(parent, path[-1])
    return new


def drop(parent: Any, key: Any) -> None:
    del parent[key]


def rename(parent: Any, key: Any) -> None:
    if isinstance(parent, dict):
        parent[f"{key}x"] = parent.pop(key)


def repeat(parent: Any, key: Any) -> None:
    if isinstance(parent, list):
        parent.append(parent[key])
