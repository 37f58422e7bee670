"""Scripts in benchmarks/ that need a large machine run at a small size, too."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_script_for_an_accelerator_runs_on_a_cpu_with_a_tiny_model(tmp_path):
    rows = ["bf16 x 2", "fp32 x 1", "math", "bf16 weights x 1", "channels_last"]
    rows.append("gradient checkpointing")
    command = [sys.executable, ROOT / "benchmarks" / "gpu.py", "--tiny", "--rows", ",".join(rows)]
    subprocess.run([*command, "--out", tmp_path / "gpu.json"], check=True)
    found = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert sorted(row["row"] for row in found) == sorted(rows)
    assert all(row["share"] > 0 and row["seconds"] > 0 for row in found), found
