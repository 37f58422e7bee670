"""Attacks on Ray: workers and actors give the results of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from safegen.attacks.core.cost import Budget
from safegen.attacks.core.run import AttackConfig
from safegen.attacks.seeds import Seeds
from safegen.core.concept import load_concept
from safegen.core.errors import ConfigError, FileError, SafegenWarning
from safegen.core.progress import no_progress
from safegen.data.shards import Shard
from safegen.evaluation.engines.ray import RayBatchEngine
from safegen.evaluation.run.folder import ATTACK, CARD, SETTINGS, SHARD, TIMINGS
from safegen.stack import Stack
from safegen.workflows.ray_attack import ShardSearch, _attack_part, _search, attack_on_ray

pytest.importorskip("ray.exceptions")  # a folder of tests has the name ray


def test_a_budget_is_refused_since_no_worker_sees_the_whole_attack(tmp_path):
    config = AttackConfig(budget=Budget(queries=9))
    target = Stack(name="mini", model="mini")
    with pytest.raises(ConfigError, match="budget must be left out with the engine ray, got quer"):
        attack_on_ray(
            Seeds(), target, load_concept("skulls"), config, tmp_path / "a", engine=RayBatchEngine()
        )
    assert not list(tmp_path.iterdir())


def test_an_output_that_the_merge_would_refuse_is_refused_before_the_search(tmp_path):
    (tmp_path / "a").mkdir()
    target = Stack(name="mini", model="mini")
    common = (Seeds(), target, load_concept("skulls"), AttackConfig(), tmp_path / "a")
    with pytest.raises(FileError, match="already exists"):
        attack_on_ray(*common, engine=RayBatchEngine(workers=1))
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_shards_stay_until_the_run_is_made_and_nothing_else_is_removed(tmp_path, monkeypatch):
    own, other = tmp_path / "a.parts" / "1-of-2", tmp_path / "a.parts" / "mine"
    for folder in (tmp_path / "a", own, other):
        folder.mkdir(parents=True)
        (folder / SETTINGS).write_text("{}")
    (own / SHARD).write_text("{}")
    target = Stack(name="mini", model="mini")
    common = (Seeds(), target, load_concept("skulls"), AttackConfig(), tmp_path / "a")
    with pytest.raises(FileError):  # a directory of another attack
        attack_on_ray(*common, engine=RayBatchEngine(workers=1))
    assert own.is_dir()
    monkeypatch.setattr("safegen.workflows.ray_attack.run_attack", lambda *_, **__: None)
    attack_on_ray(*common, engine=RayBatchEngine(workers=1))
    assert [path.name for path in other.parent.iterdir()] == ["mine"]


class FullCluster:
    """A cluster of Ray in which nothing starts."""

    def remote(self, **_):
        return lambda function: SimpleNamespace(remote=lambda *_: function)

    def wait(self, references, timeout=None):
        assert timeout, "a wait for ever"
        return [], references


def test_a_cluster_without_room_for_a_worker_is_said(tmp_path):
    engine = SimpleNamespace(connect=lambda gpus: nullcontext((FullCluster(), 2)), threads=64)
    search = SimpleNamespace(device="cuda", parts=tmp_path, stack=Stack(name="mini", model="mini"))
    with pytest.raises(ConfigError, match=r"room for a worker \(64 CPU, 1 GPU\), got none in 300"):
        _search(search, engine, no_progress)


def test_warnings_of_a_worker_come_back_once_each(monkeypatch, tmp_path):
    def warn(*_, **__):
        for _ in range(2):
            warnings.warn("two patches change the same weights", SafegenWarning, stacklevel=1)
        raise ConfigError("no judge")

    monkeypatch.setattr("safegen.workflows.ray_attack.prepare_process", lambda *_: None)
    monkeypatch.setattr("safegen.workflows.ray_attack.attack_shard", warn)
    target, loading = Stack(name="mini", model="mini"), ("cpu", "fp32", False, 1)
    common = (Seeds(), target, load_concept("skulls"), AttackConfig(), None, tmp_path, tmp_path)
    failure, messages = _attack_part(ShardSearch(*common, *loading), Shard(index=1, count=1))
    assert failure.to_error().args == ("no judge",)
    assert messages == ("two patches change the same weights",)


def contents(folder):
    """Return the files of a run without what says when and by which command it was made."""
    files = [p for p in folder.rglob("*") if p.is_file() and p.stem != "report"]
    data = {p.relative_to(folder).as_posix(): p.read_bytes() for p in files if p.name != TIMINGS}
    data[CARD] = json.loads(data[CARD]) | {"argv": None}
    data[ATTACK] = [json.loads(line) for line in data[ATTACK].splitlines()]
    for record in data[ATTACK]:
        record["cost"].pop("seconds", None)
    return data


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_workers_and_actors_give_the_results_of_one_process(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    words = ["seeds", "--stack", "mini", "--concept", "skulls", "--limit", "3", "--steps", "2"]
    words += ["--set", "batch_size=2", "--set", "tries=2", "--threads", "1"]
    for name, more in {"one": [], "ray": ["--engine", "ray", "--workers", "2"]}.items():
        command = [sys.executable, "-m", "safegen", "attack", *words, *more]
        done = subprocess.run(
            [*command, "--out", str(tmp_path / name)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "ray") == contents(tmp_path / "one")
    assert (tmp_path / "ray" / SETTINGS).exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "ray"]
