"""A making of triplets that is killed outright, when nothing can be cleared away any more."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from red import RedJudge

from safegen.core.errors import FileError
from safegen.data.triplets.check import check
from safegen.data.triplets.make import make
from safegen.data.triplets.triplets import Triplets

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")

KILLED = """
import os, signal, sys
from red import RedJudge
from safegen.data.triplets.make import make

event, word, times = sys.argv[1], sys.argv[2], int(sys.argv[3])

def hook(name, args):
    global times
    if name == event and word in str(args[0]):
        times -= 1
        if times == 0:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(hook)
make("unsafe", "benign", RedJudge(), "out", labels=["red"])
"""
MOMENTS = {
    "at the first picture": ("open", "unfinished/unsafe/0000", 1),
    "in the middle": ("open", "unfinished/censored/0001", 1),
    "at the manifest": ("open", "unfinished/manifest", 1),
    "before the first move": ("os.rename", "unfinished/", 1),
    "between two moves": ("os.rename", "unfinished/", 3),
    "before the last move": ("os.rename", "unfinished/manifest", 1),
}


def kill(pictures: Path, moment: tuple[str, str, int]) -> None:
    """Make triplets in a process of its own that is killed at a moment: just before the n-th such event."""
    words = [sys.executable, "-c", KILLED, *map(str, moment)]
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    done = subprocess.run(
        words,
        cwd=pictures,
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.mark.parametrize("moment", sorted(MOMENTS))
def test_a_killed_run_leaves_unsafe_pictures_in_the_named_folder_only_and_never_a_finished_set(
    pictures: Path, moment: str
) -> None:
    inputs = {p: p.read_bytes() for p in pictures.rglob("*") if p.is_file()}
    kill(pictures, MOMENTS[moment])
    assert sorted(p.name for p in pictures.iterdir()) == ["benign", "out", "unsafe"]
    assert {
        p: p.read_bytes()
        for p in pictures.rglob("*")
        if p.is_file() and pictures / "out" not in p.parents
    } == inputs
    for read in (Triplets.load, check):
        with pytest.raises(
            FileError, match=r"out holds unfinished triplets: .*; remove it and make them again"
        ):
            read(pictures / "out")
    with pytest.raises(
        FileError,
        match=r"out is incomplete: a run was killed or is still working there",
    ):
        make(pictures / "unsafe", pictures / "benign", RedJudge(), pictures / "out", labels=["red"])
    shutil.rmtree(pictures / "out")
    assert (
        len(
            make(
                pictures / "unsafe",
                pictures / "benign",
                RedJudge(),
                pictures / "out",
                labels=["red"],
            ).triplets
        )
        == 3
    )


def test_a_run_killed_after_its_last_move_has_finished(pictures: Path) -> None:
    kill(pictures, ("shutil.rmtree", "unfinished", 1))
    assert len(Triplets.load(pictures / "out")) == 3
    assert check(pictures / "out", RedJudge()) == []
