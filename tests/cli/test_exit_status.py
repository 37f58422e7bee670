"""Exit statuses of the command line, as docs/reference/cli.inc lists them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from safegen.core.errors import InterruptedRunError, SafegenError, UserError

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "cli.inc"
SCRIPT = """
import os, signal
from safegen.cli import main
from safegen.cli.info import show

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it

def stop(name, kind):
    os.kill(os.getpid(), getattr(signal, name))

show.find_kinds = stop
main()
"""


def test_the_page_lists_every_exit_status():
    rows = re.findall(r"^\| ([\d, ]+) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    listed = {int(number) for row in rows for number in row.split(", ")}
    assert listed == {0, 1, 2, 3, 130, 141, 143}


@pytest.mark.parametrize(
    ("error", "status", "says"),
    [
        (UserError("x must be 1"), 2, "safegen: x must be 1"),
        (SafegenError("it diverged"), 1, "safegen: it diverged"),
        (OSError(28, "No space left on device", "f"), 1, "'f' cannot be used: No space"),
        (MemoryError("out of memory"), 1, "memory does not suffice"),
        (InterruptedRunError("stopped after update 2 of 30. More"), 130, "after update 2 of 30"),
        (KeyboardInterrupt(), 130, "stopped"),
    ],
)
def test_an_error_decides_the_exit_status(safegen, monkeypatch, error, status, says):
    def fail(*_):
        raise error

    monkeypatch.setattr("safegen.cli.info.show.find_kinds", fail)
    code, out, err = safegen("show", "esd")
    assert (code, out) == (status, "")
    assert says in err
    assert err.count("\n") == 1


def test_a_finished_command_and_a_wrong_option_have_their_statuses(safegen):
    assert safegen("list")[0] == 0
    assert safegen("list", "--no-such-option")[0] == 2
    assert safegen("no-such-command")[0] == 2


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_decides_the_exit_status(name, status):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, "show", name],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("error", [KeyboardInterrupt(), InterruptedRunError("stopped. More.")])
def test_a_stopped_demo_says_the_command_that_resumes_it(safegen, monkeypatch, tmp_path, error):
    def stop(*_, **__):
        raise error

    monkeypatch.setattr("safegen.workflows.demo.run_demo", stop)
    code, _, err = safegen("demo", "--fast", "--out", tmp_path / "a demo")
    assert code == 130
    assert err.startswith("safegen: stopped. Finished work is in ")
    assert err.endswith(f"Resume with: safegen demo --fast --out '{tmp_path}/a demo'\n")


def test_a_stopped_training_says_the_option_that_resumes_it(safegen, monkeypatch, tmp_path):
    def stop(*_, **__):
        raise InterruptedRunError("stopped after update 1 of 2. More.")

    monkeypatch.setattr("safegen.workflows.edit.apply_edit", stop)
    words = ["edit", "mini", "--triplets", "mini:skulls", "--out", tmp_path / "p.safetensors"]
    code, _, err = safegen(*words)
    assert code == 130
    assert "stopped after update 1 of 2. Finished work is in" in err
    assert err.endswith("p.safetensors --resume\n")
