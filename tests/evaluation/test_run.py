"""Runs: reproducibility, resume after kills, refusals, and scores under other rules."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from safegen.core.errors import ConfigError, FileError, UnknownNameError
from safegen.core.files import IN_USE, LOCK
from safegen.evaluation.evaluate import expand_baselines, judge_run
from safegen.evaluation.protocol_file import load_protocol
from safegen.evaluation.run import generate as draw
from safegen.evaluation.run.card import prepare, public_argument
from safegen.evaluation.run.folder import (
    CARD,
    CHANGES,
    DETECTIONS,
    FEATURES,
    JUDGES,
    PROTOCOL_FILE,
    SAMPLES,
    SCORES,
    TIMINGS,
    Run,
    write_json,
)
from safegen.evaluation.run.journal import Journal
from safegen.evaluation.run.records import SampleRecord, TimingRecord
from safegen.evaluation.scoring.score import score_run, scores_file
from safegen.evaluation.verify import verify
from safegen.models.checkpoint.diffusers_folder import save_folder
from safegen.patches.patch import Patch
from safegen.stack import Stack
from safegen.stack_loader import StackLoader

N, STACKS = 12, ("mini", "calm", "negative-prompt", "black-image")


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file of a run except the timings, the report, and the command's protocol."""
    files = (
        p
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name not in (TIMINGS, PROTOCOL_FILE) and p.stem != "report"
    )
    data = {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}
    if CARD in data:  # the command differs from the library call
        data[CARD] = json.dumps(json.loads(data[CARD]) | {"argv": None}).encode()
    return data


def test_two_runs_on_one_seed_agree_to_the_last_digit(go, finished, tmp_path):
    again = go(tmp_path / "again").folder
    assert contents(again) == contents(finished)
    assert len(contents(finished)) == N * len(STACKS) + 8


def test_a_finished_run_has_no_problems(finished):
    assert verify(Run.open(finished)) == []


def test_no_file_has_the_machine_the_user_or_a_path(finished, patch_file, quick):
    for name, data in contents(finished).items():
        if (
            name.endswith((".json", ".jsonl")) and name != FEATURES
        ):  # base64 may hold any short word
            for word in (
                os.uname().nodename,
                str(Path.home()),
                str(patch_file.parent),
                str(quick.parent),
                str(finished.parent),
            ):
                assert word.encode() not in data, (name, word)


def test_the_card_has_the_command_that_repeats_the_run(finished, patch_file):
    card = json.loads((finished / CARD).read_text())
    assert card["argv"] == ["safegen", "evaluate", "--stack", f"calm=mini+{patch_file.name}"]
    assert [(s["name"], s["kind"], s["baseline"]) for s in card["stacks"]] == [
        ("mini", "base", "mini"),
        ("calm", "given", "mini"),
        ("negative-prompt", "baseline", "mini"),
        ("black-image", "baseline", "mini"),
    ]
    assert set(card["versions"]) == {"safegen", "torch", "diffusers", "transformers"}
    assert card["stacks"][1]["patches"][0]["method"] == "test"


def test_paths_in_the_command_line_are_reduced_to_file_names():
    words = ("a=mini+/x/p.safetensors", "--prompts", "i2p=/home/me/i2p.csv", "--out=/x/run", "mini")
    assert [public_argument(word) for word in words] == [
        "a=mini+p.safetensors",
        "--prompts",
        "i2p=i2p.csv",
        "--out=run",
        "mini",
    ]
    assert public_argument("hub:owner/name/list.csv") == "hub:owner/name/list.csv"


def test_scores_have_every_stack_and_list_with_n_and_interval(finished):
    stacks = json.loads((finished / SCORES).read_text())["stacks"]
    assert tuple(stacks) == STACKS
    for name, entry in stacks.items():
        for row in entry["lists"].values():
            assert row["images"] == row["concept"]["n"] == 6
            assert row["concept"]["low"] <= row["concept"]["value"] <= row["concept"]["high"]
            assert ("change" in row) == (name != "mini")
    base, calm, black = (stacks[name]["lists"] for name in ("mini", "calm", "black-image"))
    assert base["mini:skulls"]["concept"]["hits"] > 0
    assert 0 < calm["mini:skulls"]["change"]["value"] < black["mini:skulls"]["change"]["value"]
    assert black["mini:skulls"]["removal"]["value"] == 1
    assert (black["mini:ghosts"]["blank"]["hits"], black["mini:ghosts"]["shown"]["hits"]) == (6, 0)
    assert "removal" not in calm["mini:ghosts"]
    pairs = calm["mini:skulls"]["paired"]
    assert pairs["both"] + pairs["base"] == base["mini:skulls"]["concept"]["hits"]
    assert pairs["both"] + pairs["own"] == calm["mini:skulls"]["concept"]["hits"]


@pytest.mark.parametrize(
    ("journal", "keep", "torn", "lost"),
    [
        (SAMPLES, 0, 0, 0),  # killed before the first line
        (SAMPLES, 4, 30, 2),  # within a line, after images of the next batch were written
        (SAMPLES, 6, 0, 0),  # within a batch
        (SAMPLES, 27, 1, 20),
        (DETECTIONS, 17, 50, 0),  # the judge is behind the generation
        (DETECTIONS, 0, 0, 0),
        (CHANGES, 5, 7, 0),
        (FEATURES, 21, 40, 0),
        (JUDGES, 0, 20, 0),
    ],
)
def test_a_run_interrupted_anywhere_resumes_to_the_same_bytes(
    go, finished, copy, journal, keep, torn, lost
):
    """Truncate the journals as a kill would; later files are removed too."""
    lines = (copy / journal).read_bytes().splitlines(keepends=True)
    (copy / journal).write_bytes(b"".join(lines[:keep]) + lines[keep][:torn])
    if journal == SAMPLES:
        seen = {json.loads(line)["key"] for line in lines[:keep]}
        for other in (DETECTIONS, CHANGES, FEATURES):
            rest = [
                line
                for line in (copy / other).read_bytes().splitlines(keepends=True)
                if json.loads(line)["key"] in seen
            ]
            (copy / other).write_bytes(b"".join(rest))
        for line in lines[keep + lost :]:
            (copy / json.loads(line)["file"]).unlink()
        half = copy / IN_USE
        half.mkdir()
        (half / LOCK).touch()
        (half / "half.png").write_bytes(b"half a pic")
    (copy / SCORES).unlink()
    go(copy)
    assert contents(copy) == contents(finished)


def test_a_missing_image_is_generated_again(go, finished, copy):
    gone = [json.loads(line)["file"] for line in (copy / SAMPLES).read_text().splitlines()][5:40:9]
    for file in gone:
        (copy / file).unlink()
    go(copy)
    assert contents(copy) == contents(finished)


def test_an_image_that_differs_from_its_regeneration_stops_the_run(go, copy):
    a, b = [copy / json.loads(line)["file"] for line in (copy / SAMPLES).read_text().splitlines()][
        :2
    ]
    a.write_bytes(b.read_bytes())
    b.unlink()  # so that the batch is generated again
    with pytest.raises(FileError, match="differs from the image generated now"):
        go(copy)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda p, s: (p.model_copy(update={"seeds": (1, 3)}), s),
            r"id: .*protocol\.seeds\[1\]: 2 and 3",
        ),
        (lambda p, s: (p.with_judge(threshold=0.3), s), r"judge\.threshold: 0\.5 and 0\.3"),
        (
            lambda p, s: (p, ["mini", s[1].replace("calm=", "warm=")]),
            r'stacks\[1\]\.name: "calm" and "warm"',
        ),
        (lambda p, s: (p, ["mini"]), "stacks: "),
    ],
)
def test_a_run_does_not_resume_with_another_protocol_or_stack(
    go, quick, patch_file, copy, change, says
):
    before = contents(copy)
    protocol, stacks = change(load_protocol(str(quick)), ["mini", f"calm=mini+{patch_file}"])
    with pytest.raises(FileError, match=f"is another run .*{says}"):
        go(copy, protocol=protocol, stacks=stacks)
    assert contents(copy) == before


def test_a_directory_that_is_not_a_run_is_not_changed(go, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious.txt").write_text("keep me")
    with pytest.raises(FileError, match="already exists and is not a run"):
        go(tmp_path / "mine")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["precious.txt"]


def test_two_processes_cannot_write_one_run(go, copy):
    with (
        Journal(copy / SAMPLES, SampleRecord),
        pytest.raises(FileError, match="being written by another process"),
    ):
        go(copy)


def test_separate_stages_give_the_same_run(go, finished, tmp_path):
    run = go(tmp_path / "steps", until="generate")
    assert not (run.folder / DETECTIONS).exists()
    with pytest.raises(FileError, match="no judge 'mini' has judged"):
        score_run(run)
    judge_run(run)
    assert not (run.folder / SCORES).exists()
    write_json(run.folder / SCORES, score_run(run))
    assert contents(run.folder) == contents(finished)


def test_an_incomplete_run_is_not_scored(copy):
    lines = (copy / SAMPLES).read_bytes().splitlines(keepends=True)
    (copy / SAMPLES).write_bytes(b"".join(lines[:-3]))
    with pytest.raises(
        FileError,
        match=r"not complete: samples\.jsonl has 9 of 12 images of 'black-image'\. Resume",
    ):
        score_run(Run.open(copy))


def test_another_threshold_scores_the_same_images(finished):
    run = Run.open(finished)
    low, mid = score_run(run, threshold=0.2), score_run(run)
    both = score_run(run, labels=["skulls", "ghosts"])
    assert len({s["protocol"]["id"] for s in (low, mid, both)}) == 3
    hits = [
        s["stacks"]["mini"]["lists"]["mini:ghosts"]["concept"]["hits"] for s in (mid, low, both)
    ]
    assert hits[0] <= hits[1]
    assert hits[0] < hits[2]
    assert low["inputs"] == mid["inputs"]
    with pytest.raises(ConfigError, match=r"judge\.threshold must .*got 0\.1"):
        score_run(run, threshold=0.1)


def test_scores_of_two_judges_with_one_name_do_not_replace_each_other(copy):
    text = (copy / DETECTIONS).read_text()
    (judge,) = {json.loads(line)["judge"] for line in text.splitlines()}
    for name in (DETECTIONS, JUDGES):
        text = (copy / name).read_text()
        (copy / name).write_text(
            text + text.replace(judge, "mini:second") + text.replace(judge, "mini:third")
        )
    run = Run.open(copy)
    with pytest.raises(FileError, match="several judges 'mini' have judged"):
        score_run(run)
    paths = [
        scores_file(run, score_run(run, judge=name))
        for name in (judge, "mini:second", "mini:third")
    ]
    assert paths[0].name == SCORES
    assert len(set(paths)) == 3
    assert all(path.match(f"scores-{run.protocol.id}-*.json") for path in paths[1:])


def test_a_label_that_the_judge_lacks_is_not_counted_as_safe(finished, copy):
    with pytest.raises(
        UnknownNameError, match=r"no label of the judge 'mini' named 'skul'\. Did you mean 'skulls'"
    ):
        score_run(Run.open(finished), labels=["skul"])
    with pytest.raises(UnknownNameError, match="named 'BUTTOCKS_EXPOSED'"):
        score_run(Run.open(finished), labels=["i2p5"])  # a label set of another judge
    (copy / JUDGES).unlink()
    with pytest.raises(
        FileError, match=r"judges\.jsonl has no record of mini:\w+\. Run .* again to write it"
    ):
        score_run(Run.open(copy))
    judge_run(Run.open(copy))  # no verdict is made again
    assert contents(copy) == contents(finished)


def test_another_judge_needs_no_generation(copy, monkeypatch):
    """The judge flags every second image of a batch and leaves the first image unjudged."""
    from safegen.core import registry as tables
    from safegen.judges import Detection, Detections

    class Odd:
        def __init__(self, *, labels, threshold):
            self.id, self.label_space = "odd:1", ("odd",)

        def detect(self, images):
            return [
                Detections((), unjudged="too dark")
                if i == 0
                else Detections((Detection("odd", 0.9),) * (i % 2))
                for i in range(len(images))
            ]

    monkeypatch.setattr(sys.modules[__name__], "Odd", Odd, raising=False)
    monkeypatch.setitem(tables.JUDGES, "odd", f"{__name__}:Odd")
    run, pictures = Run.open(copy), (copy / SAMPLES).read_bytes()
    with pytest.raises(ConfigError, match="labels of its own"):
        judge_run(run, name="odd")
    assert judge_run(run, name="odd", labels=["odd"]) == "odd:1"
    assert judge_run(run, name="odd:1", labels=["odd"]) == "odd:1"
    with pytest.raises(ConfigError, match="'odd' is odd:1 here, not odd:2"):
        judge_run(run, name="odd:2", labels=["odd"])
    scores = score_run(run, judge="odd", labels=["odd"])
    row = scores["stacks"]["mini"]["lists"]["mini:skulls"]
    assert row["concept"] | {"low": 0, "high": 0, "value": 0} == {
        "value": 0,
        "low": 0,
        "high": 0,
        "hits": 3,
        "n": 4,
        "unjudged": 2,
        "clusters": 3,  # images of one prompt count together in the interval
    }
    assert scores["judge"] == "odd:1"
    ghosts = scores["stacks"]["mini"]["lists"]["mini:ghosts"]
    assert (ghosts["subject"], ghosts["mosaicked"], ghosts["shown"]) == (None, None, None)
    assert ghosts["undefined"] == {
        # not only the refused images
        "over_censoring": "the judge 'odd' cannot tell: it has no label 'mosaic'",
        "coherence": "the judge 'odd' cannot tell: it recognizes no subject",
        "subject": "the judge 'odd' cannot tell: it recognizes no subject",
        "mosaicked": "the judge 'odd' cannot tell: it has no label 'mosaic'",
        "shown": "the judge 'odd' cannot tell: it has no label for what the list asks for",
    }
    assert (copy / SAMPLES).read_bytes() == pictures
    assert score_run(run) == json.loads(
        (copy / SCORES).read_text()
    )  # the verdicts of the first judge remain
    assert verify(run) == []


def test_out_of_memory_halves_the_batch_and_logs_it(go, finished, tmp_path, monkeypatch):
    real = draw.LoadedStack.generate

    def tight(self, asks, generation_config):
        if len(asks) > 2:
            raise RuntimeError(
                "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
            )
        return real(self, asks, generation_config)

    monkeypatch.setattr(draw.LoadedStack, "generate", tight)
    folder = go(tmp_path / "tight").folder
    timings = list(Run.open(folder).timing_records())
    notes = [record for record in timings if record.stage == "memory"]
    assert notes == [TimingRecord(stage="memory", stack="mini", batch=0, size=2)]  # it stays halved
    assert {record.size for record in timings if record.stage == "generate"} == {2}
    assert verify(Run.open(folder)) == []
    whole = contents(folder)
    for line in (folder / SAMPLES).read_text().splitlines()[6:]:
        (folder / json.loads(line)["file"]).unlink()
    go(folder)
    assert contents(folder) == whole  # and resumes halved

    def none(self, asks, generation_config):
        raise MemoryError

    monkeypatch.setattr(draw.LoadedStack, "generate", none)
    with pytest.raises(ConfigError, match="memory must hold at least one image"):
        go(tmp_path / "none")


def test_other_failures_are_not_treated_as_out_of_memory(go, tmp_path, monkeypatch):
    def broken(self, asks, generation_config):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(draw.LoadedStack, "generate", broken)
    with pytest.raises(RuntimeError, match="mat1"):
        go(tmp_path / "broken")


def test_a_full_disk_is_one_line_and_the_run_resumes(go, finished, tmp_path, monkeypatch):
    real, writes = draw._write, []

    def full(path, data):
        writes.append(path)
        if len(writes) > 7:
            raise OSError(28, "No space left on device")
        real(path, data)

    monkeypatch.setattr(draw, "_write", full)
    with pytest.raises(
        FileError, match=r"No space left on device\. .* run the same command again"
    ) as caught:
        go(tmp_path / "full")
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    go(tmp_path / "full")
    assert contents(tmp_path / "full") == contents(finished)


def test_a_list_of_unsafe_prompts_leaves_no_text_in_the_run(go, quick, finished, tmp_path):
    protocol = load_protocol(str(quick))
    hidden = protocol.model_copy(
        update={"lists": (protocol.lists[0].model_copy(update={"unsafe": True}), protocol.lists[1])}
    )
    folder = go(tmp_path / "hidden", protocol=hidden).folder
    text = b"".join(data for data in contents(folder).values())
    assert b"skulls all over a house" not in text
    assert b"skulls all over a house" in b"".join(contents(finished).values())
    assert verify(Run.open(folder)) == []
    assert (folder / SCORES).read_bytes() == (
        finished / SCORES
    ).read_bytes()  # and no number changes


def test_the_base_of_every_model_is_first_and_baselines_are_optional(quick, tmp_path):
    protocol = load_protocol(str(quick))
    a, b = (
        Stack(name="a", model="mini", patches=(tmp_path / "p",)),
        Stack(name="b", model="other", negative_prompt="x"),
    )
    names = [(s.stack.name, s.kind, s.baseline) for s in expand_baselines(protocol, [a, b], "none")]
    assert names == [
        ("base", "base", "base"),
        ("a", "given", "base"),
        ("base-2", "base", "base-2"),
        ("b", "given", "base-2"),
    ]
    assert [s.stack.name for s in expand_baselines(protocol, [b], "all")] == [
        "base",
        "b",
        "negative-prompt",
        "black-image",
    ]
    (*_, negative, black) = (s.stack for s in expand_baselines(protocol, [b], "all"))
    assert (negative.negative_prompt, black.blank) == ("skulls, a skull", True)
    with pytest.raises(ConfigError, match="got a more than once"):
        expand_baselines(protocol, [a, a.model_copy(update={"model": "other"})], "none")
    with pytest.raises(ConfigError, match="stacks must be at least one"):
        expand_baselines(protocol, [], "all")


def test_the_base_and_baselines_of_a_one_file_checkpoint_have_its_config(
    quick, tiny_model, tiny_folder, tmp_path
):
    from safetensors.torch import load_file, save_file

    from safegen.models.checkpoint.single_file_writer import save_single_file

    save_single_file(tiny_model, tmp_path / "whole.safetensors", dtype="fp32")
    save_file(load_file(tmp_path / "whole.safetensors"), tmp_path / "bare.safetensors")
    protocol = load_protocol(str(quick))
    stack = Stack(
        name="s", model=str(tmp_path / "bare.safetensors"), config=tiny_folder, negative_prompt="x"
    )
    stacks = expand_baselines(protocol, [stack], "all")
    assert {s.stack.config for s in stacks} == {tiny_folder}
    run = prepare(protocol, protocol.samples(), stacks, tmp_path / "run", StackLoader())
    assert {entry.config for entry in run.stacks} == {tiny_folder.name}
    whole = Stack(name="whole", model=str(tmp_path / "whole.safetensors"), negative_prompt="x")
    with pytest.raises(
        ConfigError,
        match=r"got 'base' and 'base-2' with the same images\. Give their stacks the same model",
    ):
        prepare(
            protocol,
            protocol.samples(),
            expand_baselines(protocol, [whole, stack], "none"),
            tmp_path / "twice",
            StackLoader(),
        )
    plain = stack.model_copy(update={"name": "plain", "negative_prompt": None})
    assert [s.stack.name for s in expand_baselines(protocol, [stack, plain], "none")] == [
        "plain",
        "s",
    ]


def test_the_log_beside_a_patch_is_copied_into_the_run(quick, patch_file, loader, tmp_path):
    patch = Patch.load(patch_file)
    metadata = patch.metadata.model_copy(update={"losses": {"L": 0.5}})
    stacks = []
    for name, loss in (("own", 0.5), ("other", 0.25)):  # the second log is of another patch
        tensors = {k: v * (1 + loss) for k, v in patch.tensors.items()}
        path = tmp_path / name / "patch.safetensors"
        path.parent.mkdir()
        Patch(tensors, metadata).save(path)
        log = path.with_name("patch.safetensors.log.jsonl")
        log.write_text(f'{{"update": 1, "L": {loss}, "lr": 0.1}}\n')
        stacks.append(Stack(name=name, model="mini", patches=(path,)))
    protocol = load_protocol(str(quick))
    expanded = expand_baselines(protocol, stacks, "none")
    run = prepare(protocol, protocol.samples(), expanded, tmp_path / "run", loader)
    (log,) = (run.folder / "patches").glob("*/*")
    assert log.parent.name == Patch.load(stacks[0].patches[0]).hash[:16]
    assert log.read_text() == '{"update": 1, "L": 0.5}\n'


def test_two_stacks_with_the_same_images_are_refused(go, patch_file, tmp_path):
    with pytest.raises(ConfigError, match="got 'x' and 'y' with the same images"):
        go(tmp_path / "twins", stacks=[f"x=mini+{patch_file}", f"y=mini+{patch_file}"])
    assert not (tmp_path / "twins").exists()


def test_several_models_share_one_black_image_baseline(quick, tiny_folder, make_model, tmp_path):
    save_folder(make_model(1), tmp_path / "second")
    stacks = [
        Stack(name="one", model=str(tiny_folder)),
        Stack(name="two", model=str(tmp_path / "second")),
    ]
    protocol = load_protocol(str(quick))
    expanded = expand_baselines(protocol, stacks, "all")
    run = prepare(protocol, protocol.samples(), expanded, tmp_path / "run", StackLoader())
    assert [entry.name for entry in run.stacks] == [
        "one",
        "negative-prompt",
        "black-image",
        "two",
        "negative-prompt-2",
    ]


def kill_and_resume(
    folder: Path, quick: Path, patch: Path, kills: int, seed: int, more: tuple[str, ...] = ()
) -> int:
    """Kill the command `kills` times, let it finish, and return how many kills hit it running.

    Each kill comes at random during startup or after the next write. A run of a few seconds is
    too short for ten kills of the second kind.
    """
    words = [
        "evaluate",
        "--protocol",
        str(quick),
        "--stack",
        "mini",
        "--stack",
        f"calm=mini+{patch}",
        "--out",
        str(folder),
        "--threads",
        str(
            torch.get_num_threads()
        ),  # as in the reference run: another thread count rounds differently
        *more,
    ]
    command, dice, met = [sys.executable, "-m", "safegen", *words], random.Random(seed), 0

    def size() -> int:
        return sum(
            p.stat().st_size for name in (SAMPLES, DETECTIONS) if (p := folder / name).exists()
        )

    for _ in range(kills):
        start, growth, jitter = size(), dice.randint(0, 8000 // kills), dice.uniform(0, 0.6 / kills)
        early = kills > 2 and dice.random() < 0.5
        with subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        ) as process:
            if early:
                time.sleep(dice.uniform(0, 3))
            while not early and process.poll() is None and size() <= start + growth:
                time.sleep(0.005)
            time.sleep(jitter)
            met += process.poll() is None
            process.send_signal(signal.SIGKILL)
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    return met


@pytest.mark.timeout(1800)  # 10 s for a kill on a quiet machine
@pytest.mark.parametrize("kills", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_a_run_killed_at_random_moments_has_the_same_bytes(
    finished, quick, patch_file, tmp_path, kills
):
    met = kill_and_resume(tmp_path / "killed", quick, patch_file, kills, seed=kills)
    assert met == kills  # every kill hit a running process
    assert contents(tmp_path / "killed") == contents(finished)


def test_scoring_and_verifying_load_no_torch_and_scoring_is_quick(copy):
    code = (
        "import sys; sys.argv = ['safegen', {words}]\n"
        "import runpy\n"
        "try: runpy.run_module('safegen', run_name='__main__')\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "libraries = ('torch', 'diffusers', 'transformers', 'safetensors')\n"
        "heavy = [m for m in libraries if m in sys.modules]\n"
        "print('HEAVY', heavy)"
    )
    for words in (f"'score', {str(copy)!r}, '--threshold', '0.3'", f"'verify', {str(copy)!r}"):
        began = cpu_seconds()
        done = subprocess.run(
            [sys.executable, "-c", code.format(words=words)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.stdout.splitlines()[-1] == "HEAVY []", done.stderr
        assert cpu_seconds() - began < 2  # processor time, as the machine may be busy


def cpu_seconds() -> float:
    """Return the processor time of all child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_the_card_repeats_no_foreign_metadata_of_a_patch(patch_file, tmp_path):
    from safegen.evaluation.run.card import _patch_entry
    from safegen.patches.patch import Patch

    patch = Patch.load(patch_file)
    foreign = {"file": "their.safetensors", "hash": "0", "layers": 3, "parameters": "many"}
    metadata = patch.metadata.model_copy(update=foreign)
    Patch(patch.tensors, metadata).save(tmp_path / "from-lora.safetensors")
    entry = _patch_entry(tmp_path / "from-lora.safetensors")
    assert (entry.file, entry.hash) == ("from-lora.safetensors", patch.hash)
