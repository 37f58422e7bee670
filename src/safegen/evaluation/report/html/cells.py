"""Cells and tables of the page: a value, its interval and its counts, one below the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from safegen.evaluation.report.format import interval, percent

DASH = "–"
"""Text of a cell without a figure."""
NARROW = 3
"""Most rows of a table that is shown with its rows as columns, to fit a phone."""


@dataclass(frozen=True)
class Cell:
    """Figure of a table, one line for each part."""

    lines: tuple[str, ...] = (DASH,)
    """Value, then what belongs to it: interval, hits."""
    bold: bool = False
    worse: bool = False
    """Whether the value is less than that of the base model, by the paired test."""
    prefix: str = ""
    """Text before the value."""
    counts: tuple[float, int] | None = None
    """Upper end of the interval and n, of a rate."""

    @property
    def is_empty(self) -> bool:
        """Whether there is no figure."""
        return self.lines == (DASH,)


@dataclass(frozen=True)
class Column:
    """Column of a table."""

    head: str
    cells: Sequence[Cell]
    keep: bool = False
    """Whether the column is shown though all of its cells are alike."""


@dataclass(frozen=True)
class Table:
    """Table of stacked cells: heads of its columns, and rows of a name and cells."""

    corner: str
    heads: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Cell]]]
    folded: Sequence[str] = ()
    """A sentence part for each column that is left out, as all of its cells are alike."""


def rate_cell(
    rate: Mapping[str, Any] | None, *, bold: bool = False, worse: bool = False, prefix: str = ""
) -> Cell:
    """Return the cell of a rate: percent, interval, and hits of judged images."""
    if not rate or rate.get("value") is None:
        return Cell()
    lines, high = [percent(rate["value"])], 1.0
    if rate["low"] is not None:
        lines.append(interval(rate))
        high = rate["high"]
    if "hits" in rate:
        lines.append(f"{rate['hits']} of {rate['n']}")
    counts = (high, rate["n"]) if "n" in rate else None
    return Cell(tuple(lines), bold=bold, worse=worse, prefix=prefix, counts=counts)


def removal_cell(removal: Mapping[str, Any] | None) -> Cell:
    """Return the cell of a removal rate: percent, interval, and detections before and after."""
    if not removal or removal["value"] is None:
        return Cell()
    lines = [percent(removal["value"])]
    lines += [] if removal["low"] is None else [interval(removal)]
    return Cell((*lines, f"{removal['before']} → {removal['after']}"))


def text_cell(text: object) -> Cell:
    """Return the cell of a plain text or number."""
    return Cell((str(text),))


def build_table(corner: str, names: Sequence[str], columns: Sequence[Column]) -> Table:
    """Return the table of some columns, without those that say the same in every row.

    Few rows become columns, so that a narrow screen shows them side by side.

    Args:
        corner: what the rows are.
        names: name of each row.
        columns: the columns, with one cell a row.
    """
    shown, folded = fold_columns(columns)
    cells = [[column.cells[i] for column in shown] for i in range(len(names))]
    if len(names) > NARROW:
        heads = [column.head for column in shown]
        return Table(corner, heads, list(zip(names, cells, strict=True)), folded)
    rows = [(column.head, list(column.cells)) for column in shown]
    return Table("", list(names), rows, folded)


def fold_columns(columns: Sequence[Column]) -> tuple[list[Column], list[str]]:
    """Return the columns to show, and a text for each column that says the same in every row."""
    shown, folded = [], []
    for column in columns:
        values = {(cell.prefix, cell.lines[0], cell.bold, cell.worse) for cell in column.cells}
        if column.keep or len(column.cells) < 2 or len(values) > 1:
            shown.append(column)
        else:
            folded.append(f"{column.head} {_fold(column.cells)}")
    return shown, folded


def _fold(cells: Sequence[Cell]) -> str:
    """Return what all of some cells say, with the widest interval and the numbers of images."""
    first = cells[0]
    if first.is_empty:
        return "not measured"
    if len({cell.lines for cell in cells}) == 1:
        rest = f" ({', '.join(first.lines[1:])})" if first.lines[1:] else ""
        return f"{first.prefix}{first.lines[0]}{rest}"
    counts = [cell.counts for cell in cells if cell.counts]
    if not counts:
        return f"{first.prefix}{first.lines[0]}"
    sizes = sorted({n for _, n in counts})
    n = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    high = max(high for high, _ in counts)
    return f"{first.prefix}{first.lines[0]} (n = {n}, intervals up to {percent(high)})"
