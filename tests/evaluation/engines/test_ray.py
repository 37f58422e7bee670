"""Runs on Ray: with two actors, killed actors or a killed driver, the bytes are one process's."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from contextlib import suppress

import psutil
import pytest
import torch

from safegen.evaluation.run.folder import SAMPLES, Run
from safegen.evaluation.verify import verify
from tests.evaluation.test_run import contents, kill_and_resume

pytest.importorskip("ray.exceptions")  # a folder of tests has the name ray

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
RAY = ("--engine", "ray", "--workers", "2")


@pytest.fixture(autouse=True)
def import_path(monkeypatch):
    """Let the command and its actors import this checkout."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))


def start(out, quick, patch, *words):
    command = [sys.executable, "-m", "safegen", "evaluate", "--protocol", str(quick)]
    command += ["--stack", "mini", "--stack", f"calm=mini+{patch}", "--out", str(out)]
    command += ["--threads", str(torch.get_num_threads()), *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def actors(process):
    """Return the processes of the actors of a command."""
    found = []
    with suppress(psutil.Error):
        for child in psutil.Process(process.pid).children(recursive=True):
            with suppress(psutil.Error):
                if child.cmdline() and child.cmdline()[0].startswith("ray::BatchActor"):
                    found.append(child)
    return found


def test_two_actors_give_the_bytes_of_one_process(finished, quick, patch_file, tmp_path):
    process = start(tmp_path / "run", quick, patch_file, *RAY)
    text, _ = process.communicate(timeout=600)
    assert process.returncode == 0, text
    assert contents(tmp_path / "run") == contents(finished)
    assert verify(Run.open(tmp_path / "run")) == []


def test_actors_killed_at_random_change_no_byte(finished, quick, patch_file, tmp_path):
    out, dice, killed = tmp_path / "run", random.Random(5), 0
    process = start(out, quick, patch_file, *RAY)
    lines = sorted(dice.sample(range(0, 44, 4), 3))  # of samples.jsonl, which has 48
    while process.poll() is None and lines:
        path = out / SAMPLES
        if path.exists() and path.read_bytes().count(b"\n") >= lines[0] and actors(process):
            dice.choice(actors(process)).kill()
            killed += 1
            lines.pop(0)
        time.sleep(0.05)
    text, _ = process.communicate(timeout=600)
    assert process.returncode == 0, text
    assert killed == 3
    assert contents(out) == contents(finished)


def test_a_killed_driver_leaves_no_actor_and_resumes(finished, quick, patch_file, tmp_path):
    out = tmp_path / "run"
    assert kill_and_resume(out, quick, patch_file, 2, seed=3, more=RAY) == 2
    assert contents(out) == contents(finished)
    names = [p.info["cmdline"] or [""] for p in psutil.process_iter(["cmdline"])]
    assert not [name for name in names if name[0].startswith("ray::BatchActor")]


def test_an_address_without_a_cluster_is_said_in_one_line(quick, patch_file, tmp_path):
    process = start(tmp_path / "run", quick, patch_file, *RAY, "--address", "127.0.0.1:1")
    text, _ = process.communicate(timeout=600)
    assert process.returncode == 2
    assert "address must be that of a Ray cluster that answers" in text.splitlines()[-1]
    assert "Traceback" not in text
