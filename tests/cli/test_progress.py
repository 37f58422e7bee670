"""The rate and the time left beside a bar."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from safegen.cli import options as common
from safegen.cli.options import Pace, show_progress


def test_pictures_that_come_a_batch_at_a_time_are_as_fast_as_their_batches():
    pace = Pace()
    pace.see(0, 0.0)
    assert pace.per_second is None
    for batch in range(1, 4):
        for picture in range(32):
            pace.see(32 * (batch - 1) + picture + 1, 16.0 * batch + picture / 1000)
        assert pace.per_second == pytest.approx(2.0, rel=0.01)


def test_what_lay_there_already_says_nothing_of_the_speed():
    pace = Pace()
    for done in range(0, 320, 32):
        pace.see(done, done / 1e4)
    pace.see(320, 16.0)
    assert pace.per_second == pytest.approx(2.0, rel=0.01)


def test_a_steady_pace_is_told_from_its_first_second_on():
    pace = Pace()
    for i in range(100):
        pace.see(i, i / 20)
        if i / 20 > 0.6:
            assert pace.per_second == pytest.approx(20.0)


def test_batches_rarer_than_what_is_looked_back_on_have_a_pace_too():
    pace = Pace()
    for batch in range(5):
        pace.see(8 * batch, 100.0 * batch)
    assert pace.per_second == pytest.approx(0.08)


def test_a_pace_forgets_a_slow_start():
    pace = Pace()
    for second in range(300):
        pace.see(second, float(second))
    for second in range(300, 401):
        pace.see(300 + 10 * (second - 300), float(second))
    assert pace.per_second == pytest.approx(10.0)


def test_the_bar_says_the_rate_and_the_time_left(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(common, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setenv("COLUMNS", "120")
    with show_progress() as progress:
        progress("drawing", 0, 96)
        for picture in range(32):
            now[0] = 16 + picture / 1e6  # so two a second all but a little
            progress("drawing", picture + 1, 96)
    said = capsys.readouterr().err
    assert "32/96" in said
    assert "2.00/s" in said
    assert "left 0:00:33" in said


def test_a_stage_that_is_done_or_has_nothing_to_do_leaves_no_time(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "120")
    with show_progress() as progress:
        progress("drawing", 5, 5)
        progress("judging", 0, 0)
    said = capsys.readouterr().err
    assert said.count("left 0:00:00") >= 2
    assert "/s" not in said
