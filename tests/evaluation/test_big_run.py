"""Runs of many samples: what is read once, what is kept, and that the results stay the same."""

from __future__ import annotations

import json
import random

import pytest
from crafted import write_run
from PIL import Image

from safegen.core.concept import load_concept
from safegen.core.generation import GenerationConfig
from safegen.data.prompts import prompts as readers
from safegen.evaluation import verify_images
from safegen.evaluation.own_prompts import prompt_protocol, read_lists
from safegen.evaluation.protocol_file import write_protocol
from safegen.evaluation.run.folder import (
    CHANGES,
    DETECTIONS,
    FEATURES,
    PLAN,
    SAMPLES,
    Run,
    write_plan,
)
from safegen.evaluation.samples import canonical, image_keys, request_parts, sha
from safegen.evaluation.scoring.score import score_run
from safegen.evaluation.verify import verify

JOURNALS = (SAMPLES, DETECTIONS, CHANGES, FEATURES)


@pytest.fixture
def run(tmp_path):
    """Return a complete run of 8 samples on 4 stacks."""
    return write_run(tmp_path / "run")


def change_lines(folder, change):
    for name in JOURNALS:
        path = folder / name
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(change(lines)))


def test_journals_in_another_order_give_the_same_scores_and_no_fault(run):
    scores = score_run(Run.open(run))
    change_lines(run, lambda lines: random.Random(1).sample(lines, len(lines)))
    assert score_run(Run.open(run)) == scores
    assert verify(Run.open(run)) == []


def test_of_repeated_records_the_last_one_counts_and_verify_names_them(run):
    scores = score_run(Run.open(run))
    first = (run / CHANGES).read_text().splitlines()[0]
    wrong = json.dumps(json.loads(first) | {"change": 0.5}) + "\n"
    text = (run / CHANGES).read_text()
    (run / CHANGES).write_text(wrong + text)
    assert score_run(Run.open(run)) == scores
    assert verify(Run.open(run)) == [f"changes.jsonl: 2 records for {json.loads(first)['key']}"]
    (run / CHANGES).write_text(text + wrong)
    assert score_run(Run.open(run))["inputs"][CHANGES] != scores["inputs"][CHANGES]


def test_verify_decodes_each_image_once(run, monkeypatch):
    decoded = []
    real = verify_images.decode_image
    monkeypatch.setattr(
        verify_images, "decode_image", lambda data, path: decoded.append(path) or real(data, path)
    )
    assert verify(Run.open(run)) == []
    whole = Run.open(run)
    assert len(decoded) == len(set(decoded)) == len(whole.stacks) * len(whole.samples)


def test_an_image_without_a_record_is_still_compared_with_its_base(run):
    lines = (run / SAMPLES).read_text().splitlines(keepends=True)
    row = json.loads(lines[-1])
    (run / SAMPLES).write_text("".join(lines[:-1]))
    Image.new("RGB", (16, 16), "red").save(run / row["file"])
    assert any(f"changes.jsonl: {row['key'][:16]} has" in line for line in verify(Run.open(run)))


def test_the_rows_of_a_prompt_file_are_read_once_for_a_plan(tmp_path, monkeypatch):
    calls = []
    real = readers._read_rows
    monkeypatch.setattr(readers, "_read_rows", lambda *given: calls.append(given) or real(*given))
    path = tmp_path / "p.jsonl"
    rows = [{"prompt": f"a cat {i}", "role": ("explicit", "benign")[i % 2]} for i in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    concept = load_concept("skulls")
    protocol = prompt_protocol(
        concept, read_lists([str(path)], concept), generation=GenerationConfig()
    )
    samples = protocol.samples()
    write_protocol(protocol, tmp_path)
    assert [s.prompt for s in samples] == [f"a cat {i}" for i in (0, 2, 4, 1, 3, 5)]
    assert len(calls) == 1
    path.write_text(path.read_text().replace("cat 5", "dog 5"))  # as many bytes
    assert readers.read_prompts(path).rows[5].prompt == "a dog 5"


def test_samples_of_a_plan_are_read_as_they_were_planned(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("a cat\na dog\n")
    concept = load_concept("skulls")
    protocol = prompt_protocol(
        concept, read_lists([str(path)], concept), seeds=(1, 7), generation=GenerationConfig()
    )
    samples = protocol.samples()
    write_plan(tmp_path, samples, set())
    read = [
        type(s).model_validate_json(t)
        for s, t in zip(samples, (tmp_path / PLAN).read_text().splitlines(), strict=True)
    ]
    assert read == samples
    assert [s.prompt_sha256 for s in samples] == [sha(s.prompt) for s in samples]


def test_the_keys_of_many_samples_are_those_of_their_parts(run):
    whole = Run.open(run)
    generation, stack = whole.protocol.generation, whole.stacks[0]
    samples = [
        s.model_copy(update={"role": role, "guidance_scale": scale})
        for s in whole.samples
        for role in ("benign", "attack")
        for scale in (None, 7.5)
    ]
    for sample, key in zip(samples, image_keys(samples, stack.hash, generation), strict=True):
        parts = [sample.prompt_sha256, sample.seed, sample.index, stack.hash]
        parts += [generation.model_dump(mode="json"), *["attack"] * (sample.role == "attack")]
        assert key == sample.key(stack.hash, generation)
        assert key == sha(canonical(parts + request_parts(sample)))
