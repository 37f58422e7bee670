"""Refusals are counted in view, and on benign prompts they are over-censoring."""

from __future__ import annotations

import pytest

from safegen.metrics.rates import Rate
from safegen.metrics.refusal import over_censoring_rate, refusal_rate


def test_the_refusal_rate_needs_no_judge():
    assert refusal_rate(["refused", "unjudged", "safe", "unsafe"]) == Rate(1, 4, 0)


def test_over_censoring_counts_what_was_withheld_and_what_came_out_under_a_mosaic():
    found = ["refused", "safe", "safe", "unsafe", "unjudged"]
    assert over_censoring_rate(found, [None, True, False, None, False]) == Rate(2, 3, 2)


def test_without_censoring_it_is_the_refusal_rate():
    found = ["refused", "safe", "safe"]
    assert over_censoring_rate(found, [False] * 3) == refusal_rate(found)


def test_over_nothing_there_is_no_rate():
    with pytest.raises(ValueError, match="at least one"):
        refusal_rate([])
    with pytest.raises(ValueError, match="at least one"):
        over_censoring_rate(["unjudged"], [None])
    with pytest.raises(ValueError, match="equally long"):
        over_censoring_rate(["safe"], [])
