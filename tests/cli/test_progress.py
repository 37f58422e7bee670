"""The rate and the time left of a progress bar."""

from __future__ import annotations

import os
import re
from types import SimpleNamespace

import pytest

from safegen.cli import progress as progress_module
from safegen.cli.progress import Pace, show_progress


def test_images_of_a_batch_count_as_one_update():
    pace = Pace()
    pace.update(0, 0.0)
    assert pace.per_second is None
    for batch in range(1, 4):
        for image in range(32):
            pace.update(32 * (batch - 1) + image + 1, 16.0 * batch + image / 1000)
        assert pace.per_second == pytest.approx(2.0, rel=0.01)


def test_items_from_an_earlier_run_do_not_count():
    pace = Pace()
    for done in range(0, 320, 32):
        pace.update(done, done / 1e4)
    pace.update(320, 16.0)
    assert pace.per_second == pytest.approx(2.0, rel=0.01)


def test_a_steady_rate_is_estimated_after_one_second():
    pace = Pace()
    for i in range(100):
        pace.update(i, i / 20)
        if i / 20 > 0.6:
            assert pace.per_second == pytest.approx(20.0)


def test_batches_longer_than_the_window_have_a_rate():
    pace = Pace()
    for batch in range(5):
        pace.update(8 * batch, 100.0 * batch)
    assert pace.per_second == pytest.approx(0.08)


def test_the_rate_forgets_a_slow_start():
    pace = Pace()
    for second in range(300):
        pace.update(second, float(second))
    for second in range(300, 401):
        pace.update(300 + 10 * (second - 300), float(second))
    assert pace.per_second == pytest.approx(10.0)


def test_the_bar_shows_the_rate_and_the_time_left(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(progress_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setenv("COLUMNS", "120")
    with show_progress() as progress:
        progress("generating", 0, 96)
        for image in range(32):
            now[0] = 16 + image / 1e6  # just under two per second
            progress("generating", image + 1, 96)
    text = capsys.readouterr().err
    assert "32/96" in text
    assert "2.00/s" in text
    assert "left 0:00:33" in text


def test_a_stage_that_begins_again_has_its_own_rate_and_total(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(progress_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setenv("COLUMNS", "120")
    with show_progress() as progress:
        for done, total in ((0, 10), (10, 10), (0, 20), (4, 20)):
            progress("attacking", done, total)
            now[0] += 2
    text = capsys.readouterr().err
    assert "4/20" in text
    assert "2.00/s" in text
    assert "left 0:00:08" in text


def test_a_reader_that_is_gone_does_not_stop_the_work(monkeypatch):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w", buffering=1) as stderr:
        monkeypatch.setattr("sys.stderr", stderr)
        with show_progress() as progress:
            progress("generating", 1, 1)
        done = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), write)  # what is buffered goes there
    assert done


def test_no_stage_prints_nothing(capsys):
    with show_progress():
        pass
    assert capsys.readouterr().err == ""


def test_a_finished_or_empty_stage_has_no_time_left(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "120")
    with show_progress() as progress:
        progress("generating", 5, 5)
        progress("judging", 0, 0)
    text = capsys.readouterr().err
    assert text.count("left 0:00:00") >= 2
    assert "/s" not in text


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_a_bar_never_wraps(monkeypatch, capsys, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TTY_COMPATIBLE", "1")  # rich takes stderr for a terminal
    monkeypatch.setenv("TTY_INTERACTIVE", "1")
    monkeypatch.setenv("TERM", "xterm")
    now = [0.0]
    monkeypatch.setattr(progress_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    with show_progress() as progress:
        for done in (0, 400, 99_999):
            now[0] += 1000
            progress("generating: a-stack-with-a-very-long-name", done, 100_000)
            progress("editing", done, 100_000, "unsafe 12 %, reward 0.53")
    lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().err).splitlines()
    assert any("99999/100000" in line for line in lines)
    assert any("━" in line for line in lines)
    assert [line for line in lines if len(line) > columns] == []


def test_without_a_terminal_a_line_is_printed_every_ten_seconds(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(progress_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    with show_progress() as progress:
        for done in range(36):
            progress("editing", done, 100)
            now[0] += 1
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == ["0/100", "10/100", "20/100", "30/100", "35/100"]
    assert lines[1] == "editing  10/100  1.00/s  left 0:01:30"


def test_quiet_shows_no_progress(monkeypatch, capsys):
    monkeypatch.setattr(progress_module.VERBOSITY, "quiet", True)
    with show_progress() as progress:
        progress("editing", 1, 2)
    assert capsys.readouterr().err == ""
