"""Shards of an attack: merged, they have the records of one process; limits of the whole refuse."""

from __future__ import annotations

import json
import shutil

import pytest

from safegen.attacks.core.base import AttackRecord
from safegen.attacks.core.cost import Budget
from safegen.attacks.core.run import AttackConfig, attack_samples, run_attack
from safegen.attacks.core.shards import attack_shard, merge_attacks
from safegen.attacks.img2img import Img2Img
from safegen.attacks.relearn import Relearn
from safegen.attacks.ring_a_bell import RingABell
from safegen.attacks.seeds import Seeds
from safegen.core.concept import load_concept
from safegen.core.errors import ConfigError, FileError
from safegen.core.generation import GenerationConfig
from safegen.data.shards import Shard
from safegen.evaluation.run.folder import ATTACK, ATTACK_FILES, SCORES, SETTINGS, SHARD
from safegen.evaluation.run.journal import Journal, read_journal
from safegen.stack import Stack

SKULLS = load_concept("skulls")
CONFIG = AttackConfig(limit=3, generation=GenerationConfig(num_inference_steps=2))
ATTACKED = Img2Img(**{**Img2Img.TINY, "batch_size": 1})
STACK = Stack(name="mini", model="mini")


@pytest.fixture(scope="module")
def parts(loader, tmp_path_factory):
    """Return the folders of an attack in two shards, to be read only."""
    folder = tmp_path_factory.mktemp("shards")
    for i in (1, 2):
        shard = Shard(index=i, count=2)
        attack_shard(ATTACKED, STACK, SKULLS, CONFIG, folder / f"{i}", shard, loader=loader)
    return [folder / "1", folder / "2"]


def results(folder):
    """Return the records of an attack without the seconds."""
    records = read_journal(folder / ATTACK, AttackRecord)[0]
    new = [r.cost.model_copy(update={"seconds": 0.0}) for r in records]
    return [r.model_copy(update={"cost": c}) for r, c in zip(records, new, strict=True)]


def test_merged_shards_have_the_records_and_the_files_of_one_process(parts, loader, tmp_path):
    whole, merged = tmp_path / "whole", tmp_path / "run"
    attack_shard(ATTACKED, STACK, SKULLS, CONFIG, whole, Shard(index=1, count=1), loader=loader)
    assert merge_attacks([parts[1], parts[0], parts[1]], merged) == 3
    assert results(merged) == results(whole)
    files = {path.name: path.read_bytes() for path in (whole / ATTACK_FILES).iterdir()}
    assert {path.name: path.read_bytes() for path in (merged / ATTACK_FILES).iterdir()} == files
    assert files


def test_a_merge_into_an_attack_that_is_not_finished_is_refused(parts, tmp_path):
    out = tmp_path / "run"
    merge_attacks(parts, out)
    assert merge_attacks(parts, out) == 3  # again
    lines = (out / ATTACK).read_bytes().splitlines(keepends=True)
    (out / ATTACK).write_bytes(b"".join(lines[:-2]))
    with pytest.raises(FileError, match=r"got an attack that lacks 2 records\. Resume it"):
        merge_attacks(parts, out)


@pytest.mark.slow
def test_merged_shards_of_an_attack_go_on_as_one_process_does(parts, loader, tmp_path):
    whole, merged = tmp_path / "one" / "run", tmp_path / "merged" / "run"
    run_attack(ATTACKED, STACK, SKULLS, CONFIG, whole, loader=loader)
    assert merge_attacks([parts[1], parts[0], parts[1]], merged) == 3
    assert results(merged) == results(whole)
    forms = len(ATTACKED.variants) + len(ATTACKED.controls)
    assert [len(results(part)) for part in parts] == [2 * forms, forms]
    run_attack(ATTACKED, STACK, SKULLS, CONFIG, merged, loader=loader)
    for path in whole.rglob("*"):
        if path.is_file() and path.name not in (ATTACK, "timings.jsonl") and path.stem != "report":
            assert (merged / path.relative_to(whole)).read_bytes() == path.read_bytes(), path
    assert (merged / SCORES).exists()
    assert merge_attacks(parts, merged) == 3  # again: nothing is left to do


@pytest.mark.slow
def test_shards_have_the_costs_of_one_process_that_builds_the_attacker_once(
    loader, benign_samples, tmp_path
):
    attack = RingABell(**{**RingABell.TINY, "batch_size": 1})
    found = {}
    for shard in (None, *(Shard(index=i, count=2) for i in (1, 2))):
        folder = tmp_path / str(shard).replace("/", "-")
        folder.mkdir()
        with Journal(folder / ATTACK, AttackRecord) as journal:
            common = (attack, STACK, SKULLS, CONFIG, benign_samples, journal, folder)
            attack_samples(*common, loader=loader, shard=shard)
        found[shard] = {record.id: record for record in results(folder)}
    whole, *parts = found.values()
    assert parts[0] | parts[1] == whole
    costs = [whole[sample.id].cost.text_encoder for sample in benign_samples]
    assert costs[0] > costs[1] == costs[2]


def test_shards_of_an_attack_that_are_missing_unfinished_or_of_another_are_refused(parts, tmp_path):
    with pytest.raises(FileError, match=r"but not: 1/2 \(not given\)"):
        merge_attacks(parts[1:], tmp_path / "run")
    part = shutil.copytree(parts[1], tmp_path / "part")
    *lines, last = (part / ATTACK).read_bytes().splitlines(keepends=True)
    (part / ATTACK).write_bytes(b"".join(lines))
    with pytest.raises(FileError, match=r"2/2 \(part lacks 1 records in attack\.jsonl\)"):
        merge_attacks([parts[0], part], tmp_path / "run")
    (part / ATTACK).write_bytes(b"".join(lines) + last.replace(b'"seed":', b'"seed":1'))
    with pytest.raises(FileError, match="parts must agree, got two records"):
        merge_attacks([*parts, part], tmp_path / "run")
    settings = json.loads((part / SETTINGS).read_text())
    (part / SETTINGS).write_text(json.dumps(settings | {"device": "cuda"}))
    with pytest.raises(ConfigError, match=r"must be of one attack, got .* differ in device"):
        merge_attacks([parts[0], part], tmp_path / "run")
    with pytest.raises(FileError, match="must be a shard of an attack"):
        merge_attacks([tmp_path], tmp_path / "run")
    card = json.loads((part / SHARD).read_text()) | {"shard": "1/10", "total": 30}
    (part / SHARD).write_text(json.dumps(card))
    with pytest.raises(FileError, match=r"9/10 \(not given\) and 1 more\. Finish each"):
        merge_attacks([part], tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("attack", "config", "message"),
    [
        (Seeds(), {"budget": Budget(nfe=9, minutes=1)}, "budget must be left out of a shard, got"),
        (Relearn(), {}, "attacks in shards must find prompts, got 'relearn'"),
    ],
)
def test_what_no_shard_can_see_is_refused(attack, config, message, tmp_path):
    config, shard = CONFIG.model_copy(update=config), Shard(index=1, count=2)
    with pytest.raises(ConfigError, match=message):
        attack_shard(attack, STACK, SKULLS, config, tmp_path / "run", shard)


def test_a_shard_of_an_attack_resumes_as_that_shard_alone(parts, loader):
    before = {path: path.read_bytes() for path in parts[0].rglob("*") if path.is_file()}
    common = (ATTACKED, STACK, SKULLS, CONFIG, parts[0])
    attack_shard(*common, Shard(index=1, count=2), loader=loader)
    with pytest.raises(FileError, match=r"made with other settings .*: shard: "):
        attack_shard(*common, Shard(index=2, count=2), loader=loader)
    with pytest.raises(FileError, match=r"made with other settings .*: shard: "):
        run_attack(*common, loader=loader)
    assert {path: path.read_bytes() for path in parts[0].rglob("*") if path.is_file()} == before
