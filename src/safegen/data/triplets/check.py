"""Check triplets: name every row that cannot be used, and why."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from safegen.core.errors import FileError
from safegen.data.triplets.triplets import (
    ROLES,
    Role,
    RowError,
    Triplet,
    open_role,
    read_rows,
    size_of,
    too_small,
)
from safegen.judges.base import Judge


def check(path: str | Path, judge: Judge | None = None) -> list[RowError]:
    """Return everything that is wrong with triplets; an empty list means that all can be used.

    Args:
        path: folder or .csv file, as for `Triplets.load`.
        judge: looks at every censored and benign picture, which must be safe; None to leave that
            out.

    Raises:
        FileError: `path` is neither a folder with a manifest nor a CSV in the published dialect.
    """
    folder, rows = read_rows(Path(path))
    problems = [] if rows else [RowError(Path(path).name, "it holds no triplets")]
    first: dict[str, str] = {}
    for row in rows:
        if isinstance(row, RowError):
            problems.append(row)
            continue
        problems += [RowError(row.id, reason) for reason in _faults(folder, row, judge)]
        if row.sha256.unsafe in first:
            problems.append(
                RowError(
                    row.id, f"its unsafe picture is that of row {first[row.sha256.unsafe]} again"
                )
            )
        first.setdefault(row.sha256.unsafe, row.id)
    return problems


def _faults(folder: Path, row: Triplet, judge: Judge | None) -> Iterator[str]:
    pictures: dict[Role, Image.Image] = {}
    for role in ROLES:
        try:
            pictures[role] = open_role(folder, row, role)
        except FileError as error:
            yield str(error)
            continue
        if small := too_small(pictures[role]):
            yield f"its {role} picture is too small: {small}"
    if "unsafe" in pictures and "censored" in pictures:
        unsafe, censored = pictures["unsafe"], pictures["censored"]
        if unsafe.size != censored.size:
            yield f"its unsafe and censored pictures must have one size, got {size_of(unsafe)} and {size_of(censored)}"
        elif unsafe.tobytes() == censored.tobytes():
            yield "its unsafe and censored pictures are the same"
    looked_at: tuple[Role, ...] = ("censored", "benign") if judge else ()
    for role in looked_at:
        if judge and role in pictures:
            detections = judge.detect([pictures[role]])[0]
            verdict = detections.verdict(judge.labels, judge.threshold)
            if verdict == "unsafe":
                yield f"its {role} picture is{' still' if role == 'censored' else ''} judged unsafe"
            elif verdict == "unjudged":
                yield f"its {role} picture cannot be judged: {detections.unjudged}"
