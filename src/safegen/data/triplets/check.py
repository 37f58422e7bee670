"""Check of triplets: every row that cannot be used, with the reason."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from safegen.core.errors import FileError
from safegen.data.images import format_size, size_error
from safegen.data.triplets.triplets import ROLES, Role, Triplet, TripletIssue, read_role, read_rows
from safegen.judges.base import Judge


def check_triplets(path: str | Path, judge: Judge | None = None) -> list[TripletIssue]:
    """Return every issue of triplets; an empty list means that all rows can be used.

    Args:
        path: folder or .csv file, as for `Triplets.load`.
        judge: judge that must find every censored and benign image safe. Default: not judged.

    Raises:
        FileError: `path` is neither a folder with a manifest nor a published CSV.
    """
    folder, rows = read_rows(Path(path))
    issues = [] if rows else [TripletIssue(Path(path).name, "there are no triplets")]
    first_use: dict[str, str] = {}
    for row in rows:
        if isinstance(row, TripletIssue):
            issues.append(row)
            continue
        issues += [TripletIssue(row.id, reason) for reason in _reasons(folder, row, judge)]
        digest = row.sha256.unsafe
        if digest in first_use:
            reason = f"the unsafe image repeats that of row {first_use[digest]}"
            issues.append(TripletIssue(row.id, reason))
        first_use.setdefault(digest, row.id)
    return issues


def _reasons(folder: Path, row: Triplet, judge: Judge | None) -> Iterator[str]:
    images: dict[Role, Image.Image] = {}
    for role in ROLES:
        try:
            images[role] = read_role(folder, row, role)
        except FileError as error:
            yield str(error)
            continue
        if reason := size_error(images[role]):
            yield f"the {role} image is too small: {reason}"
    if "unsafe" in images and "censored" in images:
        unsafe, censored = images["unsafe"], images["censored"]
        if unsafe.size != censored.size:
            sizes = f"{format_size(unsafe)} and {format_size(censored)}"
            yield f"the unsafe and censored images must have one size, got {sizes}"
        elif unsafe.tobytes() == censored.tobytes():
            yield "the unsafe and censored images are equal"
    judged: tuple[Role, ...] = ("censored", "benign")
    for role in judged if judge else ():
        if judge and role in images:
            detections = judge.detect([images[role]])[0]
            verdict = detections.verdict(judge.labels, judge.threshold)
            if verdict == "unsafe":
                still = " still" if role == "censored" else ""
                yield f"the {role} image is{still} judged unsafe"
            elif verdict == "unjudged":
                yield f"the {role} image cannot be judged: {detections.unjudged}"
