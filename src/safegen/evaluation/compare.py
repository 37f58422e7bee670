"""Comparison of protocols and of other trees of plain values."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from safegen.core.errors import ConfigError

MAX_GAPS = 8
"""Most differences in a message."""
MAX_TEXT = 200
"""Most characters of a value in a difference."""


def same_protocol(scores: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the protocol id that all scores share.

    Args:
        scores: the content of `scores.json` by run name.

    Raises:
        ConfigError: there are no scores, or they differ in protocol, judge or weights.
    """
    if not scores:
        raise ConfigError("scores to compare must be at least one, got none")
    (first, a), *others = scores.items()
    for name, b in others:
        one, two = (
            {**s["protocol"]["decides"], "judge id": s["judge"], "weights": s["weights"]}
            for s in (a, b)
        )
        if gaps := differences(one, two):
            raise ConfigError(
                f"{first} (protocol {a['protocol']['id']}) and {name} (protocol "
                f"{b['protocol']['id']}) cannot be compared. They differ in {join_gaps(gaps)}"
            )
    return str(a["protocol"]["id"])


def join_gaps(gaps: Sequence[str]) -> str:
    """Return the first differences on one line, and how many more there are.

    Values that both sides have come before those that one side lacks.
    """
    more = [f"and {len(gaps) - MAX_GAPS} more"] if len(gaps) > MAX_GAPS else []
    ranked = sorted(gaps, key=lambda gap: ": null and " in gap or gap.endswith(" and null"))
    return "; ".join([*ranked[:MAX_GAPS], *more])


def differences(a: object, b: object, where: str = "") -> list[str]:
    """Return the differences between two trees of plain values, as `path: this and that`."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        keys = sorted({*a, *b}, key=str)
        return [
            gap
            for key in keys
            for gap in differences(a.get(key), b.get(key), f"{where}.{key}" if where else str(key))
        ]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [
            gap
            for i, pair in enumerate(zip(a, b, strict=True))
            for gap in differences(*pair, where=f"{where}[{i}]")
        ]
    if a == b and isinstance(a, bool) == isinstance(b, bool):
        return []
    return [f"{where}: {_short(a)} and {_short(b)}"]


def _short(value: object) -> str:
    """Return a value as JSON, its middle left out if it is long."""
    text = json.dumps(value)
    return text if len(text) <= MAX_TEXT else f"{text[: MAX_TEXT // 2]}...{text[-MAX_TEXT // 2 :]}"
