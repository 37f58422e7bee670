"""Runs that are written without a model: small, complete, with every kind of file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from safegen.core.generation import GenerationConfig, Start
from safegen.core.png import encode_image
from safegen.core.registry import ATTACKS, resolve
from safegen.data.prompts.prompt import seed_for
from safegen.evaluation.protocol import CONCEPT_METRICS, Protocol
from safegen.evaluation.run import folder as names
from safegen.evaluation.run.attack_records import AttackRecord, Cost
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
from safegen.evaluation.scoring.score import score_run
from safegen.judges.base import Detection, Detections
from safegen.metrics.image import pixel_mae
from safegen.models.checkpoint.metadata import PatchMetadata
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


def make_protocol(prompts: int = 2) -> Protocol:
    lists = [
        {
            "role": role,
            "name": name,
            "source": name,
            "prompts": prompts,
            "sha256": hash_prompts(read_prompt_list(name, prompts=prompts).rows),
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


def write_run(folder: Path, prompts: int = 2) -> Path:
    """Write a small complete run with every kind of file, and return its folder."""
    folder.mkdir(parents=True)
    protocol = make_protocol(prompts)
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
    _write_images(folder, Run.open(folder), lambda stack, i: stack == "mini" or i % 3 == 0)
    run = Run.open(folder)
    write_json(folder / names.SCORES, json.loads(json.dumps(score_run(run))))
    return folder


def _write_images(folder: Path, run: Run, hits: Callable[[str, int], bool | None]) -> None:
    """Write the images of a run, and every journal that follows from them.

    `hits` tells for a stack and a position whether the judge detects the concept; None: unjudged.
    """
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
            trace = {"guards": TRACE} if stack.guards else {}
            metadata = {"key": key, "stack": stack.hash} | trace
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
            hit = hits(stack.name, i)
            why = "it failed" if hit is None else None
            detections = Detections((skull,) if hit else (), sample.subject, unjudged=why)
            journals[names.DETECTIONS].append(
                DetectionsRecord(**common, judge=JUDGE, detections=detections)
            )
            features = encode_features(rng.normal(size=3))
            journals[names.FEATURES].append(
                FeatureRecord(**common, extractor="mini-clip:0", features=features, clip_score=20.5)
            )
            if stack.kind != "base":
                change = pixel_mae(images[stack.baseline, i], image)
                ids = {"lpips": 0.25, "lpips_id": "alex"} if run.protocol.lpips else {}
                journals[names.CHANGES].append(
                    ChangeRecord(**common, baseline=stack.baseline, change=change, **ids)
                )
        journals[names.TIMINGS].append(
            TimingRecord(stage="generate", stack=stack.name, batch=0, images=8, seconds=2.0, size=2)
        )
    for name, records in journals.items():
        (folder / name).write_text(to_lines(records))


def write_transfer_run(
    folder: Path, sources: Sequence[Path], hits: Sequence[Sequence[bool | None]]
) -> Path:
    """Write a complete evaluation of the prompts that attacks found, on `mini` and `other`.

    Args:
        folder: new folder.
        sources: runs of attacks on the same prompts.
        hits: whether the concept is detected on `other`, by source and prompt.
    """
    folder.mkdir(parents=True)
    protocol = Run.open(sources[0]).protocol
    lists = [
        Run.open(source)
        .protocol.lists[-1]
        .model_copy(update={"source": str(source / names.PROMPTS)})
        for source in sources
    ]
    protocol = protocol.model_copy(update={"lists": tuple(lists)})
    common = {"baseline": "mini", "model": "mini", "weights": hex_of("w"), "base": hex_of("base")}
    stacks = [
        StackEntry(name=name, kind=kind, hash=hex_of(f"stack {name}"), **common)
        for name, kind in (("mini", "base"), ("other", "given"))
    ]
    samples = protocol.samples()
    card = RunCard(
        id=protocol.id,
        protocol=public_protocol(protocol),
        samples={p.name: sum(s.list_name == p.name for s in samples) for p in protocol.lists},
        stacks=tuple(stacks),
        versions={"safegen": "0", "torch": "0"},
        device="cpu, fp32",
        platform={"system": "Linux", "machine": "x86_64", "python": "3.11"},
    )
    write_plan(folder, samples, {p.name for p in protocol.lists if p.unsafe})
    write_json(folder / names.CARD, card.model_dump(mode="json"))
    flat = [hit for row in hits for hit in row]
    _write_images(folder, Run.open(folder), lambda stack, i: stack == "mini" or flat[i])
    write_json(folder / names.SCORES, json.loads(json.dumps(score_run(Run.open(folder)))))
    return folder


def write_attack_run(
    folder: Path,
    *,
    name: str = "ring_a_bell",
    stack: str = "mini",
    prompts: int = 4,
    hits: Sequence[bool | None] = (True, True, False, False),
    list_name: str = "mini:benign",
    steps: int = 2,
    done: int | None = None,
    repeat: int = 1,
    unsafe: bool = False,
    marker: str = "found",
    settings: dict[str, Any] | None = None,
    variants: Sequence[str] = ("",),
    controls: Sequence[str] = (),
) -> Path:
    """Write a complete run of an attack without a model, and return its folder.

    Args:
        folder: new folder.
        name: name of the attack.
        stack: name of the attacked stack; `mini` is the base itself.
        prompts: number of attacked prompts.
        hits: whether the concept is detected after each attack.
        list_name: bundled list that is attacked.
        steps: denoising steps, so that runs can differ.
        done: number of attacks that the budget allowed; all if None.
        repeat: attacks on each prompt.
        unsafe: whether the lists are marked unsafe.
        marker: text in every found prompt.
        settings: further settings of the attack.
        variants: forms of the attack.
        controls: forms that have nothing of the concept.
    """
    folder.mkdir(parents=True)
    kind = resolve(ATTACKS, name, "attack")
    rows = read_prompt_list(list_name, prompts=prompts, protocol_seed=0).rows
    attacked = {
        "role": "benign",
        "name": list_name,
        "source": list_name,
        "prompts": prompts,
        "sha256": hash_prompts(rows),
        "unsafe": unsafe,
    }
    protocol = Protocol.model_validate(
        {
            "name": "skulls",
            "concept": "skulls",
            "lists": [attacked],
            "seeds": "rows",
            "generation": GenerationConfig(num_inference_steps=steps, batch_size=2),
            "judge": {"name": "mini", "labels": ["skulls"]},
            "metrics": (*CONCEPT_METRICS, "asr"),
        }
    )
    ids = [(f"{s.id}#{k}" if k else s.id, s) for k in range(repeat) for s in protocol.samples()]
    records = _attack(folder, ids[:done], hits, marker)
    forms = (*variants, *controls)
    table = {
        form: [
            record.model_copy(update={"variant": form, "prompt": f"{record.prompt} {form}".strip()})
            for record in records
        ]
        for form in forms
    }
    rows_of = [table[form][i] for i in range(len(records)) for form in forms]
    (folder / names.ATTACK).write_text(to_lines(rows_of))
    found = []
    for file, part, role in (
        (names.PROMPTS, variants, "attack"),
        (names.CONTROLS, controls, "benign"),
    ):
        lines = [
            {
                "id": f"{k * len(ids) + number:05d}",
                "prompt": record.prompt,
                "seed": record.seed,
                "subject": sample.subject,
                "attack": name,
                "attacked_prompt": sample.prompt,
            }
            | ({"variant": form} if form else {})
            | ({} if record.start is None else {"start": record.start.model_dump(mode="json")})
            for k, form in enumerate(part)
            for number, (record, (_, sample)) in enumerate(zip(table[form], ids, strict=False))
        ]
        source = str(folder / file)
        if lines:
            Path(source).write_text("".join(json.dumps(line) + "\n" for line in lines))
        for form in part:
            select = {"variant": form} if form else {}
            rows = read_prompt_list(source, select=select, protocol_seed=0, unsafe=unsafe).rows
            found.append(
                {
                    "role": role,
                    "name": f"{name} {form}".strip(),
                    "source": source,
                    "select": select,
                    "prompts": len(rows),
                    "sha256": hash_prompts(rows),
                    "unsafe": unsafe,
                }
            )
    entry = hex_of(f"stack {stack}")
    write_json(
        folder / names.SETTINGS,
        {
            "workflow": "attack",
            "attack": {"name": name, "seed": 0, "words": f"{marker} words"} | (settings or {}),
            "access": kind.access,
            "tier": kind.tier,
            "config": {"repeat": repeat, "budget": {"queries": 9, "minutes": None}},
            "stack": entry,
            "protocol": json.loads(json.dumps(protocol.decides())),
        },
    )
    lists = [protocol.lists[0].model_dump(), *found]
    protocol = Protocol.model_validate(protocol.model_dump() | {"lists": lists})
    common = {"baseline": "mini", "model": "mini", "weights": hex_of("w"), "base": hex_of("base")}
    stacks = [StackEntry(name="mini", kind="base", hash=hex_of("stack mini"), **common)]
    if stack != "mini":
        stacks.append(StackEntry(name=stack, kind="given", hash=entry, **common))
    samples = protocol.samples()
    card = RunCard(
        id=protocol.id,
        protocol=public_protocol(protocol),
        samples={p.name: sum(s.list_name == p.name for s in samples) for p in protocol.lists},
        stacks=tuple(stacks),
        versions={"safegen": "0", "torch": "0"},
        device="cpu, fp32",
        platform={"system": "Linux", "machine": "x86_64", "python": "3.11"},
        argv=("safegen", "attack", name, "--set", f"words={marker} words"),
    )
    write_plan(folder, samples, {p.name for p in protocol.lists if p.unsafe})
    write_json(folder / names.CARD, card.model_dump(mode="json"))

    def hit(_: str, i: int) -> bool | None:
        return False if i < prompts else hits[(i - prompts) % len(hits)]

    _write_images(folder, Run.open(folder), hit)
    write_json(folder / names.SCORES, json.loads(json.dumps(score_run(Run.open(folder)))))
    return folder


MARK = (255, 0, 254)
"""Color of the picture that an attack starts from."""


def _attack(
    folder: Path, ids: Sequence[tuple[str, Any]], hits: Sequence[bool | None], marker: str
) -> list[AttackRecord]:
    """Return the records of an attack; the first starts from a picture with a mask."""
    pictures = folder / names.ATTACK_FILES
    pictures.mkdir()
    Image.new("RGB", (16, 16), MARK).save(pictures / "a.png")
    Image.new("RGB", (16, 16), MARK).save(pictures / "a-mask.png")
    parts = {part: f"{names.ATTACK_FILES}/{name}.png" for part, name in STARTS.items()}
    start = Start.of(folder, strength=0.5, **parts)
    return [
        AttackRecord(
            id=id_,
            prompt=f"{marker} text {number}",
            seed=seed_for(id_, 1),
            start=None if number else start,
            success=bool(hits[number % len(hits)]),
            loss=1.0 / (number + 1),
            history=tuple(2.0 / (k + 1) for k in range(number + 1)),
            tokens=(1, 2),
            stable=number % 2 == 0,
            stopped="" if number % 3 else "queries",
            cost=Cost(denoiser=10, text_encoder=4, queries=2, seconds=0.5),
        )
        for number, (id_, _) in enumerate(ids)
    ]


STARTS = {"image": "a", "mask": "a-mask"}
