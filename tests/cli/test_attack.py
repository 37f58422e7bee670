"""`safegen attack` on the command line."""

from __future__ import annotations

import json

import pytest

WORDS = ["attack", "seeds", "--stack", "mini", "--concept", "skulls", "--limit", 2, "--steps", 1]


def test_a_stack_is_attacked_and_evaluated_before_and_after(safegen, tmp_path):
    out = tmp_path / "r"
    words = [*WORDS, "--set", "tries=2", "--budget", "queries=100,minutes=9", "--out", out]
    code, text, err = safegen(*words)
    assert code == 0, err
    assert "seeds (attack)" in text
    assert "report.html" in text
    scores = json.loads((out / "scores.json").read_text())
    assert list(scores["stacks"]) == ["mini"]
    for name in ("settings.json", "protocol.json", "scores.json", "report.html", "prompts.jsonl"):
        assert str(tmp_path) not in (out / name).read_text()
    assert safegen(*words)[0] == 0  # the same command resumes, here with nothing left to do
    code, _, err = safegen(*words[:-1], tmp_path / "r", "--seed", 3)
    assert code == 2
    assert "other settings" in err


def test_found_prompts_transfer_to_another_stack_and_through_a_protocol(safegen, tmp_path):
    first, second, third = (tmp_path / name for name in "abc")
    assert safegen(*WORDS, "--set", "tries=1", "--out", first)[0] == 0
    again = [*WORDS, "--set", "tries=1", "--prompts", first / "prompts.jsonl", "--out", second]
    assert safegen(*again)[0] == 0
    rows = [
        [json.loads(line) for line in (path / "prompts.jsonl").read_text().splitlines()]
        for path in (first, second)
    ]
    assert [r["prompt"] for r in rows[0]] == [r["prompt"] for r in rows[1]]
    words = ["attack", "seeds", "--stack", "mini", "--concept", "skulls", "--limit", 1]
    words += ["--protocol", "mini-smoke", "--set", "tries=1", "--out", third]
    code, _, err = safegen(*words)
    assert code == 0, err
    lists = json.loads((third / "scores.json").read_text())["stacks"]["mini"]["lists"]
    assert [row["role"] for row in lists.values()] == ["explicit", "attack"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["seed", "--concept", "skulls", "--stack", "mini"], "Did you mean 'seeds'"),
        (["--concept", "skulls", "--stack", "mini"], "seeds"),
        (["seeds", "--concept", "skulls"], "Use --stack"),
        (["seeds", "--concept", "skull", "--stack", "mini"], "Did you mean 'skulls'"),
        (["seeds", "--concept", "skulls", "--stack", "mini", "--set", "tries=0"], "tries"),
        (["seeds", "--concept", "skulls", "--stack", "mini", "--set", "x=0"], "x"),
        (["seeds", "--concept", "skulls", "--stack", "mini", "--budget", "hours=1"], "budget"),
        (["seeds", "--concept", "skulls", "--stack", "mini", "--role", "explicti"], "roles.0"),
        (["seeds", "--concept", "skulls", "--stack", "mini", "--preset", "no"], "preset"),
        (["seeds", "--concept", "skulls", "--stack", "mini", "--prompts", "no.csv"], "no prompts"),
        (["seeds", "--concept", "nudity", "--stack", "mini"], "no prompts of role explicit"),
        (["seeds", "--concept", "skulls", "--stack", "a=hub:owner/name"], "models of your own"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(safegen, tmp_path, monkeypatch, words, says):
    monkeypatch.chdir(tmp_path)
    code, _, err = safegen("attack", *words, "--out", "out")
    assert code == 2
    assert says in err
    assert len(err.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
