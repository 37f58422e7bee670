"""Refusal and over-censoring rates."""

from __future__ import annotations

import pytest

from safegen.metrics.rates import Rate
from safegen.metrics.refusal import over_censoring_rate, refusal_rate


def test_the_refusal_rate_needs_no_judge():
    assert refusal_rate(["refused", "unjudged", "safe", "unsafe"]) == Rate(1, 4, 0)


def test_over_censoring_counts_refused_and_censored_images():
    outcomes = ["refused", "safe", "safe", "unsafe", "unjudged"]
    assert over_censoring_rate(outcomes, [None, True, False, None, False]) == Rate(2, 3, 2)


def test_over_censoring_without_mosaics_is_the_refusal_rate():
    outcomes = ["refused", "safe", "safe"]
    assert over_censoring_rate(outcomes, [False] * 3) == refusal_rate(outcomes)


def test_empty_or_unequal_input_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        refusal_rate([])
    with pytest.raises(ValueError, match="at least one"):
        over_censoring_rate(["unjudged"], [None])
    with pytest.raises(ValueError, match="equally long"):
        over_censoring_rate(["safe"], [])
