"""`safegen attack` on the command line."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from PIL import Image

WORDS = ["attack", "seeds", "--stack", "mini", "--concept", "skulls", "--limit", 2, "--steps", 1]
RELEARN = ["relearn", "--stack", "mini", "--concept", "skulls"]


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


def test_an_image_that_a_prompt_starts_from_stays_with_it(safegen, tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    words = ["attack", "img2img", *WORDS[2:6], "--limit", 1, "--steps", 2]
    words += ["--set", "strengths=[0.5]", "--set", "control=false"]
    code, _, err = safegen(*words, "--out", first)
    assert code == 0, err
    words = [*WORDS[:6], "--steps", 2, "--set", "tries=1", "--out", second]
    code, _, err = safegen(*words, "--prompts", first / "prompts.jsonl")
    assert code == 0, err
    (given,), (found,) = (
        [json.loads(line) for line in (path / "prompts.jsonl").read_text().splitlines()]
        for path in (first, second)
    )
    assert found["start"]["sha256"] == given["start"]["sha256"]
    assert (second / found["start"]["image"]).is_file()
    images = [path.read_bytes() for path in (second / "images" / "mini").iterdir()]
    pixels = {np.asarray(Image.open(io.BytesIO(data))).tobytes() for data in images}
    assert len(images) == 2
    assert len(pixels) == 1, "an attack that changes nothing asks for the same image"


def test_prompts_that_cannot_be_attacked_are_named(safegen, tmp_path):
    prompts = tmp_path / "torn.jsonl"
    prompts.write_text('{"prompt": "a castle"}\n{"prompt": "a secret')
    words = [*WORDS, "--set", "tries=1", "--prompts", prompts, "--unsafe", "--out", tmp_path / "a"]
    code, _, err = safegen(*words)
    assert code == 0
    assert "1 of torn.jsonl are left out, the first at line 2" in err
    assert "secret" not in err
    left_out = json.loads((tmp_path / "a" / "protocol.json").read_text())["protocol"]["lists"][0][
        "left_out"
    ]
    assert [text[:7] for text in left_out] == ["line 2:"]
    prompts.rename(tmp_path / "seeds")
    code, _, err = safegen(*WORDS, "--prompts", tmp_path / "seeds", "--out", tmp_path / "b")
    assert code == 2
    assert "got seeds. Rename the list" in err
    assert not (tmp_path / "b").exists()


def test_weights_are_attacked_and_the_curve_is_shown(safegen, tmp_path):
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (64, 64), "red").save(tmp_path / "pictures" / "a.png")
    (tmp_path / "pictures" / "a.txt").write_text("a red wall", encoding="utf-8")
    for name, settings, stacks in (
        (
            "relearn",
            ["updates=[1,2]", "images_per_update=1", f"images={tmp_path / 'pictures'}"],
            ["finetuned-1", "finetuned-2"],
        ),
        ("compression", ["bits=[4]", "prune=[0.5]"], ["quantized-4", "pruned-50"]),
    ):
        out = tmp_path / name
        words = ["attack", name, *WORDS[2:], "--out", out]
        code, text, err = safegen(*words, *(word for pair in settings for word in ("--set", pair)))
        assert code == 0, err
        assert all(stack in text for stack in stacks)
        scores = json.loads((out / "scores.json").read_text())
        assert list(scores["stacks"]) == ["mini", *stacks]
        for stack in stacks:
            assert scores["stacks"][stack]["lists"]["mini:skulls"]["reference"]["stack"] == "mini"
        for file in ("settings.json", "protocol.json", "scores.json", "report.html"):
            assert str(tmp_path) not in (out / file).read_text()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["seed", "--concept", "skulls", "--stack", "mini"], "Did you mean 'seeds'"),
        (["--concept", "skulls", "--stack", "mini"], "seeds"),
        (
            ["img2img", "--concept", "skulls", "--stack", "mini", "--steps", 2, "--limit", 1],
            "got 0.1. Use --steps 10",
        ),
        (["seeds", "--concept", "skulls"], "Use --stack"),
        (["seeds", "--concept", "skull", "--stack", "mini"], "Did you mean 'skulls'"),
        (["seeds", "--concept", "skulls", "--stack", "mini", "--set", "tries=0"], "tries"),
        (["seeds", "--concept", "skulls", "--stack", "mini", "--set", "x=0"], "x"),
        (["seeds", "--concept", "skulls", "--stack", "mini", "--budget", "hours=1"], "budget"),
        (["seeds", "--concept", "skulls", "--stack", "mini", "--role", "explicti"], "roles.0"),
        (["seeds", "--concept", "skulls", "--stack", "mini", "--preset", "no"], "preset"),
        (["seeds", "--concept", "skulls", "--stack", "mini", "--prompts", "no.csv"], "no prompts"),
        (["seeds", "--concept", "nudity", "--stack", "mini"], "no prompts of role explicit"),
        ([*RELEARN, "--set", "updates=[9,2]"], "updates must rise from 1 or more, got 9, 2"),
        ([*RELEARN, "--set", "lr=0"], "lr"),
        ([*RELEARN, "--set", "images=no"], "no is not a folder"),
        ([*RELEARN, "--set", "modular=true", "--set", "updates=[1]"], "got no patch"),
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
