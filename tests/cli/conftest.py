"""Fixture that runs the command line."""

from __future__ import annotations

import re

import pytest

from safegen.cli import main as run

MODEL_LINE = r"(?m)^.+: UNet2DConditionModel of .+ M weights, .+ on .+\n"


@pytest.fixture
def safegen(monkeypatch, capsys):
    """Return a function that runs a command and returns exit code, stdout and stderr.

    The lines that say which model is loaded are left out of stderr.
    """

    def call(*words):
        monkeypatch.setattr("sys.argv", ["safegen", *map(str, words)])
        code = 0
        try:
            run()
        except SystemExit as end:
            code = end.code or 0
        text = capsys.readouterr()
        return code, text.out, re.sub(MODEL_LINE, "", text.err)

    return call
