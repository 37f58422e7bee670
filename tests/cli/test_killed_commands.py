"""Killed commands: no output looks finished, and the demo resumes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

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
MOMENTS = {
    "generate at the second picture": ("open", "unfinished/.0001.png", 1, GENERATE),
    "generate between two moves": ("os.rename", "unfinished/", 2, GENERATE),
    "generate before the last move": ("os.rename", "unfinished/sheet.png", 1, GENERATE),
    "demo while it generates": ("open", ".png.tmp-", 3, DEMO),
    "demo before its report": ("open", ".report.html.tmp-", 1, DEMO),
}
"""The event before which a command is killed, and the command."""


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Return a directory for each moment at which the command was killed."""
    folder = tmp_path_factory.mktemp("killed")
    paths = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    words = [sys.executable, "-c", SCRIPT, json.dumps(MOMENTS)]
    done = subprocess.run(
        words, cwd=folder, env=paths, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("moment", [name for name in MOMENTS if name.startswith("generate")])
def test_a_killed_generate_leaves_no_output_that_looks_finished(
    killed, safegen, monkeypatch, moment
):
    monkeypatch.chdir(killed / moment)
    assert [p.name for p in (killed / moment).iterdir()] == ["out"]
    assert list((killed / moment).rglob("*.png"))
    assert not (killed / moment / "out" / "sheet.png").exists()
    before = sorted((killed / moment).rglob("*"))
    code, text, err = safegen(*MOMENTS[moment][-1])
    assert (code, text) == (2, "")
    assert err == (
        "safegen: out is incomplete: a run was killed or is still working there. "
        "Remove the folder or choose another.\n"
    )
    assert sorted((killed / moment).rglob("*")) == before


@pytest.mark.parametrize("moment", [name for name in MOMENTS if name.startswith("demo")])
def test_a_killed_demo_resumes(killed, safegen, monkeypatch, moment):
    monkeypatch.chdir(killed / moment)
    assert [p.name for p in (killed / moment).iterdir()] == ["out"]
    out = killed / moment / "out"
    assert not (out / "report.html").exists()
    images = {p: p.read_bytes() for p in out.rglob("*.png")}
    patch = (out / "patches" / "edited.safetensors").stat()
    code, _, err = safegen(*MOMENTS[moment][-1])
    assert code == 0, err
    assert (out / "report.html").exists()
    assert {p: p.read_bytes() for p in images} == images
    assert not list(out.rglob("*.tmp-*"))
    assert patch.st_size > 0
