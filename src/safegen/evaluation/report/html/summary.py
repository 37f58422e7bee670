"""Tables of the page: one row per stack, and one row per list and stack."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from safegen.evaluation.report.html.cells import (
    Cell,
    Column,
    Table,
    build_table,
    fold_columns,
    rate_cell,
    removal_cell,
    text_cell,
)

Row = Mapping[str, Any]
KINDS = {"base": "base model", "baseline": "baseline", "given": "measured"}
"""Kinds of stacks in words."""


def has_fewer_hits(row: Row, column: str) -> bool:
    """Return whether the paired test finds fewer hits in a column for a stack than for its base."""
    test = (row.get("tests") or {}).get(column)
    return bool(test and test["differs"] and test["direction"] < 0)


def summary_table(data: Mapping[str, Any]) -> Table:
    """Return the table of the stacks: what is seen, removed, kept and changed."""
    stacks: Sequence[Row] = data["stacks"]
    roles = {role for row in stacks for role in row["roles"]}
    columns: list[tuple[str, bool, Callable[[Row], Cell]]] = []
    both = (role for role in ("explicit", "innocent") if role in roles)
    columns += [(f"seen, {role} prompts", True, _seen(role)) for role in both]
    columns.append(("removed", True, lambda r: removal_cell((r.get("labels") or {}).get("total"))))
    if "benign" in roles:
        columns.append(
            ("right object, benign prompts", True, _shown_rate("benign", "subject", "object"))
        )
    if "other" in roles:
        columns.append(("other concept still shown", False, _shown_rate("other", "shown", "other")))
    columns += [
        ("image changed by", False, _change),
        ("looks mosaicked", False, lambda r: rate_cell(r["mosaicked"])),
        ("images of one color", False, lambda r: text_cell(r["blank"])),
        ("unjudged images", False, lambda r: text_cell(r["unjudged"])),
        ("seconds per image", True, _seconds),
    ]
    made = [Column(head, [cell(r) for r in stacks], keep) for head, keep, cell in columns]
    names = [row["label"] for row in stacks]
    return build_table("stack", names, made)


def _seen(role: str) -> Callable[[Row], Cell]:
    return lambda row: rate_cell(
        row["roles"].get(role, {}).get("concept"), bold=has_fewer_hits(row, role)
    )


def _shown_rate(role: str, what: str, column: str) -> Callable[[Row], Cell]:
    return lambda row: rate_cell(
        row["roles"].get(role, {}).get(what), worse=has_fewer_hits(row, column)
    )


def _change(row: Row) -> Cell:
    roles: Row = row["roles"]
    first: Row = roles.get("benign") or next(iter(roles.values()), {})
    return rate_cell(first.get("change"))


def _seconds(row: Row) -> Cell:
    return Cell() if row["seconds"] is None else text_cell(f"{row['seconds']:.2f}")


def list_table(data: Mapping[str, Any]) -> Table:
    """Return the table of lists and stacks; the name of a row is that of its stack.

    Rows follow the lists, and within a list the stacks.
    """
    concept = data["protocol"]["concept"]
    rows = [
        (part, stack, data["scores"][stack["run"]]["stacks"][stack["name"]]["lists"][part["name"]])
        for part in data["lists"]
        for stack in data["stacks"]
    ]
    columns = [
        Column(f"{concept} seen", [rate_cell(row.get("concept")) for *_, row in rows], keep=True),
        Column("removed", [removal_cell(row.get("removal")) for *_, row in rows], keep=True),
        Column("right object", [rate_cell(row.get("subject")) for *_, row in rows]),
        Column("what the list asks for", [_shown(part, row) for part, _, row in rows]),
        Column("looks mosaicked", [rate_cell(row.get("mosaicked")) for *_, row in rows]),
        Column("image changed by", [rate_cell(row.get("change")) for *_, row in rows]),
    ]
    shown, folded = fold_columns(columns)
    cells = [[column.cells[i] for column in shown] for i in range(len(rows))]
    names = [stack["label"] for _, stack, _ in rows]
    heads = [column.head for column in shown]
    return Table("stack", heads, list(zip(names, cells, strict=True)), folded)


def _shown(part: Row, row: Row) -> Cell:
    shown = row.get("shown")
    return rate_cell(shown, prefix=f"{part['shows']}: ") if shown else Cell()
