"""Text of the figures in tables, reports and model cards: percents, intervals and counts."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Mapping
from typing import Any

from safegen.core.text import one_line


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


def markdown_text(text: str) -> str:
    """Return text as one line that Markdown shows as it is: no markup, HTML, link or new cell."""
    text = html.escape(one_line(text), quote=False)
    text = re.sub(r"([\\`*_\[\]|~])", r"\\\1", text)
    return re.sub(r"^(\d*)([-+#=.)])(?=[-#=\s]|$)", r"\1\\\2", text)  # a heading, a list, a rule


def markdown_code(text: str) -> str:
    """Return text as a Markdown code span that stays inside its table cell."""
    text = one_line(text).replace("|", "\\|").replace("`", "'")
    return f"`{text}`" if text else ""


def split_cell(cell: str) -> list[str]:
    """Return a cell's number and each part in brackets or after a semicolon, for one line each."""
    return [part for part in re.split(r" \(|\)[;,]? ?|; ", cell) if part]


def _attack(success: Mapping[str, Any]) -> str:
    counts = [f"{success[key]} {key}" for key in ("refused", "unjudged") if success[key]]
    per_prompt = f"{success['n_per_prompt'] or 'differing numbers of'} a prompt"
    return "; ".join([f"{format_rate(success['asr'])}, {per_prompt}", *counts])


def _clip(score: Mapping[str, Any]) -> str:
    difference = score.get("to_base")
    if not difference:
        return format_mean(score["mean"])
    low, high = difference["low"], difference["high"]
    spread = "" if low is None else f" ({low:+.1f} to {high:+.1f})"
    return f"{format_mean(score['mean'])}; minus base {difference['value']:+.1f}{spread}"


def _distance(distance: Mapping[str, Any]) -> str:
    return f"{distance['value']:.3g} (n = {distance['n']}, {distance['n_reference']})"


def _composition(score: Mapping[str, Any]) -> str:
    parts = ", ".join(
        f"{part} {percent(score[part]['value'])}" for part in ("object", "background", "attribute")
    )
    return f"{format_rate(score['all'])}; {parts}"


METRICS: dict[str, tuple[str, Callable[[Mapping[str, Any]], str]]] = {
    "asr": ("attack success, per image", _attack),
    "asr_any": ("attack success, any of N", _attack),
    "inappropriate": ("inappropriate probability", format_rate),
    "expected_maximum": ("expected maximum", format_rate),
    "over_censoring": ("over-censored", format_rate),
    "coherence": ("coherent", format_rate),
    "coherence_kept": ("coherence kept", format_rate),
    "composition": ("composed right", _composition),
    "clip_score": ("CLIP score, 100 cos", _clip),
    "lpips": ("LPIPS to base", lambda mean: format_mean(mean, 3)),
    "fid_to_base": ("FID to base", _distance),
    "kid_to_base": ("KID to base", _distance),
    "cmmd_to_base": ("CMMD to base", _distance),
}
"""Heading and formatter of the metrics beside the summary table."""
