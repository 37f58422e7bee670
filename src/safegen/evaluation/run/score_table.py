"""Table of scores as text: a block for each prompt list, a row for each stack."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from safegen.core.text import escape_control

HEADS = (
    "",
    "n",
    "seen %",
    "removed %",
    "object %",
    "asked for %",
    "mosaic %",
    "changed %",
    "blank",
)


def score_lines(scores: Mapping[str, Any]) -> list[str]:
    """Return the lines of a run's scores: rates in percent with n and 95 % intervals."""
    protocol, stacks = scores["protocol"], scores["stacks"]
    threshold = protocol["decides"]["judge"]["threshold"]
    lists = next(iter(stacks.values()))["lists"]
    blocks = {
        f"{part} ({row['role']})": [
            [f"  {name}", *_cells(stack["lists"][part])] for name, stack in stacks.items()
        ]
        for part, row in lists.items()
    }
    blocks = {
        escape_control(title): [list(map(escape_control, row)) for row in block]
        for title, block in blocks.items()
    }
    rows = [HEADS, *(row for block in blocks.values() for row in block)]
    used = [i for i in range(len(HEADS)) if any(row[i] for row in rows[1:])]
    widths = {i: max(len(row[i]) for row in rows) for i in used}
    table = ["  ".join(HEADS[i].ljust(widths[i]) for i in used)]
    for title, block in blocks.items():
        table.append(title)
        table += ["  ".join(row[i].ljust(widths[i]) for i in used) for row in block]
    return [
        f"{protocol['name']}, protocol {protocol['id']}, 95 % intervals in brackets",
        f"judge {scores['judge']}, threshold {threshold}",
        "",
        *(line.rstrip() for line in table),
    ]


def _cells(row: dict[str, Any]) -> list[str]:
    """Return the figures of a stack on a list, in the order of `HEADS`."""
    seen, shows = row.get("concept"), row.get("shows")
    attribute = _number(row.get("shown"))
    return [
        str(seen["n"] if seen else 0),
        _interval(seen),
        _interval(row.get("removal")),
        _number(row.get("subject")),
        f"{shows} {attribute}" if attribute else "",
        _number(row.get("mosaicked")),
        _number(row.get("change")),
        str(row["blank"]["hits"] or ""),
    ]


def _number(rate: dict[str, Any] | None) -> str:
    return f"{100 * rate['value']:.1f}".removesuffix(".0") if rate else ""


def _interval(rate: dict[str, Any] | None) -> str:
    if not rate or rate["low"] is None:  # one prompt has no spread
        return _number(rate)
    return f"{_number(rate)} ({100 * rate['low']:.0f}-{100 * rate['high']:.0f})"
