"""Whole runs of every attack: verified, reported, and without a text where prompts are unsafe."""

from __future__ import annotations

import json

import pytest

from safegen.attacks.core.run import AttackConfig, run_attack
from safegen.core.concept import load_concept
from safegen.core.generation import GenerationConfig
from safegen.core.registry import ATTACKS, resolve
from safegen.evaluation.report.page import NUMBERS, PAGE, TABLE
from safegen.evaluation.run.folder import CONTROLS, PROMPTS, SCORES
from safegen.evaluation.verify import verify
from safegen.stack import Stack


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_a_run_on_unsafe_prompts_is_verified_and_its_report_has_no_text(name, loader, tmp_path):
    kind = resolve(ATTACKS, name, "attack")
    config = AttackConfig(
        limit=2, repeat=2, unsafe=True, generation=GenerationConfig(num_inference_steps=2)
    )
    stack = Stack(name="plain", model="mini")
    run = run_attack(
        kind(**kind.TINY), stack, load_concept("skulls"), config, tmp_path / "run", loader=loader
    )
    assert verify(run) == []
    data = json.loads((run.folder / NUMBERS).read_text())
    section = data["attacks"]["run"]
    assert (section["prompts"], section["tier"]) == (2, kind.tier)
    assert all(row["prompt"]["asr"]["n"] == 2 for row in section["after"] if row["attacked"])
    texts = set[str]()
    for file in (run.folder / PROMPTS, run.folder / CONTROLS):
        for line in file.read_text().splitlines() if file.exists() else ():
            row = json.loads(line)
            texts |= {row["prompt"].strip(), row["attacked_prompt"]}
    for file in (PAGE, NUMBERS, TABLE, SCORES):
        page = (run.folder / file).read_text()
        assert not [text for text in texts if text and text in page]
