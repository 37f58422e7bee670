"""The command line as a user meets it."""

from __future__ import annotations

import pytest
import torch

from safegen.cli import main as run


@pytest.fixture
def safegen(monkeypatch, capsys):
    """Run a command; give its exit code, stdout and stderr. Its `--threads` ends with the test: sums round by their number."""
    threads = torch.get_num_threads()

    def call(*words):
        monkeypatch.setattr("sys.argv", ["safegen", *map(str, words)])
        code = 0
        try:
            run()
        except SystemExit as end:
            code = end.code or 0
        text = capsys.readouterr()
        return code, text.out, text.err

    yield call
    torch.set_num_threads(threads)
