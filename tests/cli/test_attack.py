"""`safegen attack relearn` on the command line."""

from __future__ import annotations

import json

import pytest

from safegen.edits.uce import UCE
from safegen.models.loading import load


@pytest.fixture(scope="module")
def patch(tmp_path_factory):
    path = tmp_path_factory.mktemp("patch") / "text.safetensors"
    UCE(erase=("skulls",)).apply(load("mini")).save(path)
    return path


def test_an_edited_model_is_fine_tuned_and_evaluated(safegen, patch, tmp_path):
    out = tmp_path / "r"
    words = ["attack", "relearn", "mini", "--patch", patch, "--concept", "skulls", "--out", out]
    words += ["--data", "concept", "--role", "explicit", "--prompts", 1, "--steps", 1]
    words += ["--updates", 1, "--batch", 1]
    code, text, err = safegen(*words)
    assert code == 0, err
    assert "finetuned-1" in text
    assert "report.html" in text
    scores = json.loads((out / "scores.json").read_text())
    assert list(scores["stacks"]) == ["base", "edited", "finetuned-1"]
    for name in ("settings.json", "protocol.json", "scores.json", "report.html"):
        assert str(tmp_path) not in (out / name).read_text()
    assert safegen(*words)[0] == 0  # the same command resumes, here with nothing left to do


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["--concept", "skulls", "--updates", "9", "--updates", "2"],
            "updates must rise from 1 or more, got 9, 2",
        ),
        (["--concept", "skulls", "--role", "explicti"], "roles.0"),
        (["--concept", "skulls", "--lr", "0"], "--lr must be greater than"),
        (["--concept", "skull"], "Did you mean 'skulls'"),
        (["--concept", "nudity"], "no bundled triplets"),
        (["--concept", "skulls", "--images", "no"], "no is not a folder"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    safegen, patch, tmp_path, monkeypatch, words, says
):
    monkeypatch.chdir(tmp_path)
    code, _, err = safegen("attack", "relearn", "mini", "--patch", patch, *words, "--out", "out")
    assert code == 2
    assert says in err
    assert len(err.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
