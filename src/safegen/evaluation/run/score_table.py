"""Table of scores as text: a block for each prompt list, a row for each stack."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from safegen.core.text import escape_control
from safegen.metrics.judge_error import describe_agreement

LINE = 80
"""Columns of the text below a table of unknown width."""
HEADS = (
    "",
    "n",
    "seen %",
    "removed %",
    "object %",
    "asked for %",
    "all right %",
    "mosaic %",
    "changed %",
    "blank",
    "unjudged",
)

MAX_LABEL = 32
"""Most columns of a stack's name beside its figures; a longer one has a line of its own."""


def score_lines(scores: Mapping[str, Any], width: int | None = None) -> list[str]:
    """Return the lines of a run's scores: rates in percent with n and 95 % intervals.

    The last lines say what is known of the judge's precision and recall.

    Args:
        scores: scores of the run.
        width: columns of the screen. In a wider table, figures that are equal in all rows are said
            once; if that does not suffice, it is split, so that no figure is broken. Default: one
            table.
    """
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
    used = [i for i in range(1, len(HEADS)) if any(row[i] for row in rows[1:])]
    widths = {i: max(len(row[i]) for row in rows) for i in (0, *used)}
    table: list[str] = []
    if width is not None and sum(widths.values()) + 2 * len(used) > width:
        same = {i: rows[1][i] for i in used if len({row[i] for row in rows[1:]}) == 1}
        used = [i for i in used if i not in same] or used
        if same:
            table = ["the same in every row: " + ", ".join(f"{HEADS[i]} {same[i]}" for i in same)]
    for columns in _split(used, widths, width):
        table += ["", *_block_lines(blocks, columns, widths)]
    return [
        f"{protocol['name']}, protocol {protocol['id']}, 95 % intervals in brackets",
        f"judge {scores['judge']}, threshold {threshold}",
        *(line.rstrip() for line in table),
        "",
        *_judge_errors(scores, width or LINE),
    ]


def _judge_errors(scores: Mapping[str, Any], width: int) -> list[str]:
    """Return what is known of the errors of the judge that every rate rests on."""
    rule = scores["protocol"]["decides"]["judge"]
    text = describe_agreement(scores["judge"], rule["labels"], rule["threshold"])
    return textwrap.wrap(escape_control(text), width, break_long_words=False)


def _split(used: Sequence[int], widths: Mapping[int, int], width: int | None) -> list[list[int]]:
    """Return the columns of each table, as many as fit beside the names."""
    label = widths[0] if widths[0] <= MAX_LABEL else 2
    tables: list[list[int]] = []
    room = 0
    for column in used:
        if not tables or (width is not None and widths[column] + 2 > room):
            tables.append([])
            room = (width or 0) - label
        tables[-1].append(column)
        room -= widths[column] + 2
    return tables


def _block_lines(
    blocks: Mapping[str, Sequence[Sequence[str]]], columns: Sequence[int], widths: Mapping[int, int]
) -> Iterator[str]:
    """Yield the heading and the rows of a table."""
    label = widths[0] if widths[0] <= MAX_LABEL else 2
    yield "  ".join([" " * label, *(HEADS[i].ljust(widths[i]) for i in columns)])
    for title, block in blocks.items():
        yield title
        for row in block:
            name = row[0].ljust(label)
            if len(name) > label:
                yield name
                name = " " * label
            yield "  ".join([name, *(row[i].ljust(widths[i]) for i in columns)])


def _cells(row: dict[str, Any]) -> list[str]:
    """Return the figures of a stack on a list, in the order of `HEADS`."""
    seen, shows = row.get("concept"), row.get("shows")
    attribute = _number(row.get("shown"))
    unjudged = seen["unjudged"] if seen else row["images"] if "concept" in row else 0
    return [
        str(seen["n"] if seen else 0),
        _interval(seen),
        _interval(row.get("removal")),
        _number(row.get("subject")),
        f"{shows} {attribute}" if attribute else "",
        _interval((row.get("composition") or {}).get("all")),
        _number(row.get("mosaicked")),
        _number(row.get("change")),
        str(row["blank"]["hits"] or ""),
        str(unjudged or ""),
    ]


def _number(rate: dict[str, Any] | None) -> str:
    return f"{100 * rate['value']:.1f}".removesuffix(".0") if rate else ""


def _interval(rate: dict[str, Any] | None) -> str:
    if not rate or rate["low"] is None:  # one prompt has no spread
        return _number(rate)
    return f"{_number(rate)} ({100 * rate['low']:.0f}-{100 * rate['high']:.0f})"
