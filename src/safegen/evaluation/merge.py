"""Merge of the shards of a run into the run that one process would have made."""

from __future__ import annotations

import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from hashlib import file_digest
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from safegen.core.documents import check_file
from safegen.core.errors import ConfigError, FileError
from safegen.core.files import staged_directory
from safegen.core.progress import ProgressCallback, no_progress
from safegen.data.shards import Shard
from safegen.evaluation.compare import differences, join_gaps
from safegen.evaluation.journal_parts import JournalParts
from safegen.evaluation.report.page import open_runs, write_report
from safegen.evaluation.run.card import deciding_parts, public_argument
from safegen.evaluation.run.claim import claim_run
from safegen.evaluation.run.folder import (
    CARD,
    CHANGES,
    DETECTIONS,
    FEATURES,
    IMAGES,
    JUDGES,
    PATCHES,
    PLAN,
    PROMPT_FILES,
    PROTOCOL_FILE,
    SAMPLES,
    TIMINGS,
    Run,
    image_file,
    write_json,
)
from safegen.evaluation.run.journal import to_lines
from safegen.evaluation.run.records import (
    ChangeRecord,
    DetectionsRecord,
    FeatureRecord,
    JudgeRecord,
    RunCard,
    SampleRecord,
)
from safegen.evaluation.schema import FROM_FEATURES, FROM_IMAGES
from safegen.evaluation.scoring.score import score_run, scores_file
from safegen.evaluation.shards import deal_batches, device_kind

COPIED = (PLAN, PROTOCOL_FILE, PROMPT_FILES, PATCHES)
"""Files and folders that every shard has."""
MAX_LINES = 8
"""Most shards that a message names."""


def merge_runs(
    folders: Sequence[Path], out: Path, *, progress: ProgressCallback = no_progress
) -> Run:
    """Merge the shards of a run, score them, write the report and return the whole run.

    The images, the journals, the scores and the report are those of one process, byte for byte;
    only the times and the noted command differ. Each image is checked against its SHA-256, and
    linked or copied. `out` appears complete or not at all. The same call finishes an interrupted
    one. Runs that were not judged yet are merged without scores.

    Args:
        folders: runs of all shards. A shard may be given twice, if its records are equal.
        out: directory of the whole run, new or of an earlier call.
        progress: called with (description, done, total).

    Raises:
        FileError: a folder is no run, an image is not the recorded one, two parts contradict each
            other, a shard is missing or not finished, or `out` is something else.
        ConfigError: the runs differ in what decides an image, or are of different numbers of
            shards.
    """
    parts = _open_parts(folders)
    if os.path.lexists(out / CARD):
        run = Run.open(out)
        if gaps := differences(deciding_parts(run.card), _whole_parts(parts[0].card)):
            raise FileError(
                f"{out} is another run (then and now): {join_gaps(gaps)}. "
                "Name another directory with --out"
            )
        total, found = len(run.stacks) * len(run.samples), sum(1 for _ in run.sample_records())
        if found < total:
            raise FileError(
                f"{out} must be new or merged before, got a run with {found} of {total} images. "
                "Resume it with its command, or name another directory with --out"
            )
    else:
        with staged_directory(out) as staging:
            _write_run(parts, staging, out, progress)
        run = Run.open(out)
    if next(run.detections_records(), None):
        with claim_run(out):
            scores = score_run(run)
            write_json(scores_file(run, scores), scores)
            write_report(open_runs([out]), out)
    return run


def _whole_parts(card: RunCard) -> dict[str, object]:
    return deciding_parts(_whole_card(card))


def _whole_card(card: RunCard) -> RunCard:
    """Return the card of a shard as that of the whole run."""
    return card.model_copy(update={"shard": None, "device": device_kind(card.device)})


def _open_parts(folders: Sequence[Path]) -> list[Run]:
    """Return the runs in some folders, by shard.

    Raises:
        ConfigError: there are none, or they are not parts of one run.
    """
    if not folders:
        raise ConfigError("runs to merge must be at least one, got none. Name their folders")
    paths = dict.fromkeys(folder.resolve() for folder in folders)
    runs = [Run.open(path) for path in paths]
    first = runs[0]
    for run in runs[1:]:
        gaps = differences(_whole_parts(first.card), _whole_parts(run.card))
        if not gaps and (first.folder / PLAN).read_bytes() != (run.folder / PLAN).read_bytes():
            gaps = [PLAN]
        if gaps:
            raise ConfigError(
                f"runs to merge must be shards of one run, got {first.folder} and {run.folder}, "
                f"which differ in {join_gaps(gaps)}. Leave one of them out"
            )
    counts = sorted({run.card.shard.count for run in runs if run.card.shard})
    if len(counts) > 1:
        raise ConfigError(
            "runs to merge must be shards of one number of shards, got "
            f"{' and '.join(f'I/{count}' for count in counts)}. Leave the others out"
        )
    return sorted(runs, key=lambda run: run.card.shard.index if run.card.shard else 0)


class _Wanted(NamedTuple):
    """Records that the whole run must have: stack by stack, in the order of the plan."""

    journal: JournalParts[Any]
    names: Sequence[str]


def _write_run(parts: Sequence[Run], staging: Path, out: Path, progress: ProgressCallback) -> None:
    """Write the whole run without its scores."""
    first, folders = parts[0], [run.folder for run in parts]
    samples = JournalParts(folders, SAMPLES, SampleRecord, lambda record: record.key)
    judges = JournalParts(folders, JUDGES, JudgeRecord, lambda record: record.judge)
    keys = {entry.name: first.keys(entry) for entry in first.stacks}
    wanted = [_Wanted(samples, [key for own in keys.values() for key in own])]
    wanted += _judged_records(parts, keys, list(judges))
    _check_complete(parts, wanted)
    for name in COPIED:
        source = first.folder / name
        if source.is_dir():
            shutil.copytree(source, staging / name)
        elif source.exists():
            shutil.copyfile(source, staging / name)
    _take_images(first, samples, keys, staging, progress)
    lines = dict[str, list[_Wanted]]()
    for one in wanted:
        lines.setdefault(one.journal.name, []).append(one)
    for name, same in lines.items():
        same[0].journal.write(staging / name, chain.from_iterable(one.names for one in same))
    if list(judges):
        judges.write(staging / JUDGES, judges)
    _join_timings(parts, samples, staging / TIMINGS)
    argv = _whole_command(first.card.argv, out)
    card = _whole_card(first.card).model_copy(update={"argv": argv})
    write_json(staging / CARD, card.model_dump(mode="json"))


def _judged_records(
    parts: Sequence[Run], keys: dict[str, list[str]], judges: Sequence[str]
) -> Iterator[_Wanted]:
    """Yield what was recorded of the images besides their making, journal by journal."""
    run, folders = parts[0], [part.folder for part in parts]
    metrics, everything = set(run.protocol.metrics), [key for own in keys.values() for key in own]
    if not judges:
        return
    detections = JournalParts(folders, DETECTIONS, DetectionsRecord, lambda r: r.judge + r.key)
    for judge in judges:
        yield _Wanted(detections, [judge + key for key in everything])
    if metrics & set(FROM_IMAGES):
        compared = [key for e in run.stacks if e.kind != "base" for key in keys[e.name]]
        yield _Wanted(JournalParts(folders, CHANGES, ChangeRecord, lambda r: r.key), compared)
    if metrics & set(FROM_FEATURES):
        yield _Wanted(JournalParts(folders, FEATURES, FeatureRecord, lambda r: r.key), everything)


def _check_complete(parts: Sequence[Run], wanted: Sequence[_Wanted]) -> None:
    """Raise if a record is missing; the message says of which shard.

    Raises:
        FileError: a record is missing.
    """
    run, count = parts[0], max(part.card.shard.count if part.card.shard else 1 for part in parts)
    size = run.protocol.generation.batch_size
    owners = deal_batches(run.samples, size, count)
    for journal, names in wanted:
        places = (i for i, name in enumerate(names) if name not in journal)
        missing = Counter(owners[i % len(run.samples) // size] for i in places)
        if not missing:
            continue
        given = {part.card.shard.index: part.folder.name for part in parts if part.card.shard}
        lines = [
            f"{index}/{count} ({given[index]} lacks {n} records in {journal.name})"
            if index in given
            else f"{index}/{count} (not given)"
            for index, n in sorted(missing.items())
        ]
        more = f" and {len(lines) - MAX_LINES} more" if len(lines) > MAX_LINES else ""
        raise FileError(
            f"every shard must be finished, but not: {', '.join(lines[:MAX_LINES])}{more}. "
            "Finish each with its command and --shard, and merge all again"
        )


def _take_images(
    run: Run,
    samples: JournalParts[SampleRecord],
    keys: Mapping[str, Sequence[str]],
    staging: Path,
    progress: ProgressCallback,
) -> None:
    """Link or copy the images of all parts, each checked against its record.

    Raises:
        FileError: an image is missing or is not the recorded one.
    """
    total, done = sum(map(len, keys.values())), 0
    for stack, own in keys.items():
        (staging / IMAGES / stack).mkdir(parents=True)
        for key in own:
            name = image_file(stack, key)
            path = samples.folder(key) / name
            check_file(path)
            with path.open("rb") as file:
                digest = file_digest(file, "sha256").hexdigest()
            if digest != samples.read(key).sha256:
                raise FileError(
                    f"{path} must be the image in {SAMPLES}, got another. Remove it, run its shard "
                    "again, and merge again"
                )
            link_file(path, staging / name)
            done += 1
            progress("merging images", done, total)


def link_file(source: Path, target: Path) -> None:
    """Make `target` a hard link to a file, or a copy where the file system has none."""
    with suppress(OSError):
        os.link(os.path.realpath(source), target)
        return
    shutil.copyfile(source, target)


def _join_timings(parts: Sequence[Run], samples: JournalParts[SampleRecord], path: Path) -> None:
    """Write the times of each shard; of one that was given twice, those of the fuller part."""
    fullest = dict[Shard | None, int]()
    for i, part in enumerate(parts):
        best = fullest.setdefault(part.card.shard, i)
        if samples.counts[i] > samples.counts[best]:
            fullest[part.card.shard] = i
    with path.open("w", encoding="utf-8") as file:
        for i in fullest.values():
            file.write(to_lines(parts[i].timing_records()))


def _whole_command(argv: Sequence[str], out: Path) -> tuple[str, ...]:
    """Return the command that makes the whole run in one process, from that of a shard."""
    text = re.sub(r"(^|\0)--shard[\0=][^\0]*", "", "\0".join(argv))
    option = re.compile(r"(?<![^\0])(--out[\0=])[^\0]*")
    text = option.sub(lambda found: found[1] + public_argument(str(out)), text)
    return tuple(text.split("\0")) if argv else ()
