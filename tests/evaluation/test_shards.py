"""Shards of a run: merged, they are the bytes of one process; what is unfinished is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from crafted import write_run
from pydantic import ValidationError

from safegen.core.errors import ConfigError, FileError
from safegen.data.shards import Shard
from safegen.evaluation.merge import merge_runs
from safegen.evaluation.report.page import open_runs, write_report
from safegen.evaluation.run.card import deciding_parts
from safegen.evaluation.run.claim import claim_run
from safegen.evaluation.run.folder import (
    ATTACK,
    CARD,
    CHANGES,
    DETECTIONS,
    FEATURES,
    JUDGES,
    PROMPT_FILES,
    PROTOCOL_FILE,
    SAMPLES,
    SCORES,
    SETTINGS,
    TIMINGS,
    Run,
)
from safegen.evaluation.run.truth import write_truth_sheet
from safegen.evaluation.scoring.score import score_run
from safegen.evaluation.shards import count_samples, select_batches
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


def contents(folder):
    """Return every file of a run by its path."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def split(source, folder, index, count):
    """Return a folder with one shard of a whole run, as that shard's process leaves it."""
    run, shard = Run.open(source), Shard(index=index, count=count)
    size = run.protocol.generation.batch_size
    numbers = select_batches(shard, run.samples, size)
    own = {
        key for entry in run.stacks for i, key in enumerate(run.keys(entry)) if i // size in numbers
    }
    part = shutil.copytree(source, folder / f"part-{index}")
    for path in (SCORES, *(path.name for path in part.glob("report.*"))):
        (part / path).unlink(missing_ok=True)
    for name in (SAMPLES, DETECTIONS, CHANGES, FEATURES, TIMINGS):
        lines = (part / name).read_text().splitlines(keepends=True)
        rows = [(line, json.loads(line)) for line in lines]
        own_lines = [
            line for line, row in rows if row.get("key") in own or row.get("batch", -1) in numbers
        ]
        (part / name).write_text("".join(own_lines))
    for path in (part / "images").rglob("*.png"):
        if path.stem not in own:
            path.unlink()
    card = json.loads((part / CARD).read_text()) | {"shard": str(shard)}
    (part / CARD).write_text(json.dumps(card))
    return part


@pytest.fixture(scope="session")
def parts(finished, tmp_path_factory):
    """Return the folders of a run in two shards, to be read only."""
    folder = tmp_path_factory.mktemp("shards")
    return [split(finished, folder, i, 2) for i in (1, 2)]


@pytest.mark.slow
def test_a_shard_generates_its_batches_alone(go, parts, finished, tmp_path):
    made = go(tmp_path / "made", shard=Shard(index=2, count=2)).folder
    for path in parts[1].rglob("*"):
        if path.is_file() and path.name not in (CARD, TIMINGS):
            assert (made / path.relative_to(parts[1])).read_bytes() == path.read_bytes(), path
    assert len(list(made.rglob("*.png"))) == len(list(parts[1].rglob("*.png")))


def test_a_shard_has_no_scores(parts):
    for read in (score_run, verify):
        with pytest.raises(FileError, match=r"must be a whole run, got shard 1/2\. Merge"):
            read(Run.open(parts[0]))


def test_a_shard_resumes_as_that_shard_alone(go, parts):
    before = (parts[0] / CARD).read_bytes()
    assert json.loads(before)["shard"] == "1/2"
    for other in (Shard(index=2, count=2), None):
        with pytest.raises(FileError, match=r"is another run .*: shard: "):
            go(parts[0], shard=other)
    assert (parts[0] / CARD).read_bytes() == before


def test_merged_shards_are_the_bytes_of_one_process(parts, finished, tmp_path):
    whole = shutil.copytree(finished, tmp_path / "one" / "run")
    write_report(open_runs([whole]), whole)
    given = [parts[1], parts[0], parts[1]]
    merged = merge_runs(given, tmp_path / "merged" / "run").folder
    times = [sorted((p / TIMINGS).read_text().splitlines()) for p in (merged, *parts)]
    assert times[0] == sorted(times[1] + times[2])
    assert verify(Run.open(merged)) == []
    (merged / SCORES).unlink()  # as if it was stopped before the scores
    shutil.copyfile(whole / TIMINGS, merged / TIMINGS)
    merge_runs(given, merged)
    assert contents(merged) == contents(whole)


@pytest.fixture
def part(parts, tmp_path):
    """Return a copy of the second shard that a test may change."""
    return shutil.copytree(parts[1], tmp_path / "part-2-copy")


def drop_line(path):
    """Remove the last line of a journal, and return it."""
    *lines, last = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines))
    return last


@pytest.mark.parametrize("journal", [SAMPLES, DETECTIONS])
def test_shards_that_are_missing_or_not_finished_are_named(parts, part, tmp_path, journal):
    with pytest.raises(FileError, match=r"but not: 2/2 \(not given\)\. Finish"):
        merge_runs(parts[:1], tmp_path / "run")
    drop_line(part / journal)
    message = rf"but not: 2/2 \(part-2-copy lacks 1 records in {journal}\)\. Finish"
    with pytest.raises(FileError, match=message):
        merge_runs([parts[0], part], tmp_path / "run")
    assert not (tmp_path / "run").exists()
    if journal == DETECTIONS:  # the finished twin has the record
        merge_runs([parts[0], part, parts[1]], tmp_path / "run")


def test_contradictory_parts_are_refused(parts, part, tmp_path):
    line = drop_line(part / DETECTIONS)
    with (part / DETECTIONS).open("ab") as file:
        file.write(line.replace(b'"score":0.', b'"score":0.1'))
    with pytest.raises(FileError, match=r"parts must agree, got two records of .* that differ"):
        merge_runs([*parts, part], tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_image_that_is_not_the_recorded_one_is_refused(parts, part, tmp_path):
    image = min((part / "images" / "calm").iterdir())
    image.write_bytes(image.read_bytes()[:-1])
    with pytest.raises(FileError, match=r"must be the image in samples.jsonl, got another"):
        merge_runs([parts[0], part], tmp_path / "run")
    image.unlink()
    with pytest.raises(FileError, match="does not exist"):
        merge_runs([parts[0], part], tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"versions": {"safegen": "0"}}, "differ in versions.safegen"),
        ({"device": "cuda, float32"}, "differ in device"),
        ({"shard": "2/3"}, "one number of shards, got I/2 and I/3"),
    ],
)
def test_shards_of_other_runs_are_refused(parts, part, tmp_path, changes, message):
    card = json.loads((part / CARD).read_text())
    (part / CARD).write_text(json.dumps(card | changes))
    with pytest.raises(ConfigError, match=message):
        merge_runs([parts[0], part], tmp_path / "run")


def test_shards_of_several_gpus_are_of_one_run(parts, tmp_path):
    copies = []
    for i, part in enumerate(parts):
        copies.append(shutil.copytree(part, tmp_path / f"{i}"))
        card = json.loads((part / CARD).read_text()) | {"device": f"cuda:{i}, torch.float32"}
        (copies[i] / CARD).write_text(json.dumps(card))
        for name in (DETECTIONS, JUDGES):
            (copies[i] / name).unlink()
    assert merge_runs(copies, tmp_path / "run").card.device == "cuda, torch.float32"


def test_a_merge_replaces_nothing(parts, tmp_path):
    with pytest.raises(FileError, match=r"is another run .*: shard: .*Name another directory"):
        merge_runs(parts, parts[0])
    (tmp_path / "kept").write_text("mine")
    for out in (tmp_path, tmp_path / "kept"):
        with pytest.raises(FileError, match="already exists"):
            merge_runs(parts, out)


def test_a_merge_into_a_run_that_is_not_finished_is_refused(tmp_path):
    whole = write_run(tmp_path / "run")
    out = shutil.copytree(whole, tmp_path / "out")
    (out / DETECTIONS).unlink()
    lines = (out / SAMPLES).read_text().splitlines(keepends=True)
    (out / SAMPLES).write_text("".join(lines[:-1]))
    with pytest.raises(FileError, match=rf"got a run with {len(lines) - 1} of {len(lines)} images"):
        merge_runs([whole], out)


def test_a_run_goes_on_on_a_gpu_of_another_number(tmp_path):
    card = Run.open(write_run(tmp_path / "run")).card
    first, second = (
        deciding_parts(card.model_copy(update={"device": device}))
        for device in ("cuda:0, torch.float32", "cuda:1, torch.float32")
    )
    assert first == second != deciding_parts(card.model_copy(update={"device": "cpu"}))


def test_a_run_that_is_refused_at_its_start_leaves_nothing(tmp_path):
    folder = tmp_path / "run"

    def refuse():
        with claim_run(folder):
            (folder / CARD).write_text("{}")
            (folder / PROTOCOL_FILE).write_text("")
            (folder / PROMPT_FILES).mkdir()
            raise ConfigError("no cluster answers")

    with pytest.raises(ConfigError):
        refuse()
    assert not folder.exists()


def test_what_an_attack_has_found_outlives_an_error(tmp_path):
    folder = tmp_path / "run"

    def fail(text):
        with claim_run(folder):
            (folder / SETTINGS).write_text("{}")
            (folder / ATTACK).write_text(text)
            raise ConfigError("memory must hold at least one image")

    with pytest.raises(ConfigError):
        fail("")
    assert not folder.exists()
    with pytest.raises(ConfigError):
        fail("{}\n")
    assert (folder / ATTACK).read_text() == "{}\n"


def test_a_shard_has_no_sheet_of_images_that_it_lacks(tmp_path):
    folder = write_run(tmp_path / "run")
    card = json.loads((folder / CARD).read_text()) | {"shard": "1/2"}
    (folder / CARD).write_text(json.dumps(card))
    with pytest.raises(FileError, match="must be a whole run, got shard 1/2"):
        write_truth_sheet(Run.open(folder), tmp_path / "sheet.csv")


def test_more_shards_than_batches_leave_some_empty_and_merge(finished, tmp_path):
    folders = [split(finished, tmp_path, i, 4) for i in range(1, 5)]
    for folder in folders:
        for name in (DETECTIONS, CHANGES, FEATURES, JUDGES):
            (folder / name).unlink()  # not judged yet
    assert sorted(count_samples(Run.open(folder)) for folder in folders) == [0, 4, 4, 4]
    run = merge_runs(folders, tmp_path / "run")
    keys = [key for entry in run.stacks for key in run.keys(entry)]
    assert [record.key for record in run.sample_records()] == keys
    assert not (run.folder / SCORES).exists()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_killed_shards_and_merges_end_as_one_process(tmp_path):
    command = ("benchmarks/shards_killed.py", "--kills", "6", "--seed", "1")
    out = tmp_path / "result.json"
    done = subprocess.run(
        [sys.executable, *command, "--out", out],
        cwd=Path(__file__).parent.parent.parent,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    assert (result["kills"], result["equal_bytes"], result["faults"]) == (6, True, [])
