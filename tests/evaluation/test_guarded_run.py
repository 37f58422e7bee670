"""Runs of guarded stacks: withheld images are black and counted, and runs resume bit for bit."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from safegen.core.errors import FileError
from safegen.evaluation.report.page import PAGE, write_report
from safegen.evaluation.run.folder import CARD, SAMPLES, SCORES, TIMINGS, Run
from safegen.evaluation.verify import verify
from safegen.guards import prompt_filter
from safegen.judges import Detections
from safegen.stack_loader import LoadedStack


def test_withheld_images_are_black_and_recorded_and_the_run_verifies_and_repeats(
    go, tmp_path, monkeypatch
):
    given, real = [], LoadedStack.generate

    def kept(self, asks, generation_config):
        found = real(self, asks, generation_config)
        given.extend(found if self.stack.guards else [])
        return found

    monkeypatch.setattr(LoadedStack, "generate", kept)
    recipe = tmp_path / "kept.toml"
    recipe.write_text(
        'name = "kept"\nmodel = "mini"\n[[guards]]\nname = "prompt-filter"\nconcept = "skulls"\n'
    )
    stacks = {"stacks": ("mini", str(recipe)), "baselines": "none"}
    out = go(tmp_path / "run", **stacks).folder
    assert verify(Run.open(out)) == []
    lines = [json.loads(line) for line in (out / SAMPLES).read_text().splitlines()]
    plain, kept = ([line for line in lines if line["stack"] == name] for name in ("mini", "kept"))
    assert not any("guards" in line for line in plain)
    assert [line["guards"] for line in kept] == [
        guarded_run.trace.to_json(times=False) for guarded_run in given
    ]  # Python's, the line's, the PNG's
    for line in kept:
        gone = line["list"] == "mini:skulls"
        assert line["blank"] == gone
        assert line["guards"]["action"] == ("block" if gone else "none")
        assert line["guards"]["reason"] == ("prompt-filter: word" if gone else "")
        with Image.open(out / line["file"]) as picture:
            assert json.loads(picture.text["safegen"])["guards"] == line["guards"]
            assert (picture.getextrema() == ((0, 0),) * 3) == gone
    card = json.loads((out / CARD).read_text())
    assert [[g["words"] for g in s["guards"]] for s in card["stacks"]] == [
        [],
        [["skulls", "a skull"]],
    ]
    assert any("guards_ms" in json.loads(line) for line in (out / TIMINGS).read_text().splitlines())
    before = {
        p.name: p.read_bytes()
        for p in out.rglob("*")
        if p.is_file() and p.name != TIMINGS and p.stem != "report"
    }
    next((out / "images" / "kept").glob("*.png")).unlink()
    go(out, **stacks)
    assert {
        p.name: p.read_bytes()
        for p in out.rglob("*")
        if p.is_file() and p.name != TIMINGS and p.stem != "report"
    } == before


def test_an_image_withheld_by_a_failed_guard_is_unjudged_and_not_safe(go, tmp_path, monkeypatch):
    def broken(self, prompts):
        raise RuntimeError("the word list is gone")

    monkeypatch.setattr("safegen.guards.prompt_filter.PromptFilterGuard.check_prompts", broken)
    recipe = tmp_path / "kept.toml"
    recipe.write_text(
        'name = "kept"\nmodel = "mini"\n[[guards]]\nname = "prompt-filter"\nconcept = "skulls"\n'
    )
    run = go(tmp_path / "run", stacks=("mini", str(recipe)), baselines="none")
    lines = [json.loads(line) for line in (run.folder / SAMPLES).read_text().splitlines()]
    kept = [line for line in lines if line["stack"] == "kept"]
    assert {line["guards"]["action"] for line in kept} == {"withhold"}
    row = json.loads((run.folder / SCORES).read_text())["stacks"]["kept"]["lists"]["mini:skulls"]
    assert (
        row["concept"] is None
    )  # no image was judged, so there is no rate: a black image proves nothing
    assert "concept" in row["undefined"]
    facts = write_report({"run": Run.open(run.folder)}, tmp_path / "out")
    assert next(s for s in facts["stacks"] if s["name"] == "kept")["unjudged"] == len(kept)
    page = (tmp_path / "out" / PAGE).read_text()
    assert f"{len(kept)} of these were withheld because a guard failed" in page
    assert "guard prompt-filter" in page


def test_a_stack_guarded_by_the_judge_of_the_run_is_noted(go, tmp_path):
    recipe = tmp_path / "kept.toml"
    recipe.write_text(
        'name = "kept"\nmodel = "mini"\n[[guards]]\nname = "judge-filter"\nconcept = "skulls"\n'
    )
    run = go(tmp_path / "run", stacks=("mini", str(recipe)), baselines="none")
    notes = write_report({"run": Run.open(run.folder)}, tmp_path / "out")["notes"]
    guarded = [note for note in notes if "guarded by the judge that measures it" in note]
    assert [note for note in guarded if "kept" in note]
    assert not [note for note in notes if "withheld" in note]


WORD = 'name = "kept"\nmodel = "mini"\n[[guards]]\nname = "prompt-filter"\nconcept = "skulls"\n'


@pytest.fixture
def guarded_run(go, tmp_path):
    """Return a run folder and a function that generates the bundled and a guarded stack into it."""
    recipe = tmp_path / "kept.toml"
    recipe.write_text(WORD)
    out = tmp_path / "run"
    return out, lambda: go(out, stacks=("mini", str(recipe)), baselines="none", until="generate")


def contents(folder):
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and p.name != TIMINGS
    }


def samples(folder):
    return [json.loads(line) for line in (folder / SAMPLES).read_text().splitlines()]


def break_filter(monkeypatch, *, calls=99):
    """Make the prompt filter fail in the next calls."""
    real, left = prompt_filter.PromptFilterGuard.check_prompts, [None] * calls

    def broken(self, prompts):
        if left:
            left.pop()
            raise ConnectionError(f"no answer at {id(left)}")
        return real(self, prompts)

    monkeypatch.setattr(prompt_filter.PromptFilterGuard, "check_prompts", broken)


def test_a_recorded_failure_stays_if_it_does_not_recur(guarded_run, monkeypatch):
    out, go_on = guarded_run
    break_filter(monkeypatch, calls=1)
    go_on()
    before = contents(out)
    lost = [line for line in samples(out) if line.get("guards", {}).get("action") == "withhold"]
    assert len(lost) == 4  # one batch
    (out / lost[1]["file"]).unlink()
    go_on()  # the filter works again
    assert contents(out) == before


def test_a_failure_during_resume_loses_no_generated_image(guarded_run, monkeypatch):
    out, go_on = guarded_run
    go_on()
    before, last = contents(out), samples(out)[-1]
    with monkeypatch.context() as patched:
        break_filter(patched)
        (out / last["file"]).unlink()
        with pytest.raises(
            FileError,
            match=r"is missing and cannot be generated again \(error: prompt-filter: Conn.*"
            r"run the same command",
        ):
            go_on()
        assert contents(out) == {
            name: data for name, data in before.items() if name != last["file"]
        }
    go_on()
    assert contents(out) == before


def test_an_unrecorded_image_and_a_failure_can_replace_each_other(guarded_run, monkeypatch):
    out, go_on = guarded_run
    go_on()
    before, last = contents(out), samples(out)[-1]
    whole = (out / SAMPLES).read_bytes()
    cut = whole[: whole[:-1].rfind(b"\n") + 1]
    with monkeypatch.context() as patched:
        break_filter(patched)
        (out / SAMPLES).write_bytes(cut)  # killed between the image and its line
        go_on()
    assert samples(out)[-1]["guards"]["action"] == "withhold"
    changed = {name for name, data in contents(out).items() if data != before[name]}
    assert changed == {SAMPLES, last["file"]}
    (out / SAMPLES).write_bytes(cut)
    go_on()
    assert contents(out) == before


def test_a_judge_out_of_memory_halves_the_batch_as_generation_does(go, tmp_path, monkeypatch):
    class Large:
        id, labels, label_space, threshold = "large", ("skulls",), ("skulls",), 0.5

        def detect(self, images):
            short = Detections(
                (), unjudged="OutOfMemoryError: CUDA out of memory. Tried to allocate 9 bytes"
            )
            return [short if len(images) > 2 else Detections(())] * len(images)

    monkeypatch.setattr(
        "safegen.guards.judge_filter.JudgeFilterConfig.load_judge", lambda self: Large()
    )
    recipe = tmp_path / "seen.toml"
    recipe.write_text(
        'name = "seen"\nmodel = "mini"\n[[guards]]\nname = "judge-filter"\njudge = "mini"\n'
    )
    out = go(
        tmp_path / "run", stacks=("mini", str(recipe)), baselines="none", until="generate"
    ).folder
    assert {line["guards"]["action"] for line in samples(out) if line["stack"] == "seen"} == {
        "none"
    }
    notes = [json.loads(line) for line in (out / TIMINGS).read_text().splitlines()]
    assert [n for n in notes if n["stage"] == "memory"] == [
        {"stage": "memory", "stack": "seen", "batch": 0, "size": 2}
    ]
