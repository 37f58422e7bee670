"""`make_triplets` in a process that is killed: the same call makes the same triplets afterwards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from red import RedJudge

from safegen.core.errors import FileError
from safegen.data.triplets.check import check_triplets
from safegen.data.triplets.make import make_triplets
from safegen.data.triplets.triplets import Triplets

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")

KILLED = """
import os, signal, sys
from red import RedJudge
from safegen.data.triplets.make import make_triplets

event, word, times = sys.argv[1], sys.argv[2], int(sys.argv[3])

def hook(name, args):
    global times
    if name == event and word in str(args[0]):
        times -= 1
        if times == 0:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(hook)
make_triplets("unsafe", "benign", RedJudge(), "out", labels=["red"])
"""
MOMENTS = {
    "while images are judged": ("open", "unsafe/u1.png", 1),
    "at the first image": ("open", "/unsafe/0000", 1),
    "in the middle": ("open", "/censored/0001", 1),
    "at the manifest": ("open", "/manifest", 1),
    "before the move": ("os.rename", "out.unfinished/", 1),
}


def kill(images: Path, moment: tuple[str, str, int]) -> None:
    """Make triplets in a process that is killed just before the n-th event of a kind."""
    words = [sys.executable, "-c", KILLED, *map(str, moment)]
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    done = subprocess.run(
        words,
        cwd=images,
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of all files below a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize("moment", sorted(MOMENTS))
def test_the_same_call_makes_the_triplets_after_a_kill(
    images: Path, made: Path, moment: str
) -> None:
    unbroken = contents(made)
    inputs = contents(images)
    out = images / "killed" / "out"
    out.parent.mkdir()
    for name in ("unsafe", "benign"):
        (out.parent / name).symlink_to(images / name)
    kill(out.parent, MOMENTS[moment])
    assert sorted(p.name for p in out.parent.iterdir()) == ["benign", "out.unfinished", "unsafe"]
    for read in (Triplets.load, check_triplets):
        with pytest.raises(FileError, match="out does not exist"):
            read(out)
    make_triplets(images / "unsafe", images / "benign", RedJudge(), out, labels=["red"])
    assert contents(out) == unbroken
    assert sorted(p.name for p in out.parent.iterdir()) == ["benign", "out", "unsafe"]
    assert {name: data for name, data in contents(images).items() if name in inputs} == inputs


def test_a_run_killed_after_the_move_is_complete(images: Path) -> None:
    kill(images, ("os.remove", "safegen.lock", 1))
    assert len(Triplets.load(images / "out")) == 3
    assert check_triplets(images / "out", RedJudge()) == []
