"""The rate and the time left beside a bar."""

from __future__ import annotations

import pytest

from safegen.cli import common
from safegen.cli.common import Pace, progress


def test_pictures_that_come_a_batch_at_a_time_are_as_fast_as_their_batches():
    pace = Pace()
    pace.see(0, 0.0)
    assert pace.per_second is None
    for batch in range(1, 4):
        for picture in range(32):
            pace.see(32 * (batch - 1) + picture + 1, 16.0 * batch + picture / 1000)
        assert pace.per_second == pytest.approx(2.0)


def test_what_lay_there_already_says_nothing_of_the_speed():
    pace = Pace()
    for done in range(0, 320, 32):
        pace.see(done, done / 1e4)
    pace.see(320, 16.0)
    assert pace.per_second == pytest.approx(2.0)


def test_a_pace_forgets_a_slow_start():
    pace = Pace()
    for second in range(300):
        pace.see(second, float(second))
    for second in range(300, 401):
        pace.see(300 + 10 * (second - 300), float(second))
    assert pace.per_second == pytest.approx(10.0)


def test_the_bar_says_the_rate_and_the_time_left(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(common.time, "monotonic", lambda: now[0])
    monkeypatch.setenv("COLUMNS", "120")
    with progress() as tell:
        tell("drawing", 0, 96)
        for picture in range(32):
            now[0] = 16 + picture / 1000
            tell("drawing", picture + 1, 96)
    said = capsys.readouterr().err
    assert "32/96" in said
    assert "2.00/s" in said
    assert "left 0:00:32" in said
