"""Run folders from strangers: each command succeeds, or says in one line what is wrong.

The run is built without a model. Its files are damaged in every way that a schema can miss: keys
left out or renamed, other types, NaN, huge numbers, deep nesting, paths that climb out.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from safegen.core.errors import FileError, SafegenError
from safegen.core.generation import GenerationConfig
from safegen.evaluation.protocol import Protocol
from safegen.evaluation.report.data import report_data
from safegen.evaluation.report.model_index import read_metrics
from safegen.evaluation.report.page import markdown
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
    markdown(data).encode()
    image_grids(runs, results, reveal=False)


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


FILES = (
    *(names.CARD, names.PLAN, names.SAMPLES, names.JUDGES, names.DETECTIONS, names.CHANGES),
    *(names.FEATURES, names.TIMINGS, names.SCORES, names.SETTINGS, "patches/calm/log.jsonl"),
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return the folder of a run, to be read only."""
    return write_run(tmp_path_factory.mktemp("hostile") / "whole")


@pytest.fixture
def damaged(whole, tmp_path):
    """Return a copy of the run that a test may damage; the run itself lies beside it."""
    shutil.copytree(whole, tmp_path / "whole")
    return shutil.copytree(whole, tmp_path / "copy")


def check_commands(folder: Path) -> None:
    """Run every command: it succeeds, or raises an error of one line."""
    for command in COMMANDS.values():
        try:
            command(folder, folder.parent / "out")
        except SafegenError as error:
            check_line(str(error))


def test_the_whole_run_has_no_faults(whole):
    assert verify(Run.open(whole)) == []
    check_commands(whole)


@pytest.mark.parametrize("file", FILES)
def test_a_file_that_is_something_else_is_refused_in_one_line(damaged, file):
    path, content = damaged / file, (damaged / file).read_bytes()
    others = [(damaged / name).read_bytes() for name in FILES if name != file]
    for text in (
        *(b"", b"\n", b"[]\n", b"null\n", b"{}\n", bytes(range(256)) + b"\n"),
        *(content[: len(content) // 2], content + b"\0\n", content.replace(b"a", b"\xe9")),
        *(b"[" * 100_000 + b"\n", b'{"a":' * 100_000 + b"\n", b"9" * 6000 + b"\n"),
        *others[:: len(others) // 3],
    ):
        path.write_bytes(text)
        check_commands(damaged)
    path.unlink()
    check_commands(damaged)
    for put in (os.mkfifo, Path.mkdir, lambda p: p.symlink_to(p.name)):
        path.unlink(missing_ok=True)  # `score` writes its file again
        put(path)
        check_commands(damaged)
        path.rmdir() if path.is_dir() else path.unlink()


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_value_of_any_record_may_be_wrong(whole, tmp_path, data):
    """A wrong value is refused in one line, or changes nothing that a command reads."""
    file = data.draw(st.sampled_from(FILES))
    text = (whole / file).read_text()
    rows = [json.loads(line) for line in text.splitlines()] if file.endswith("l") else []
    number = data.draw(st.integers(0, len(rows) - 1)) if rows else 0
    tree = rows[number] if rows else json.loads(text)
    path = data.draw(st.sampled_from(list(leaves(tree))))
    value = data.draw(st.sampled_from(VALUES))
    change = data.draw(
        st.sampled_from([drop, rename, repeat, lambda parent, key: parent.update({key: value})])
        if isinstance(path[-1], str)
        else st.sampled_from([drop, repeat, lambda parent, key: parent.insert(key, value)])
    )
    new = replaced(tree, path, change)
    if rows:
        rows[number] = new
    folder = tmp_path / "copy"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder)
    (folder / file).write_text(
        "".join(json.dumps(row) + "\n" for row in rows) if rows else json.dumps(new)
    )
    if not (tmp_path / "whole").exists():
        (tmp_path / "whole").symlink_to(whole)
    check_commands(folder)


@pytest.mark.parametrize("name", [names.TIMINGS, names.IMAGES, names.CARD, names.SETTINGS])
def test_a_link_that_leads_out_of_the_folder_is_refused_and_not_followed(damaged, tmp_path, name):
    target = tmp_path / "private"
    (damaged / name).rename(target)
    if name == names.TIMINGS:
        target.write_text("one line without an end")
    (damaged / name).symlink_to(target)
    with pytest.raises(FileError, match=r"must lie in the run's folder, got a link") as caught:
        Run.open(damaged)
    check_line(str(caught.value))
    if name == names.TIMINGS:
        assert target.read_text() == "one line without an end"


def card_with(folder: Path, path: tuple[Any, ...], value: Any) -> None:
    card = json.loads((folder / names.CARD).read_text())

    def put(parent: Any, key: Any) -> None:
        parent[key] = value

    (folder / names.CARD).write_text(json.dumps(replaced(card, path, put)))


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("stacks", 1, "name"), "../../calm", r"stacks\.1\.name must match pattern"),
        (("stacks", 1, "baseline"), "other", "the baseline of 'calm' must be a base stack"),
        (("stacks", 2, "reference"), "other", "the reference of 'guarded' must be a stack"),
        (("stacks", 1, "name"), "mini", "stacks must have names that differ"),
        (("stacks", 1, "patches", 0, "file"), "../x.safetensors", "must have no folder in it"),
        (("stacks", 1, "patches", 0, "seconds"), -1, r"seconds must be greater than or equal to 0"),
        (("stacks", 1, "patches", 0, "updates"), "3", r"updates must be a valid integer"),
        (("protocol", "lists", 0, "name"), "a\x1b[31m", "printable characters"),
        (("protocol", "seeds"), [-1], r"seeds"),
    ],
)
def test_a_card_that_breaks_a_rule_names_the_field(damaged, path, value, says):
    card_with(damaged, path, value)
    with pytest.raises(FileError, match=says) as caught:
        Run.open(damaged)
    assert "protocol.json' is damaged: " in str(caught.value)
    check_line(str(caught.value))


def test_a_sample_that_is_planned_twice_is_not_counted_twice(damaged):
    lines = (damaged / names.PLAN).read_text().splitlines(keepends=True)
    (damaged / names.PLAN).write_text("".join([*lines, lines[0]]))
    with pytest.raises(FileError, match=r"must have each image of the protocol's lists once"):
        score_run(Run.open(damaged))


@pytest.mark.parametrize(
    ("value", "says"),
    [(math.nan, "is not JSON"), (1.5, "value must be less than or equal to 1"), ("1", "value")],
)
def test_a_rate_out_of_range_is_not_shown(damaged, value, says):
    scores = json.loads((damaged / names.SCORES).read_text())
    scores["stacks"]["calm"]["lists"]["mini:skulls"]["concept"]["value"] = value
    (damaged / names.SCORES).write_text(json.dumps(scores))
    with pytest.raises(FileError, match=says):
        run_metrics(damaged, damaged.parent / "out")
    assert any(line.startswith("scores.json: ") for line in verify(Run.open(damaged)))
