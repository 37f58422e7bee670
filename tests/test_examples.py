"""The examples work as they are, with two processes; merged, their runs have no problems."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from typer.main import get_command

from safegen.cli.main import app

EXAMPLES = Path(__file__).parent.parent / "examples"
MERGE = "safegen merge part-1 part-2 --out run"


def run(command: str, folder: Path, **variables: str) -> None:
    """Run a command of the shell, with `safegen` and `torchrun` of this environment."""
    paths = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    code = os.pathsep.join(filter(None, sys.path))
    own = {"PATH": paths, "PYTHONPATH": code, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=os.environ | own | variables,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def torchrun(folder):
    script = shlex.quote(str(EXAMPLES / "torchrun_shards.py"))
    run(f"torchrun --nproc-per-node 2 {script} && {MERGE}", folder)


def slurm(folder):
    script = shlex.quote(str(EXAMPLES / "slurm_shards.sh"))
    for task in "12":
        run(f"bash {script}", folder, SLURM_ARRAY_TASK_ID=task, SLURM_ARRAY_TASK_COUNT="2")
    run(MERGE, folder)


def xargs(folder):
    run(f"bash {shlex.quote(str(EXAMPLES / 'xargs_shards.sh'))}", folder)


def skypilot(folder):
    job = yaml.safe_load((EXAMPLES / "skypilot_shards.yaml").read_text())
    for shard in ("1/2", "2/2"):
        run(job["run"], folder, **(job["envs"] | {"SHARD": shard, "FOLDER": str(folder)}))
    run(MERGE, folder)


@pytest.mark.slow
@pytest.mark.parametrize("example", [torchrun, slurm, xargs, skypilot])
def test_an_example_makes_a_whole_run_of_two_shards(example, tmp_path):
    from safegen.evaluation.run.folder import SCORES, Run
    from safegen.evaluation.verify import verify

    example(tmp_path)
    merged = Run.open(tmp_path / "run")
    assert verify(merged) == []
    assert (merged.folder / SCORES).exists()
    assert len(list(merged.sample_records())) == len(merged.samples) > 0


def test_torchrun_leaves_all_gpus_visible_since_each_process_takes_its_own_of_them():
    assert "CUDA_VISIBLE_DEVICES" not in (EXAMPLES / "torchrun_shards.py").read_text()


def test_every_example_is_run_and_short():
    tested = {"torchrun_shards.py", "slurm_shards.sh", "xargs_shards.sh", "skypilot_shards.yaml"}
    assert {path.name for path in EXAMPLES.iterdir()} == tested
    assert all(len(path.read_text().splitlines()) <= 20 for path in EXAMPLES.iterdir())


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*_shards.*")), ids=lambda path: path.name)
def test_the_commands_of_an_example_have_options_that_exist(path):
    text = path.read_text().replace("\\\n", " ")
    commands = re.findall(r"safegen (evaluate|merge)\b([^\n&]*)", text)
    runner = CliRunner(env={"COLUMNS": "300"})
    assert commands
    for name, rest in commands:
        shown = runner.invoke(get_command(app), [name, "--help"]).output
        for option in re.findall(r"--[a-z-]+", rest):
            assert option in shown, (name, option)
