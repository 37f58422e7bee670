"""Killed commands: no output looks finished, and the same command ends the work."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
from PIL import Image

pytestmark = pytest.mark.skipif(
    not hasattr(signal, "SIGKILL") or not hasattr(os, "fork"),
    reason="this system has no SIGKILL or no fork",
)

SCRIPT = """
import json, os, signal, sys
import torch

torch.set_num_threads(1)
import safegen.workflows.demo  # once for all
from safegen.cli import main

def run(case, event, word, times, words):
    def hook(name, args):
        nonlocal times
        if name == event and word in str(args[0]):
            times -= 1
            if times == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    os.mkdir(case)
    os.chdir(case)
    sys.addaudithook(hook)
    sys.argv = ["safegen", *words]
    main()

for case, moment in json.loads(sys.argv[1]).items():
    child = os.fork()
    if not child:
        try:
            run(case, *moment)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (case, status)
"""
GENERATE = ["generate", "mini", *["--prompt", "a castle"] * 2, "--steps", "1", "--out", "out"]
DEMO = [
    "demo",
    "--fast",
    "--prompts",
    "1",
    "--set",
    "training.updates=1",
    "--set",
    "training.warmup=0",
    "--out",
    "out",
]
EXPORT = ["export", "mini", "--out", "out.safetensors"]
RELEARN = ["attack", "relearn", "--stack", "mini", "--concept", "skulls", "--limit", "1"]
RELEARN += ["--steps", "1", "--set", "updates=[26]", "--set", "images_per_update=1"]
RELEARN += ["--set", "rank=1", "--set", "images=../pictures", "--out", "out"]
MOMENTS = {
    "generate at the second picture": ("open", "/0001.png", 1, GENERATE),
    "generate before the move": ("os.rename", "out.unfinished/", 1, GENERATE),
    "export at the card": ("open", "out.safetensors.md", 2, EXPORT),
    "export before the move": ("os.link", "out.safetensors.unfinished/", 1, EXPORT),
    "export between the file and its card": ("os.link", "out.safetensors.md.unf", 1, EXPORT),
    "demo while it generates": ("os.link", ".png", 4, DEMO),
    "demo before its report": ("os.rename", "/report.html", 1, DEMO),
    "relearn after a checkpoint": ("os.link", "finetuned-26.safetensors", 1, RELEARN),
}
"""The event before which a command is killed, and the command."""


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Return a directory for each moment at which the command was killed."""
    folder = tmp_path_factory.mktemp("killed")
    (folder / "pictures").mkdir()
    Image.new("RGB", (64, 64), "red").save(folder / "pictures" / "a.png")
    (folder / "pictures" / "a.txt").write_text("a red wall", encoding="utf-8")
    paths = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    words = [sys.executable, "-c", SCRIPT, json.dumps(MOMENTS)]
    done = subprocess.run(
        words, cwd=folder, env=paths, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("moment", [name for name in MOMENTS if name.startswith("generate")])
def test_the_same_command_generates_after_a_kill(killed, safegen, monkeypatch, moment):
    monkeypatch.chdir(killed / moment)
    assert [p.name for p in (killed / moment).iterdir()] == ["out.unfinished"]
    assert list((killed / moment).rglob("*.png"))
    code, text, err = safegen(*MOMENTS[moment][-1])
    assert code == 0, err
    assert text == "2 images and sheet.png in out\n"
    assert [p.name for p in (killed / moment).iterdir()] == ["out"]
    names = sorted(p.name for p in (killed / moment / "out").iterdir())
    assert names == ["0000.png", "0001.png", "sheet.png"]


@pytest.mark.parametrize("moment", ["export at the card", "export before the move"])
def test_the_same_command_exports_after_a_kill(killed, safegen, monkeypatch, moment):
    monkeypatch.chdir(killed / moment)
    names = ["out.safetensors.md.unfinished", "out.safetensors.unfinished"]
    assert sorted(p.name for p in (killed / moment).iterdir()) == names
    code, _, err = safegen(*EXPORT)
    assert code == 0, err
    names = ["out.safetensors", "out.safetensors.md"]
    assert sorted(p.name for p in (killed / moment).iterdir()) == names


def test_a_killed_export_leaves_a_whole_file_or_none(killed, safegen, monkeypatch):
    folder = killed / "export between the file and its card"
    monkeypatch.chdir(folder)
    code, _, err = safegen(*EXPORT)
    assert code == 2
    assert "out.safetensors already exists" in err
    whole = killed / "export before the move" / "out.safetensors"
    if not whole.exists():
        monkeypatch.chdir(whole.parent)
        assert safegen(*EXPORT)[0] == 0
    assert (folder / "out.safetensors").stat().st_size == whole.stat().st_size


@pytest.mark.parametrize("moment", [name for name in MOMENTS if name.startswith("demo")])
def test_a_killed_demo_resumes(killed, safegen, monkeypatch, moment):
    monkeypatch.chdir(killed / moment)
    assert [p.name for p in (killed / moment).iterdir()] == ["out"]
    out = killed / moment / "out"
    assert not (out / "report.html").exists()
    images = {p: p.read_bytes() for p in (out / "images").rglob("*.png")}
    patch = (out / "patches" / "edited.safetensors").stat()
    code, _, err = safegen(*MOMENTS[moment][-1])
    assert code == 0, err
    assert (out / "report.html").exists()
    assert {p: p.read_bytes() for p in images} == images
    assert not list(out.rglob("*.unfinished"))
    assert patch.st_size > 0


def test_a_killed_relearning_attack_resumes_its_training(killed, safegen, monkeypatch):
    monkeypatch.chdir(killed / "relearn after a checkpoint")
    files = killed / "relearn after a checkpoint" / "out" / "attack"
    log, checkpoint = files / "finetuned" / "log.jsonl", files / "finetuned/checkpoint.safetensors"
    done = log.read_text().splitlines()
    assert len(done) == 25
    assert checkpoint.exists()
    assert not (files / "finetuned-26.safetensors").exists()
    code, text, err = safegen(*RELEARN)
    assert code == 0, err
    assert "finetuned-26" in text
    assert log.read_text().splitlines()[:25] == done
    assert not checkpoint.exists()
    records = [
        json.loads(line) for line in (files.parent / "attack.jsonl").read_text().splitlines()
    ]
    assert sum(record["cost"]["denoiser"] for record in records) == 2 * 26
