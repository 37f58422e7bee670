"""Commands write what was named and nothing else: not in the home, not in the temporary folder."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from safegen.mini import bundle

FEW = ["--set", "training.updates=1", "--set", "training.batch=1", "--set", "training.warmup=0"]
PATCH = ["--patch", "patch.safetensors"]
QUICK = {
    "generate": ["generate", "mini", "--prompt", "a castle", "--steps", "1", "--out", "images"],
    "edit": ["edit", "mini", "--triplets", "mini:skulls", *FEW, "--out", "patch.safetensors"],
    "info": ["patch", "info", "patch.safetensors"],
    "export": ["export", "mini", *PATCH, "--out", "model.safetensors"],
    "folder": ["export", "mini", *PATCH, "--format", "diffusers", "--out", "model"],
    "load": ["generate", "model.safetensors", "--prompt", "x", "--steps", "1", "--out", "again"],
    "triplets": [
        *("triplets", "make", "--unsafe", "UNSAFE", "--benign", "BENIGN"),
        *("--judge", "mini", "--out", "triplets"),
    ],
    "evaluate": [
        *("evaluate", "--protocol", "protocol.toml", "--out", "run"),
        *("--stack", "edited=mini+patch.safetensors"),
    ],
    "report": ["report", "run"],
}
"""Commands in the order in which one reads what another wrote."""
WRITTEN = {
    "images",
    "patch.safetensors",
    "patch.safetensors.md",
    "patch.safetensors.log.jsonl",
    "model.safetensors",
    "model.safetensors.md",
    "model",
    "again",
    "triplets",
    "run",
    "protocol.toml",
    "UNSAFE",
    "BENIGN",
}
"""What the commands were told to write, and their inputs."""
PROTOCOL = """
name = "tiny"
concept = "skulls"
seeds = [1]
metrics = ["concept", "removal"]
judge = { name = "mini", labels = ["skulls"] }
generation = { num_inference_steps = 1, batch_size = 4 }
"""
SCRIPT = """
import json, os, sys
from safegen.cli import main

written = set()

def hook(event, args):
    if event == "open" and isinstance(args[0], str) and isinstance(args[2], int):
        if args[2] & (os.O_CREAT | os.O_WRONLY | os.O_RDWR):
            written.add(os.path.abspath(args[0]))
    elif event in ("os.mkdir", "os.symlink") and args[-1] == -1:
        written.add(os.path.abspath(args[0]))
    elif event in ("os.rename", "os.link"):
        written.add(os.path.abspath(args[1]))

sys.addaudithook(hook)
for name, words in json.loads(sys.argv[1]).items():
    sys.argv = ["safegen", *words]
    try:
        main()
    except SystemExit as end:
        assert not end.code, (name, end.code)
print(json.dumps(sorted(written)))
"""
TEMPORARY = re.compile(r"/tmp/(tmp[^/]+(/.*)?|[a-z0-9_]{8}|torchinductor_[^/]+)$")
"""Temporary files of Python, of a model in one file and of torch, which are removed at the end."""


@pytest.fixture
def place(tmp_path):
    """Return folders for home, temporary and working files, with inputs in the last."""
    from safegen.evaluation.samples import hash_prompts, read_prompt_list

    for name in ("home", "tmp", "cwd"):
        (tmp_path / name).mkdir()
    shown = bundle.triplets_folder("skulls")
    for role in ("unsafe", "benign"):
        (tmp_path / "cwd" / role.upper()).mkdir()
        for path in sorted((shown / role).iterdir())[:2]:
            shutil.copy(path, tmp_path / "cwd" / role.upper())
    text = PROTOCOL
    for role, name in (("explicit", "mini:skulls"), ("benign", "mini:benign")):
        digest = hash_prompts(read_prompt_list(name, prompts=2).rows)
        text += f'[[lists]]\nrole = "{role}"\nname = "{name}"\nsource = "{name}"\n'
        text += f'prompts = 2\nsha256 = "{digest}"\n'
    (tmp_path / "cwd" / "protocol.toml").write_text(text)
    return tmp_path


def environment(place: Path) -> dict[str, str]:
    """Return the environment of a user without caches, who is not in a test of ONNX Runtime."""
    drop = re.compile(r"XDG_.*|HF_.*|MPL.*|ORT_.*|CI$|TORCH.*|TEMP$|TMP$")
    return {name: value for name, value in os.environ.items() if not drop.fullmatch(name)} | {
        "HOME": str(place / "home"),
        "TMPDIR": str(place / "tmp"),
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
    }


def run_process(command: list[str], place: Path) -> str:
    """Run a command in the folders of a test, and return its output."""
    done = subprocess.run(
        command,
        cwd=place / "cwd",
        env=environment(place),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def check_places(place: Path) -> None:
    assert sorted(p.relative_to(place).as_posix() for p in (place / "home").rglob("*")) == []
    assert sorted(p.relative_to(place).as_posix() for p in (place / "tmp").rglob("*")) == []
    assert {p.name for p in (place / "cwd").iterdir()} <= WRITTEN
    assert not [p for p in (place / "cwd").rglob("*") if "unfinished" in p.name]


@pytest.mark.skipif(os.name != "posix", reason="folders of POSIX")
def test_commands_write_in_the_place_that_was_named(place):
    output = run_process([sys.executable, "-c", SCRIPT, json.dumps(QUICK)], place)
    written = json.loads(output.splitlines()[-1])
    here = str(place / "cwd")
    elsewhere = [path for path in written if not path.startswith((here, "/dev/", "/proc/"))]
    assert [p for p in elsewhere if not TEMPORARY.search(p)] == []
    check_places(place)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("strace"), reason="strace is not installed")
def test_no_system_call_of_a_command_writes_elsewhere(place):
    """Native libraries write without Python's knowledge."""
    calls = re.compile(r"O_CREAT|O_WRONLY|O_RDWR|^(\d+ +)?(mkdir|rename|link|symlink|mknod)")
    for name, words in QUICK.items():
        trace = place / "trace"
        command = ["strace", "-f", "-qq", "-s", "4096", "-e", "trace=%file", "-o", str(trace)]
        run_process([*command, sys.executable, "-m", "safegen", *words], place)
        lines = trace.read_text(errors="replace").splitlines()
        done_calls = [line for line in lines if calls.search(line) and " = -1 " not in line]
        paths = {path for line in done_calls for path in re.findall(r'"([^"]*)"', line)}
        here = ("/dev/", "/proc/", str(place / "cwd"))
        elsewhere = [p for p in paths if p.startswith("/") and not p.startswith(here)]
        assert [p for p in elsewhere if not TEMPORARY.search(p)] == [], name
        check_places(place)
