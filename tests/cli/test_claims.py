"""Two processes at one output, and runs that are refused or diverge."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from safegen.core.errors import DivergedError
from safegen.edits.training.trainer import Trainer
from safegen.mini import bundle

HOLD = """
import json, sys
from contextlib import ExitStack
from pathlib import Path
from safegen.core.files import claim, claim_folder

with ExitStack() as stack:
    for kind, out in json.loads(sys.argv[1]):
        stack.enter_context({"file": claim, "folder": claim_folder}[kind](Path(out)))
    print("ready", flush=True)
    sys.stdin.readline()
"""
CLAIMED = [
    ("file", "out"),
    ("file", "out.safetensors"),
    ("file", "card.safetensors.md"),
    ("folder", "checkpoints"),
    ("folder", "run"),
]
TRAINED = ["edit", "mini", "--triplets", "mini:skulls", "--set", "training.updates=3"]
COMMANDS = {
    "generate": (["generate", "mini", "--prompt", "x", "--out", "out"], "out"),
    "triplets": (
        ["triplets", "make", "--unsafe", "UNSAFE", "--judge", "mini", "--out", "out"],
        "out",
    ),
    "export": (["export", "mini", "--out", "out.safetensors"], "out.safetensors"),
    "a card": (["export", "mini", "--out", "card.safetensors"], "card.safetensors.md"),
    "a folder": (["export", "mini", "--format", "diffusers", "--out", "out"], "out"),
    "edit": ([*TRAINED, "--out", "out.safetensors"], "out.safetensors"),
    "checkpoints": (
        [*TRAINED, "--out", "new.safetensors", "--checkpoint-dir", "checkpoints"],
        "checkpoints",
    ),
    "evaluate": (
        ["evaluate", "--protocol", "mini-smoke", "--stack", "mini", "--out", "run"],
        "run",
    ),
    "demo": (["demo", "--out", "run"], "run"),
}
"""Commands, and the output that another process has claimed."""


@pytest.fixture(scope="module")
def claimed(tmp_path_factory):
    """Yield a folder in which another process has claimed the outputs of all commands."""
    folder = tmp_path_factory.mktemp("claimed")
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, json.dumps(CLAIMED)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    yield folder
    process.communicate("\n", timeout=60)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("name", COMMANDS)
def test_a_second_process_is_told_before_the_work(claimed, safegen, monkeypatch, name):
    def load(*_: object, **__: object) -> None:
        raise AssertionError("long work before the claim")

    for loader in ("safegen.models.loading.load", "safegen.stack_loader.StackLoader.model"):
        monkeypatch.setattr(loader, load)
    monkeypatch.chdir(claimed)
    before = sorted(claimed.rglob("*"))
    words, out = COMMANDS[name]
    unsafe = str(bundle.triplets_folder("skulls") / "unsafe")
    code, text, err = safegen(*(word.replace("UNSAFE", unsafe) for word in words))
    assert (code, text) == (2, "")
    lines = [line for line in err.splitlines() if line.startswith("safegen: ")]
    assert len(lines) == 1
    assert lines[0].endswith(
        f"{out} is being written by another process. Wait for it, or choose another path."
    )
    assert sorted(claimed.rglob("*")) == before


FEW = ["--set", "training.updates=3", "--set", "training.warmup=0", "--set", "training.batch=1"]


@pytest.mark.parametrize(
    "words",
    [
        [*TRAINED, *FEW, "--set", "training.checkpoint_every=1", "--out", "new/p.safetensors"],
        pytest.param(
            ["demo", *FEW, "--set", "training.checkpoint_every=1", "--out", "new/run"],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["edit", "demo"],
)
def test_a_training_that_diverges_leaves_nothing(tmp_path, safegen, monkeypatch, words):
    update = Trainer._training_update

    def diverge(self: Trainer) -> object:
        if self.update == 1:
            assert list(tmp_path.rglob("checkpoint.safetensors"))
            raise DivergedError("the loss is nan at update 2")
        return update(self)

    monkeypatch.setattr(Trainer, "_training_update", diverge)
    monkeypatch.chdir(tmp_path)
    code, _, err = safegen(*words)
    assert code == 1
    assert err.endswith("safegen: the loss is nan at update 2\n")
    assert list(tmp_path.iterdir()) == []
