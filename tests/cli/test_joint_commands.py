"""Commands in several processes: printed once, written once, one exit status."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from safegen.patches.patch import Patch
from tests.processes import run_processes

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks")
BRIEF = ("updates=2", "batch=2", "accumulation=1", "warmup=0", "precision=fp32")
"""Settings of a training of two updates."""


@pytest.fixture
def command(tiny_folder, triplets, tmp_path):
    """Return a function that runs `safegen edit` in two processes: statuses, stdout and stderr."""

    def run(*arguments, name="edit", before=lambda rank: None):
        out, err = tmp_path / "stdout", tmp_path / "stderr"
        for path in (out, err):
            path.write_text("")

        def job(rank):
            for number, path in ((1, out), (2, err)):
                os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
            sys.stdout, sys.stderr = (os.fdopen(n, "w", closefd=False) for n in (1, 2))
            sys.argv = ["safegen", name, str(tiny_folder), *map(str, arguments)]
            before(rank)
            from safegen.cli import main

            try:
                main()
            except SystemExit as error:
                return error.code

        statuses = run_processes(2, job)
        return statuses, out.read_text(), err.read_text()

    settings = [word for setting in BRIEF for word in ("--set", f"training.{setting}")]
    run.safegen = ["--triplets", triplets.folder, *settings, "--preset", "mini"]
    return run


def test_an_edit_is_printed_and_written_once(command, tmp_path):
    out = tmp_path / "p.safetensors"
    statuses, printed, status = command(*command.safegen, "--out", out)
    assert statuses == [0, 0], status
    assert printed.count(f"{out}: ") == printed.count("\n") == 1
    assert status.splitlines()[0] == "2 processes"
    assert len(set(status.splitlines())) == len(status.splitlines())
    files = {path.name for path in tmp_path.iterdir()} - {"stdout", "stderr"}
    assert files == {"p.safetensors", "p.safetensors.md", "p.safetensors.log.jsonl"}
    log = out.with_name(out.name + ".log.jsonl").read_text().splitlines()
    assert (len(log), Patch.load(out).metadata.to_json()["processes"]) == (2, 2)


def test_an_error_before_the_training_is_printed_once(command, tmp_path):
    out = tmp_path / "p.safetensors"
    out.write_text("mine")
    statuses, printed, status = command(*command.safegen, "--out", out)
    assert (statuses, printed) == ([2, 2], "")
    assert status.count("safegen: ") == 1
    assert "already exists" in status


def test_a_usage_error_is_printed_once(command):
    statuses, _, status = command("--no-such-option")
    assert statuses == [2, 2]
    assert status.count("safegen: ") == status.count("\n") == 1


def test_jobs_that_cannot_be_shared_are_refused(command, tmp_path):
    statuses, _, status = command(*command.safegen, "--out", tmp_path / "p.safetensors", "--plan")
    assert statuses == [2, 2]
    assert status.count("--plan must be run by one process, got 2") == 1
    statuses, _, status = command(
        "--concept", "skulls", "--out", tmp_path / "safe.safetensors", name="make-safe"
    )
    assert statuses == [2, 2]
    assert status.count("make-safe must be run by one process, got 2") == 1


@pytest.mark.slow
def test_torchrun_trains_stops_and_resumes(tiny_folder, triplets, tmp_path):
    """Two real processes, SIGTERM at one of them, and the same command with --resume."""
    out = tmp_path / "p.safetensors"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    command += ["-m", "safegen", "edit", tiny_folder, "--triplets", triplets.folder]
    command += [
        "--set",
        "training.updates=100",
        "--set",
        "training.batch=2",
        "--set",
        "training.checkpoint_every=10",
        "--out",
        out,
    ]
    checkpoints = out.with_name(out.name + ".checkpoints")
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while running.poll() is None and not (checkpoints / "log.jsonl").exists():
        pass
    running.send_signal(signal.SIGTERM)
    _, status = running.communicate(timeout=60)
    assert status.count("Resume with: torchrun --nproc-per-node 2 -m safegen edit ") == 1
    printed = subprocess.check_output([*command, "--resume"], text=True, timeout=120)
    assert printed.count(f"{out}: ") == printed.count("\n") == 1
