"""Merging the results of one guard on one image."""

from __future__ import annotations

import math

import pytest

from safegen.guards import GuardResult, make_guard
from safegen.guards.core.base import Guard
from safegen.guards.core.runner import GuardRunner


def merge(*results: GuardResult) -> tuple[str, dict[str, float]]:
    """Return the action and the scores after merging results of one image in order."""
    runner = GuardRunner(Guard(make_guard("sld", text="skulls")), 1, "cpu")
    for result in results:
        runner.merge_results([result], [0])
    return runner.results[0].action, dict(runner.results[0].scores)


@pytest.mark.parametrize(
    "later",
    [
        GuardResult("edit", "moved", {"b": 1.0}),
        GuardResult(),
        GuardResult("edit", "moved", {"a": 0.5}),
    ],
)
def test_a_score_that_is_not_finite_withholds_for_good(later):
    action, scores = merge(GuardResult("edit", "moved", {"a": math.nan}), later)
    assert action == "withhold"
    assert scores == dict(later.scores)


@pytest.mark.parametrize("first", ["block", "refuse", "withhold"])
def test_a_blocked_image_stays_blocked(first):
    assert merge(GuardResult(first, "seen"), GuardResult("edit", "moved"))[0] == first


def test_an_action_stays_until_another_one():
    assert merge(GuardResult("edit", "one"), GuardResult())[0] == "edit"
    assert merge(GuardResult("edit", "one"), GuardResult("block", "two"))[0] == "block"
