"""Mistyped names, missing files and outputs in the way are answered before torch is imported."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

OUT = ["--out", "new.safetensors"]
RUN = ["--out", "run"]
ATTACK = ["attack", "seeds", "--stack", "mini", "--concept", "skulls", *RUN]
EVALUATE = ["evaluate", "--protocol", "mini-smoke", "--stack", "mini", *RUN]
GENERATE = ["generate", "mini", "--prompt", "a castle", "--out", "images"]
ANSWERS = {
    ("edit", "mini", "--method", "ucee", *OUT): "no edit named 'ucee'. Did you mean 'uce'?",
    ("edit", "mini", "--preset", "papr", *OUT): "preset of safegen named 'papr'. Did you mean",
    ("edit", "mini", "--method", "duo", "--preset", "x", *OUT): "no preset of duo named 'x'",
    ("edit", "mini", "--concept", "skuls", *OUT): "concept named 'skuls'. Did you mean 'skulls'?",
    ("edit", "mini", "--concept", "none.toml", *OUT): "'none.toml' does not exist",
    ("edit", "minni", *OUT): "of that name) named 'minni'. Did you mean 'mini'?",
    ("edit", "mini", "--triplets", "nowhere", *OUT): "'nowhere' does not exist",
    ("edit", "mini", "--from", "none.safetensors", *OUT): "'none.safetensors' does not exist",
    ("edit", "mini", "--dtype", "fp31", *OUT): "no dtype named 'fp31'",
    ("edit", "mini", "--out", "old.safetensors"): "old.safetensors",
    ("generate", "owner/name", "--prompt", "x", "--out", "images"): "name it hub:owner/name",
    (*GENERATE, "--guard", "sldd"): "no guard named 'sldd'. Did you mean 'sld'?",
    (*GENERATE, "--guard", "sld-maxx"): "preset of the guard 'sld' named 'maxx'. Did you mean",
    (*GENERATE, "--guard", "sld", "--concept", "skuls"): "no concept named 'skuls'",
    (*GENERATE, "--patch", "none.safetensors"): "'none.safetensors' does not exist",
    (*GENERATE[:-1], "old"): "old",
    ("attack", "sedds", *ATTACK[2:]): "no attack named 'sedds'. Did you mean 'seeds'?",
    (*ATTACK, "--preset", "papr"): "no preset of seeds named 'papr'",
    (*ATTACK, "--concept", "skuls"): "no concept named 'skuls'",
    (*ATTACK, "--stack", "x=mini+none.safetensors"): "'none.safetensors' does not exist",
    (*ATTACK, "--protocol", "mini-smok"): "no protocol named 'mini-smok'. Did you mean",
    (*EVALUATE, "--protocol", "mini-smok"): "no protocol named 'mini-smok'. Did you mean",
    (*EVALUATE, "--stack", "x=minni"): "named 'minni'",
    ("evaluate", "--stage", "judge", "--judge", "nudnet", *RUN): "no judge named 'nudnet'",
    ("export", "mini", "--dtype", "fp61", *OUT): "no dtype named 'fp61'. Did you mean 'fp16'?",
    ("export", "mini", "--patch", "none.safetensors", *OUT): "'none.safetensors' does not exist",
    ("export", "mini", "--out", "old.safetensors"): "old.safetensors",
    ("patch", "info", "none.safetensors"): "'none.safetensors' does not exist",
    ("patch", "extract-lora", "mini", "none.safetensors", *OUT): "does not exist",
    ("triplets", "check", "mini:skulls", "--judge", "minni"): "no judge named 'minni'",
    ("verify", "nowhere"): "nowhere is not a run",
    ("report", "nowhere"): "nowhere is not a run",
}
SCRIPT = """
import contextlib, io, json, sys
from safegen.cli import main

answers = []
for words in json.loads(sys.argv[1]):
    sys.argv, err = ["safegen", *words], io.StringIO()
    with contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            code = end.code
    answers.append([code, err.getvalue(), "torch" in sys.modules])
    if "torch" in sys.modules:
        break
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Return exit code, stderr and whether torch was imported, of every command in order."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "old.safetensors").write_bytes(b"x")
    (folder / "old").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(list(ANSWERS))],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return dict(zip(ANSWERS, json.loads(done.stdout), strict=False))


@pytest.mark.parametrize("words", ANSWERS, ids=" ".join)
def test_a_mistake_is_answered_in_one_line_without_torch(words, answers):
    code, text, has_torch = answers[words]
    assert not has_torch, text
    assert code == 2
    assert ANSWERS[words] in text
    assert text.startswith("safegen: ")
    assert text.count("\n") == 1
