"""What a guard found of a picture, as it comes in bit by bit."""

from __future__ import annotations

import math

import pytest

from safegen.guards import make_guard
from safegen.guards.core.base import Finding, Ready
from safegen.guards.core.runner import Work


def found(*findings: Finding) -> tuple[str, dict[str, float]]:
    """Return the action and the scores that are left of findings of one picture, in their order."""
    work = Work(Ready(make_guard("sld", text="skulls")), 1, "cpu", findings=[Finding()])
    for one in findings:
        work.keep([one], [0])
    return work.findings[0].action, dict(work.findings[0].scores)


@pytest.mark.parametrize(
    "later", [Finding("edit", "moved", {"b": 1.0}), Finding(), Finding("edit", "moved", {"a": 0.5})]
)
def test_a_score_that_is_no_number_withholds_whatever_the_guard_says_afterwards(later):
    action, scores = found(Finding("edit", "moved", {"a": math.nan}), later)
    assert action == "withhold"
    assert scores == dict(later.scores)


@pytest.mark.parametrize("first", ["block", "refuse", "withhold"])
def test_what_was_taken_is_not_given_back(first):
    assert found(Finding(first, "seen"), Finding("edit", "moved"))[0] == first


def test_what_was_done_stands_where_nothing_more_is_and_gives_way_where_something_is():
    assert found(Finding("edit", "one"), Finding())[0] == "edit"
    assert found(Finding("edit", "one"), Finding("block", "two"))[0] == "block"
