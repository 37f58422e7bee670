"""Shards of a run: merged, they are the bytes of one process; what is unfinished is refused."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from safegen.core.errors import ConfigError, FileError
from safegen.data.shards import Shard
from safegen.evaluation.run.folder import CARD, SCORES, Run
from safegen.evaluation.scoring.score import score_run
from safegen.evaluation.verify import verify


@pytest.mark.parametrize(("units", "count"), [(0, 3), (2, 3), (3, 1), (10, 3), (12, 4)])
def test_shards_take_each_unit_once_and_differ_by_one_unit_at_most(units, count):
    names = [f"unit {i}" for i in range(units)]
    parts = [Shard(index=i, count=count).select(names) for i in range(1, count + 1)]
    assert sorted(i for part in parts for i in part) == list(range(units))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_the_shard_of_a_unit_follows_from_the_names_alone():
    names = [f"unit {i}" for i in range(9)]
    shard = Shard.parse("2/3")
    assert {names[i] for i in shard.select(names)} == {
        names[::-1][i] for i in shard.select(names[::-1])
    }
    assert shard.select(names) != frozenset(range(1, 9, 3))  # a period of the list does not matter


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "1/0", "a/b", "1/2/3", "-1/2", "1/9999999"])
def test_a_shard_that_is_none_is_refused_in_one_line(text):
    with pytest.raises(ConfigError, match=r"^shard must be I/N[^\n]*, got [^\n]*$"):
        Shard.parse(text)
    with pytest.raises(ValidationError):
        Shard.model_validate(text)


def test_a_shard_reads_back_as_it_is_written():
    shard = Shard.parse("3/7")
    assert (shard.index, shard.count, str(shard)) == (3, 7, "3/7")
    assert Shard.model_validate_json(shard.model_dump_json()) == shard


@pytest.fixture(scope="session")
def parts(go, tmp_path_factory):
    """Return the folders of a run in two shards, to be read only."""
    folder = tmp_path_factory.mktemp("shards")
    return [go(folder / f"part-{i}", shard=Shard(index=i, count=2)).folder for i in (1, 2)]


def test_a_shard_has_its_batches_alone_and_no_scores(parts, finished):
    whole = {r.key for r in Run.open(finished).sample_records()}
    keys = [{r.key for r in Run.open(part).sample_records()} for part in parts]
    assert not keys[0] & keys[1]
    assert keys[0] | keys[1] == whole
    for part, own in zip(parts, keys, strict=True):
        run = Run.open(part)
        assert not (part / SCORES).exists()
        assert {r.key for r in run.detections_records()} == own
        for read in (score_run, verify):
            with pytest.raises(FileError, match=r"must be a whole run, got shard ./2\. Merge"):
                read(run)


def test_a_shard_resumes_as_that_shard_alone(go, parts):
    before = (parts[0] / CARD).read_bytes()
    assert json.loads(before)["shard"] == "1/2"
    for other in (Shard(index=2, count=2), None):
        with pytest.raises(FileError, match=r"is another run .*: shard: "):
            go(parts[0], shard=other)
    assert (parts[0] / CARD).read_bytes() == before
