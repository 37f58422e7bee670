"""Commands on a full disk: one line of error and no partial output.

The disk is a small tmpfs in a mount namespace of its own, which needs no rights; where the system
has none, files are kept small by RLIMIT_FSIZE instead, which fails in the same places. All commands
run in one process, so that torch is imported once.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

from safegen.mini import bundle

DISK = 24 << 20
"""Bytes of the disk."""
SCRIPT = """
import contextlib, io, json, os, sys
from pathlib import Path
from safegen.cli import main

way, disk, cases = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])

def leave(free):
    '''Let `free` bytes fit on the disk, or into a file.'''
    if way == "disk":
        (disk / "ballast").unlink(missing_ok=True)
        room = os.statvfs(disk)
        with (disk / "ballast").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, room.f_bavail * room.f_frsize - free)
    else:
        import resource
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (free, hard))

found = {}
for name, (free, words) in cases.items():
    if free:
        leave(free)
    sys.argv, err, code = ["safegen", *words], io.StringIO(), 0
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        try:
            main()
        except SystemExit as end:
            code = end.code
        except BaseException as error:
            code = repr(error)
    left = [str(p.relative_to(disk)) for p in disk.rglob("*") if p.name != "ballast"]
    found[name] = {"code": code, "err": err.getvalue(), "left": left}
print(json.dumps(found))
"""


def namespace(disk):
    """Return the command prefix that mounts a small private disk, or None if it is unsupported."""
    if not shutil.which("unshare"):
        return None
    mount = f"mount -t tmpfs -o size={DISK} tmpfs '{disk}'"
    words = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    if subprocess.run([*words, mount], capture_output=True, check=False).returncode:
        return None
    return [*words, f'{mount} && exec "$@"', "sh"]


PARTS = [bundle.pipeline_folder() / part for part in ("vae", "text_encoder")]
HALF_A_MODEL = 2 * sum(p.stat().st_size for part in PARTS for p in part.glob("*.safetensors")) + (
    24 << 10
)
"""Bytes written before the tokenizer in fp32, with a small margin."""
FEW = ["--set", "training.updates=1", "--set", "training.batch=1", "--set", "training.warmup=0"]
CASES = {  # bytes that still fit, and the command; all write to DISK
    "generate": (
        4 << 10,
        ["generate", "mini", "--prompt", "a castle", "--steps", "1", "--out", "DISK/pictures"],
    ),
    "generate, the second picture": (
        12 << 10,
        ["generate", "mini", *["--prompt", "a cat"] * 2, "--steps", "1", "--out", "DISK/pictures"],
    ),
    "triplets": (
        4 << 10,
        [
            "triplets",
            "make",
            "--unsafe",
            "UNSAFE",
            "--benign",
            "BENIGN",
            "--judge",
            "mini",
            "--out",
            "DISK/new",
        ],
    ),
    "triplets, in the middle": (
        24 << 10,
        [
            "triplets",
            "make",
            "--unsafe",
            "UNSAFE",
            "--benign",
            "BENIGN",
            "--judge",
            "mini",
            "--out",
            "DISK/new",
        ],
    ),
    "edit, the patch": (
        64 << 10,
        [
            "edit",
            "mini",
            "--triplets",
            "TRIPLETS",
            "--checkpoint-dir",
            "WORK",
            *FEW,
            "--out",
            "DISK/patch.safetensors",
        ],
    ),
    "edit, the checkpoint": (
        64 << 10,
        ["edit", "mini", "--triplets", "TRIPLETS", *FEW, "--out", "DISK/patch.safetensors"],
    ),
    "apply": (
        64 << 10,
        ["export", "mini", "--patch", "PATCH", "--format", "diffusers", "--out", "DISK/model"],
    ),
    "export": (64 << 10, ["export", "mini", "--patch", "PATCH", "--out", "DISK/model.safetensors"]),
    "a LoRA": (
        4 << 10,
        [
            "patch",
            "extract-lora",
            "mini",
            "PATCH",
            "--skip-quality",
            "--out",
            "DISK/lora.safetensors",
        ],
    ),
    "apply, the tokenizer": (
        HALF_A_MODEL,
        ["export", "mini", "--patch", "PATCH", "--format", "diffusers", "--out", "DISK/model"],
    ),
}
LIKE = {
    "ready triplets": (
        0,
        [
            "triplets",
            "make",
            "--unsafe",
            "UNSAFE",
            "--benign",
            "BENIGN",
            "--judge",
            "mini",
            "--out",
            "TRIPLETS",
        ],
    ),
    "ready patch": (0, ["edit", "mini", "--triplets", "TRIPLETS", *FEW, "--out", "PATCH"]),
}
"""Inputs of the cases, written before the disk is full."""
ON_A_DISK_ONLY = {"triplets, in the middle"}
"""Cases in which only the sum of all files exceeds the disk."""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Return the output and the remaining files of every command."""
    folder = tmp_path_factory.mktemp("full")
    disk = folder / "disk"
    disk.mkdir()
    shown = bundle.triplets_folder("skulls")
    for role in ("unsafe", "benign"):
        (folder / role).mkdir()
        for path in sorted((shown / role).iterdir())[:3]:
            shutil.copy(path, folder / role)
    places = {
        "DISK": disk,
        "UNSAFE": folder / "unsafe",
        "BENIGN": folder / "benign",
        "TRIPLETS": folder / "triplets",
    }
    places |= {"WORK": folder / "work", "PATCH": folder / "patch.safetensors"}

    def fill(words):
        for name, place in places.items():
            words = [word.replace(name, str(place)) for word in words]
        return words

    cases = {name: (free, fill(words)) for name, (free, words) in (LIKE | CASES).items()}
    inside = namespace(disk)
    if inside is None and sys.platform == "win32":
        pytest.skip("this system can neither make a small disk nor keep files small")
    if inside is None:
        cases = {name: case for name, case in cases.items() if name not in ON_A_DISK_ONLY}
    words = [
        *(inside or []),
        sys.executable,
        "-c",
        SCRIPT,
        "disk" if inside else "limit",
        str(disk),
        json.dumps(cases),
    ]
    paths = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        words,
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    out = json.loads(done.stdout)
    assert [out[name]["code"] for name in LIKE] == [0, 0], out
    return out


@pytest.mark.parametrize("case", CASES)
def test_a_full_disk_is_one_line_and_leaves_no_partial_output(found, case):
    if case not in found:
        pytest.skip("this system cannot make a small disk")
    answer = found[case]
    assert answer["code"] == 2, answer
    lines = [line for line in answer["err"].splitlines() if line.startswith("safegen: ")]
    assert len(lines) == 1
    assert "cannot be written: " in lines[0]
    assert "No space left on device" in lines[0] or "File too large" in lines[0]
    assert "Traceback" not in answer["err"]
    assert answer["left"] == []
