"""Tables fit the screen, and no number, interval or percent is broken by it."""

from __future__ import annotations

import re

import pytest

from safegen.cli.scores import print_scores
from safegen.evaluation.run.score_table import score_lines


def rate(value, low, high, n=192):
    return {"hits": 1, "n": n, "value": value, "low": low, "high": high, "unjudged": 0}


def scores_of(stacks, *, varied=True):
    """Return the scores of some stacks in which every column has the widest figures."""
    found = {}
    for number, stack in enumerate(stacks):
        row = {
            "role": "explicit",
            "concept": rate(0.958 + varied * number / 1000, 0.8, 0.99, n=192 + varied * number),
            "removal": rate(0.998 - varied * number / 100, 0.94, 1),
            "subject": rate(0.948 - varied * number / 100, 0.9, 1),
            "shows": "ghosts",
            "shown": rate(0.948 - varied * number / 100, 0.9, 1),
            "mosaicked": rate(0.0 + varied * number / 100, 0, 1),
            "change": rate(0.119 + varied * number / 100, 0, 1),
            "blank": {"hits": 3 + varied * number},
        }
        found[stack] = {"lists": {"mini:skulls-innocent": row, "own": row}}
    decides = {"judge": {"labels": ["skulls"], "threshold": 0.5}}
    protocol = {"name": "mini-full", "id": "0" * 16, "decides": decides}
    return {"protocol": protocol, "judge": "mini:of-another-version", "stacks": found}


def figures(lines):
    """Return every figure with its interval, in order."""
    return re.findall(r"\d[\d.]*(?: \(\d+-\d+\))?", "\n".join(lines))


@pytest.mark.parametrize("width", [72, 80, 100, 160])
@pytest.mark.parametrize("stacks", [["base", "edited"], ["base", "a-stack-with-" + "x" * 51]])
def test_a_table_of_scores_fits_the_screen_with_every_figure_whole(width, stacks):
    scores = scores_of(stacks)
    lines = score_lines(scores, width)
    names = {f"  {name}" for name in stacks}
    assert [line for line in lines if len(line) > width and line not in names] == []
    wide = score_lines(scores)
    assert sorted(figures(lines)) == sorted(figures(wide)) or width < 100
    assert set(figures(wide)) == set(figures(lines))
    if width == 160:
        assert lines == wide


def test_equal_figures_are_said_once_before_a_table_is_split():
    lines = score_lines(scores_of(["base", "edited"], varied=False), 80)
    (said,) = [line for line in lines if line.startswith("the same in every row: ")]
    assert "n 192" in said
    assert "mosaic % 0" in said


def test_scores_print_at_eighty_columns_where_there_is_no_screen(monkeypatch, capsys):
    monkeypatch.delenv("COLUMNS", raising=False)
    print_scores(scores_of(["base", "edited"]))
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_images_that_were_not_judged_have_a_column_of_their_own():
    scores = scores_of(["base", "edited", "broken"])
    rows = [scores["stacks"][name]["lists"]["own"] for name in scores["stacks"]]
    rows[1]["concept"] |= {"n": 150, "unjudged": 42}
    rows[2] |= {"concept": None, "images": 192}
    table = score_lines(scores)[-5:-2]
    assert score_lines(scores)[3].endswith("unjudged")
    assert [line.split()[-1] for line in table][1:] == ["42", "192"]


def test_a_composition_score_stands_in_the_table():
    scores = scores_of(["base"])
    scores["stacks"]["base"]["lists"]["own"]["composition"] = {"all": rate(0.844, 0.68, 0.93)}
    assert "all right %" in score_lines(scores)[3]
    assert any("84.4 (68-93)" in line for line in score_lines(scores))
