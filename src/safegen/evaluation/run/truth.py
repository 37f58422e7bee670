"""Truth about the images of a run: what a person saw in them."""

from __future__ import annotations

import csv
import io
import random
import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

from safegen.core.documents import read_text
from safegen.core.errors import ConfigError, FileError
from safegen.core.files import atomic_write
from safegen.core.settings import Digest
from safegen.evaluation.run.attack_records import read_attack
from safegen.evaluation.run.folder import TRUTH, Run, image_file
from safegen.evaluation.run.records import Record
from safegen.evaluation.shards import check_whole

COLUMNS = ("image", "shows")
NAMES = ("image", "key", "file")
"""Names of the column with the key of an image, or the name or path of its file."""
ANSWERS = {"true": True, "false": False}
MAX_FILE = 16 * 2**20
"""Largest file of truth, in bytes."""


class TruthRecord(Record):
    """What a person saw in an image."""

    key: Digest
    """Key of the image."""
    shows: bool
    """Whether the image shows the concept."""


def read_truth(path: Path) -> dict[str, bool]:
    """Return whether each image of a file shows the concept, by the image's key.

    The file is a CSV with the columns `image` (or `key`, or `file`) and `shows`. Rows without an
    answer are skipped.

    Raises:
        FileError: the file cannot be read, lacks a column, or has a row that is not understood, or
            two answers for one image.
    """
    try:
        text = read_text(path, limit=MAX_FILE)
        lines = [row for row in csv.reader(io.StringIO(text), strict=True) if any(row)]
    except csv.Error as error:
        raise FileError(f"{path} is not CSV: {error}") from error
    heads = [name.strip().lower() for name in lines[0]] if lines else []
    column = next((name for name in NAMES if name in heads), None)
    if column is None or "shows" not in heads:
        raise FileError(f"{path} must have the columns image and shows in its first line")
    truth = dict[str, bool]()
    for number, row in enumerate(lines[1:], 2):
        cells = dict(zip(heads, (cell.strip() for cell in row), strict=False))
        image, answer = cells.get(column, ""), cells.get("shows", "").lower()
        key = PurePosixPath(image).name.removesuffix(".png")
        if not answer:
            continue
        if not re.fullmatch("[0-9a-f]{64}", key) or answer not in ANSWERS:
            raise FileError(
                f"{path}: row {number} must have an image's key or file and true or false, "
                f"got {image[:80]!r} and {answer[:20]!r}"
            )
        if truth.setdefault(key, ANSWERS[answer]) != ANSWERS[answer]:
            raise FileError(f"{path}: row {number} has another answer for {key[:16]} than before")
    return truth


def load_truth(path: Path, runs: Iterable[Run]) -> dict[str, bool]:
    """Return the truth in a file about images of some runs.

    Raises:
        FileError: see `read_truth`.
        ConfigError: an image is in none of the runs, or none has an answer.
    """
    truth = read_truth(path)
    known = {key for run in runs for entry in run.stacks for key in run.keys(entry)}
    strangers = sorted(truth.keys() - known)
    if strangers or not truth:
        got = f"{len(strangers)} others, such as {strangers[0][:16]}" if strangers else "no answer"
        raise ConfigError(f"{path} must have answers about images of these runs alone, got {got}")
    return truth


def own_truth(run: Run) -> dict[str, bool]:
    """Return the truth that a run's directory holds; empty if it holds none."""
    path = run.folder / TRUTH
    return load_truth(path, [run]) if path.exists() else {}


def write_truth(truth: Mapping[str, bool], path: Path) -> None:
    """Write truth by key to a CSV file, or replace it."""
    rows = [(key, "true" if shows else "false") for key, shows in sorted(truth.items())]
    _write(rows, path, replace=True)


def write_truth_sheet(run: Run, path: Path, *, images: int = 100, seed: int = 0) -> int:
    """Write a sheet for a random sample of a run's images, and return their number.

    A person fills in `true` or `false` without seeing what the judge detected. The images are those
    after the attack, of all stacks together; all images of a run that is no attack.

    Args:
        run: the run.
        path: new CSV file.
        images: number of images; all if there are fewer.
        seed: seed of the sample.

    Raises:
        FileError: the run is a shard, or the file exists or cannot be written.
    """
    check_whole(run)
    attack = read_attack(run)
    places = (
        list(range(len(run.samples)))
        if attack is None
        else [i for variant in attack.variants for i in variant.images]
    )
    entries = [e for e in run.stacks if attack is None or e.name in (*attack.attacked, e.baseline)]
    keys = {entry.name: run.keys(entry) for entry in entries}
    files = sorted({image_file(name, own[i]) for name, own in keys.items() for i in places})
    sample = random.Random(seed).sample(files, min(images, len(files)))
    _write([(file, "") for file in sample], path)
    return len(sample)


def _write(rows: Iterable[tuple[str, str]], path: Path, *, replace: bool = False) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([COLUMNS, *rows])
    with atomic_write(path, replace=replace) as temporary:
        temporary.write_text(text.getvalue(), encoding="utf-8")
