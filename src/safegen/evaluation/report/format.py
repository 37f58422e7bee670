"""Text of the figures in tables, reports and model cards: percents, intervals and counts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def percent(value: float) -> str:
    """Return a proportion as a percentage with one decimal, without it for a whole number."""
    return f"{100 * value:.1f}".removesuffix(".0") + " %"


def points(value: float) -> str:
    """Return a difference of proportions in percentage points, with its sign."""
    return f"{100 * value:+.1f}"


def interval(rate: Mapping[str, Any]) -> str:
    """Return the interval of a rate in percent: `LOW to HIGH %`."""
    return f"{100 * rate['low']:.1f} to {100 * rate['high']:.1f} %"


def sample_size(rate: Mapping[str, Any]) -> str:
    """Return how many images or prompts a rate is over, and how many of them are unjudged."""
    if "n" not in rate:
        return f"{rate['prompts']} prompts, {rate['k']} drawn"
    unjudged = rate.get("unjudged")
    return f"n = {rate['n']}" + (f", {unjudged} unjudged" if unjudged else "")


def format_rate(rate: Mapping[str, Any] | None, *, n: bool = True, missing: str = "") -> str:
    """Return `VALUE % (LOW to HIGH %; n = N)`, or `missing` where there is no rate.

    Args:
        rate: a rate as plain values, with `value`, `low`, `high` and `n`.
        n: whether to write n.
        missing: text for no rate, or for one without a value.
    """
    if not rate or rate.get("value") is None:
        return missing
    parts = [] if rate["low"] is None else [interval(rate)]
    parts += [sample_size(rate)] if n else []
    return percent(rate["value"]) + (f" ({'; '.join(parts)})" if parts else "")


def format_mean(mean: Mapping[str, Any], digits: int = 1) -> str:
    """Return `VALUE (LOW to HIGH; n = N)` of a mean that is not a proportion."""
    spread = (
        "" if mean["low"] is None else f"{mean['low']:.{digits}f} to {mean['high']:.{digits}f}; "
    )
    return f"{mean['value']:.{digits}f} ({spread}n = {mean['n']})"


def plain_text(text: str) -> str:
    """Return text that stays inside its Markdown table cell and code span."""
    return " ".join(text.split()).replace("|", "\\|").replace("`", "'")


def table_cell(text: str) -> str:
    """Return text that stays inside its Markdown table cell, HTML shown as text."""
    return " ".join(text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").split())
