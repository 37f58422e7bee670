"""What a guard found of a picture, as it comes in bit by bit."""

from __future__ import annotations

import math

import pytest

from safegen.guards import GuardResult, make_guard
from safegen.guards.core.base import Guard
from safegen.guards.core.runner import GuardRunner


def found(*findings: GuardResult) -> tuple[str, dict[str, float]]:
    """Return the action and the scores that are left of findings of one picture, in their order."""
    work = GuardRunner(Guard(make_guard("sld", text="skulls")), 1, "cpu")
    for one in findings:
        work.merge_results([one], [0])
    return work.results[0].action, dict(work.results[0].scores)


@pytest.mark.parametrize(
    "later",
    [
        GuardResult("edit", "moved", {"b": 1.0}),
        GuardResult(),
        GuardResult("edit", "moved", {"a": 0.5}),
    ],
)
def test_a_score_that_is_no_number_withholds_whatever_the_guard_says_afterwards(later):
    action, scores = found(GuardResult("edit", "moved", {"a": math.nan}), later)
    assert action == "withhold"
    assert scores == dict(later.scores)


@pytest.mark.parametrize("first", ["block", "refuse", "withhold"])
def test_what_was_taken_is_not_given_back(first):
    assert found(GuardResult(first, "seen"), GuardResult("edit", "moved"))[0] == first


def test_what_was_done_stands_where_nothing_more_is_and_gives_way_where_something_is():
    assert found(GuardResult("edit", "one"), GuardResult())[0] == "edit"
    assert found(GuardResult("edit", "one"), GuardResult("block", "two"))[0] == "block"
