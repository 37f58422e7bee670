"""`safegen resilience` as a user meets it."""

from __future__ import annotations

import json

import pytest

from safegen.cli.attack import _show
from safegen.edits.uce import UCE
from safegen.models.loading import load


@pytest.fixture(scope="module")
def patch(tmp_path_factory):
    out = tmp_path_factory.mktemp("patch") / "text.safetensors"
    UCE(erase=("skulls",)).apply(load("mini")).save(out)
    return out


def test_an_edited_model_is_fine_tuned_and_judged_again(safegen, patch, tmp_path):
    brief = ("--prompts", 1, "--steps", 1, "--updates", 1, "--batch", 1, "--role", "explicit")
    code, text, err = safegen(
        "resilience",
        "mini",
        "--patch",
        patch,
        "--concept",
        "skulls",
        "--on",
        "concept",
        *brief,
        "--out",
        tmp_path / "r",
    )
    assert code == 0, err
    assert "edited+1" in text
    assert "n = 1 pictures a list" in text
    found = json.loads((tmp_path / "r" / "resilience.json").read_text())
    assert (found["model"], found["settings"]["on"], found["sides"]) == (
        "mini",
        "concept",
        ["base", "edited", "edited+1"],
    )
    assert str(tmp_path) not in json.dumps(found)


def test_no_name_is_cut_on_a_narrow_screen(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    rate = {"value": 0.375, "low": 0.14, "high": 0.69, "n": 8}
    sides = ["base", "edited", "edited+100", "modular+100"]
    lists = {
        role: {"role": role, "sides": {s: {"concept": rate, "subject": rate} for s in sides}}
        for role in ("explicit", "innocent", "benign")
    }
    facts = {
        "concept": {"name": "skulls"},
        "settings": {"on": "concept"},
        "data": {"pictures": 100},
    }
    _show(facts | {"sides": sides, "lists": lists})
    shown = capsys.readouterr().out
    assert all(word in shown for word in (*sides, *lists))
    assert "\N{HORIZONTAL ELLIPSIS}" not in shown


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["--concept", "skulls", "--updates", "9", "--updates", "2"],
            "updates must rise from 1 or more, got 9, 2",
        ),
        (["--concept", "skulls", "--role", "explicti"], "roles.0"),
        (["--concept", "skulls", "--lr", "0"], "lr must be greater than 0, got 0.0"),
        (["--concept", "skull"], "Did you mean 'skulls'"),
        (["--concept", "nudity"], "no bundled triplets"),
        (["--concept", "skulls", "--pictures", "no"], "no is not a folder"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    safegen, patch, tmp_path, monkeypatch, words, says
):
    monkeypatch.chdir(tmp_path)
    code, _, err = safegen("resilience", "mini", "--patch", patch, *words, "--out", "out")
    assert code == 2
    assert says in err
    assert len(err.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
