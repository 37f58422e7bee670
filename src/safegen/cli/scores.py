"""The table of scores that `evaluate`, `score`, `demo` and `attack` print."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safegen.cli.console import echo

MIN_WIDTH = 80
"""Columns of a table where the screen is narrower, or there is none."""


def print_run(folder: Path) -> None:
    """Print the scores of a run, the seconds that it took and the path of its report."""
    from safegen.evaluation.report.data import seconds_by_stage
    from safegen.evaluation.report.page import PAGE
    from safegen.evaluation.run.folder import SCORES, Run
    from safegen.evaluation.run.scores import read_scores

    print_scores(read_scores(folder / SCORES))
    seconds = seconds_by_stage(Run.open(folder))
    echo("seconds: " + ", ".join(f"{stage} {value:.1f}" for stage, value in seconds.items()))
    echo(f"report: {(folder / PAGE).resolve()}")


def print_scores(scores: Mapping[str, Any]) -> None:
    """Print a run's scores: a block for each prompt list, a row for each stack."""
    from safegen.evaluation.run.score_table import score_lines

    width = max(MIN_WIDTH, shutil.get_terminal_size((MIN_WIDTH, 24)).columns)
    for line in [*score_lines(scores, width), ""]:
        echo(line)
