"""A run with a guarded stack: what was withheld is black, counted and told, and a killed run goes on to the same bytes."""

from __future__ import annotations

import json

from PIL import Image

from safegen.bench.folder import CARD, SAMPLES, TIMINGS, Run
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
