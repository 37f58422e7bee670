"""Fixture that runs the command line."""

from __future__ import annotations

import pytest

from safegen.cli import main as run


@pytest.fixture
def safegen(monkeypatch, capsys):
    """Return a function that runs a command and returns exit code, stdout and stderr."""

    def call(*words):
        monkeypatch.setattr("sys.argv", ["safegen", *map(str, words)])
        code = 0
        try:
            run()
        except SystemExit as end:
            code = end.code or 0
        text = capsys.readouterr()
        return code, text.out, text.err

    return call
