"""`make_triplets` in a process that is killed."""

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
    "at the first image": ("open", "unfinished/unsafe/0000", 1),
    "in the middle": ("open", "unfinished/censored/0001", 1),
    "at the manifest": ("open", "unfinished/manifest", 1),
    "before the first move": ("os.rename", "unfinished/", 1),
    "between two moves": ("os.rename", "unfinished/", 3),
    "before the last move": ("os.rename", "unfinished/manifest", 1),
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


@pytest.mark.parametrize("moment", sorted(MOMENTS))
def test_a_killed_run_leaves_images_in_the_output_only_and_no_complete_set(
    images: Path, moment: str
) -> None:
    inputs = {p: p.read_bytes() for p in images.rglob("*") if p.is_file()}
    kill(images, MOMENTS[moment])
    assert sorted(p.name for p in images.iterdir()) == ["benign", "out", "unsafe"]
    assert {
        p: p.read_bytes()
        for p in images.rglob("*")
        if p.is_file() and images / "out" not in p.parents
    } == inputs
    for read in (Triplets.load, check_triplets):
        with pytest.raises(
            FileError, match=r"out is incomplete: .*Remove the folder and make the triplets again"
        ):
            read(images / "out")
    with pytest.raises(
        FileError, match=r"out is incomplete: a run was killed or is still working there"
    ):
        make_triplets(
            images / "unsafe", images / "benign", RedJudge(), images / "out", labels=["red"]
        )
    shutil.rmtree(images / "out")
    assert (
        len(
            make_triplets(
                images / "unsafe", images / "benign", RedJudge(), images / "out", labels=["red"]
            ).triplets
        )
        == 3
    )


def test_a_run_killed_after_its_last_move_is_complete(images: Path) -> None:
    kill(images, ("shutil.rmtree", "unfinished", 1))
    assert len(Triplets.load(images / "out")) == 3
    assert check_triplets(images / "out", RedJudge()) == []
