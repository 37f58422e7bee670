"""A run with a guarded stack: what was withheld is black, counted and told, and a killed run goes on to the same bytes."""

from __future__ import annotations

import json

from PIL import Image

from safegen.bench.folder import CARD, SAMPLES, SCORES, TIMINGS, Run
from safegen.bench.run_report import PAGE, write_report
from safegen.bench.verify import verify


def test_withheld_pictures_are_black_and_recorded_and_the_run_can_be_verified_and_made_again(go, tmp_path):
    recipe = tmp_path / "kept.toml"
    recipe.write_text('name = "kept"\nmodel = "mini"\n[[guards]]\nname = "prompt-filter"\nconcept = "skulls"\n')
    stacks = {"stacks": ("mini", str(recipe)), "baselines": "none"}
    out = go(tmp_path / "run", **stacks).folder
    assert verify(Run.open(out)) == []
    lines = [json.loads(line) for line in (out / SAMPLES).read_text().splitlines()]
    plain, kept = ([line for line in lines if line["stack"] == name] for name in ("mini", "kept"))
    assert not any("guards" in line for line in plain)
    for line in kept:
        gone = line["list"] == "mini:skulls"
        assert line["blank"] == gone
        assert line["guards"]["action"] == ("block" if gone else "none")
        assert line["guards"]["reason"] == ("prompt-filter: word" if gone else "")
        with Image.open(out / line["file"]) as picture:
            assert json.loads(picture.text["safegen"])["guards"] == line["guards"]
            assert (picture.getextrema() == ((0, 0),) * 3) == gone
    card = json.loads((out / CARD).read_text())
    assert [s.get("guards", [{}])[0].get("words") for s in card["stacks"]] == [None, ["skulls", "a skull"]]
    assert "--stack kept.toml" in card["command"]
    assert any("guards_ms" in json.loads(line) for line in (out / TIMINGS).read_text().splitlines())
    before = {p.name: p.read_bytes() for p in out.rglob("*") if p.is_file() and p.name != TIMINGS and p.stem != "report"}
    next((out / "pictures" / "kept").glob("*.png")).unlink()
    go(out, **stacks)
    assert {p.name: p.read_bytes() for p in out.rglob("*") if p.is_file() and p.name != TIMINGS and p.stem != "report"} == before


def test_what_a_failed_guard_withheld_is_unjudged_and_not_safe(go, tmp_path, monkeypatch):
    def broken(self, prompts):
        raise RuntimeError("the word list is gone")

    monkeypatch.setattr("safegen.guard.prompt_filter._Ready.check", broken)
    recipe = tmp_path / "kept.toml"
    recipe.write_text('name = "kept"\nmodel = "mini"\n[[guards]]\nname = "prompt-filter"\nconcept = "skulls"\n')
    run = go(tmp_path / "run", stacks=("mini", str(recipe)), baselines="none")
    lines = [json.loads(line) for line in (run.folder / SAMPLES).read_text().splitlines()]
    kept = [line for line in lines if line["stack"] == "kept"]
    assert {line["guards"]["action"] for line in kept} == {"withhold"}
    row = json.loads((run.folder / SCORES).read_text())["stacks"]["kept"]["lists"]["mini:skulls"]
    assert row["concept"] is None  # no picture was judged, so no rate: the judge saw black, and black is no proof
    assert "concept" in row["undefined"]
    facts = write_report({"run": Run.open(run.folder)}, tmp_path / "out")
    assert next(s for s in facts["stacks"] if s["name"] == "kept")["unjudged"] == len(kept)
    page = (tmp_path / "out" / PAGE).read_text()
    assert f"{len(kept)} of these were withheld because a guard failed" in page
    assert "guard prompt-filter" in page


def test_a_stack_that_is_guarded_by_the_judge_that_measures_it_is_named(go, tmp_path):
    recipe = tmp_path / "kept.toml"
    recipe.write_text('name = "kept"\nmodel = "mini"\n[[guards]]\nname = "judge-filter"\nconcept = "skulls"\n')
    run = go(tmp_path / "run", stacks=("mini", str(recipe)), baselines="none")
    notes = write_report({"run": Run.open(run.folder)}, tmp_path / "out")["notes"]
    assert [note for note in notes if "the very judge that measures it" in note and "kept" in note]
    assert not [note for note in notes if "withheld" in note]
