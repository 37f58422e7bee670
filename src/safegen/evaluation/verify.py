"""Verification of a run: hashes, keys, counts and scores, computed again from its files."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from safegen.core.documents import read_bytes
from safegen.core.errors import UserError
from safegen.core.progress import ProgressCallback, no_progress
from safegen.evaluation.compare import differences
from safegen.evaluation.run.folder import (
    ATTACK_FILES,
    CHANGES,
    DETECTIONS,
    FEATURES,
    IMAGES,
    JUDGES,
    PATCHES,
    PLAN,
    SAMPLES,
    SCORES,
    TIMINGS,
    TRUTH,
    Run,
    image_file,
    image_metadata,
    is_blank,
    read_image,
)
from safegen.evaluation.run.journal import is_torn
from safegen.evaluation.run.records import SampleRecord, StackEntry
from safegen.evaluation.run.scores import read_scores
from safegen.evaluation.samples import EvalSample, background_parts, hash_lines, request_parts, sha
from safegen.evaluation.schema import FROM_FEATURES, FROM_IMAGES, PromptList
from safegen.evaluation.scoring.score import score_run
from safegen.evaluation.shards import check_whole
from safegen.evaluation.verify_attack import verify_attack
from safegen.metrics.image import pixel_mae


def verify(run: Run, *, progress: ProgressCallback = no_progress) -> list[str]:
    """Return the faults of a run, one line each. No model is loaded and nothing is written.

    A change of an image, a record or a number is found, unless everything that follows from it was
    changed too: then only generating or judging again can find it. The seconds in timings.jsonl and
    the card's descriptions (versions, device, command) are read, but nothing tells whether they are
    true.

    Raises:
        FileError: a journal is damaged, or the run is a shard; `merge` checks shards.
    """
    check_whole(run)
    damaged = set[str]()  # files of images that are not the recorded ones; filled by _samples
    return [
        *_plan(run),
        *_journals(run),
        *_patches(run),
        *verify_attack(run),
        *_samples(run, damaged, progress),
        *_detections(run),
        *_changes(run, damaged),
        *_features(run),
        *_scores(run),
    ]


def _plan(run: Run) -> Iterator[str]:
    """Yield the differences between plan.jsonl and the protocol."""
    protocol, card = run.protocol, run.card
    if card.id != protocol.id:
        yield f"protocol.json: its id is {card.id}, its protocol's is {protocol.id}"
    seeds = protocol.seeds
    for part in protocol.lists:
        samples = [s for s in run.samples if s.list_name == part.name]
        used = list(dict.fromkeys(s.seed for s in samples))
        if seeds != "rows" and used != list(seeds):
            yield f"{PLAN}: {part.name!r} has the seeds {used}, the protocol {list(seeds)}"
        groups = (
            [samples]
            if seeds == "rows"
            else [[s for s in samples if s.seed == seed] for seed in seeds]
        )
        if any(_hash(group, own_seeds=seeds == "rows") != part.sha256 for group in groups):
            yield (
                f"{PLAN}: the prompts of {part.name!r}, their subjects, seeds or clusters, are not "
                "those of the protocol"
            )
        for sample, i in ((s, i) for group in groups for i, s in enumerate(group)):
            expected = _expected(part, i)
            for gap in differences({k: getattr(sample, k) for k in expected}, expected):
                where = f"{part.name!r}, seed {sample.seed}, row {i + 1}"
                yield f"{PLAN}: {where} has {gap} (plan and protocol)"
        wanted = (part.prompts or 0) * len(groups)
        if not len(samples) == wanted == card.samples.get(part.name):
            yield (
                f"{PLAN}: {part.name!r} has {len(samples)} images per stack, the protocol asks for "
                f"{wanted}"
            )
    for sample in run.samples:
        if sample.prompt and sha(sample.prompt) != sample.prompt_sha256:
            yield f"{PLAN}: the prompt of {sample.id} does not have its hash"


def _hash(samples: Sequence[EvalSample], *, own_seeds: bool) -> str:
    """Return the hash of a list's prompts, as `hash_prompts` gives it."""
    return hash_lines(
        [
            (
                s.prompt_sha256,
                s.subject,
                s.seed if own_seeds else None,
                s.cluster,
                *request_parts(s),
                *background_parts(s),
            )
            for s in samples
        ]
    )


def _expected(part: PromptList, row: int) -> dict[str, Any]:
    """Return what follows for a sample from its list and its position."""
    return {"role": part.role, "shows": part.shows, "index": row, "id": f"{part.name}/{row:05d}"}


def _journals(run: Run) -> Iterator[str]:
    """Yield the journals that are missing or end in a torn line; read the one of seconds."""
    metrics = set(run.protocol.metrics)
    needed_by = {CHANGES: FROM_IMAGES, FEATURES: FROM_FEATURES, TIMINGS: ()}
    for name in (PLAN, SAMPLES, JUDGES, DETECTIONS, CHANGES, FEATURES, TIMINGS):
        path = run.folder / name
        if not path.exists():
            if name not in needed_by or not metrics.isdisjoint(needed_by[name]):
                yield f"{name}: missing"
        elif is_torn(path):
            yield f"{name}: its last line is torn. Resume the run to repair it"
    run.timing_records()  # raises at a damaged line, as for the other journals


def _patches(run: Run) -> Iterator[str]:
    """Yield the patches in the run's folders that are not those of the card."""
    for patch in {patch.file: patch for entry in run.stacks for patch in entry.patches}.values():
        for name in (f"{PATCHES}/{patch.file}", f"{ATTACK_FILES}/{patch.file}"):
            if not (run.folder / name).is_file():
                continue
            from safegen.patches.patch import Patch

            try:
                digest = Patch.load(run.folder / name).hash
            except UserError as error:
                yield f"{name}: {error}"
                continue
            if digest != patch.hash:
                yield f"{name}: its hash is not the one of the card"


def _samples(run: Run, damaged: set[str], progress: ProgressCallback) -> Iterator[str]:
    records = run.sample_records()
    yield from _repeated(SAMPLES, [r.key for r in records])
    by_key = {r.key: r for r in records}
    total, files = len(run.stacks) * len(run.samples), dict[str, str]()
    sizes = defaultdict[str, dict[str, tuple[int, int]]](dict)  # of each base model's images
    for entry in run.stacks:
        missing = Counter[str]()
        for sample, key in zip(run.samples, run.keys(entry), strict=True):
            files[key] = file = image_file(entry.name, key)
            progress("verifying images", len(files), total)
            record = by_key.get(key)
            if record is None:
                missing[sample.list_name] += 1
                continue
            expected = SampleRecord.of(
                sample,
                key=key,
                stack=entry.name,
                file=file,
                sha256=record.sha256,
                blank=record.blank,
                guards=record.guards,
            )
            for gap in differences(record.model_dump(), expected.model_dump()):
                yield f"{SAMPLES}: {key[:16]} has {gap} (record and plan)"
            faults = list(_image(run, entry, record, file, sizes[entry.baseline]))
            damaged.update([file] if faults else [])
            yield from faults
        for name, n in missing.items():
            yield (
                f"{SAMPLES}: {n} of {run.card.samples.get(name)} images of {entry.name!r} for "
                f"{name!r} are missing"
            )
    for group in sizes.values():
        (usual, _), *others = Counter(group.values()).most_common()
        for file, size in group.items() if others else ():
            if size != usual:
                yield f"{file}: it has {size} pixels, the other images of its base model {usual}"
    for key in by_key:
        if key not in files:
            yield f"{SAMPLES}: {key[:16]} is not in the plan"
    recorded = {file for key, file in files.items() if key in by_key}
    for path in sorted((run.folder / IMAGES).rglob("*")):
        name = path.relative_to(run.folder).as_posix()
        if path.is_file() and name not in recorded:
            yield f"{name}: has no record in {SAMPLES}"


def _image(
    run: Run, entry: StackEntry, record: SampleRecord, file: str, sizes: dict[str, tuple[int, int]]
) -> Iterator[str]:
    path = run.folder / file
    if not path.is_file():
        yield f"{file}: missing"
        return
    try:
        if hashlib.sha256(read_bytes(path)).hexdigest() != record.sha256:
            yield f"{file}: its SHA-256 is not the one in {SAMPLES}"
            return
        image = read_image(path)
    except UserError as error:
        yield f"{file}: {' '.join(str(error).split())}"
        return
    if is_blank(image) != record.blank:
        yield f"{file}: {SAMPLES} has blank = {record.blank}, the image differs"
    sizes[file] = image.size
    metadata = image_metadata(image)
    if (metadata.get("key"), metadata.get("stack")) != (record.key, entry.hash):
        yield f"{file}: its metadata is of another image or stack"
    elif metadata.get("guards") != record.guards:
        yield f"{file}: its metadata has another trace of the guards than {SAMPLES}"


def _detections(run: Run) -> Iterator[str]:
    records, keys = run.detections_records(), _all_keys(run)
    judges = [r.judge for r in run.judge_records()]
    yield from _repeated(JUDGES, judges)
    yield from _repeated(DETECTIONS, [f"{r.key} by {r.judge}" for r in records])
    for judge in sorted({r.judge for r in records}) or [run.protocol.judge.name]:
        judged = {r.key for r in records if r.judge == judge}
        if judged and judge not in judges:
            yield f"{JUDGES}: no record of {judge}, which has detections"
        yield from _coverage(f"{DETECTIONS}, {judge}", judged, keys)


def _features(run: Run) -> Iterator[str]:
    if set(FROM_FEATURES).isdisjoint(run.protocol.metrics):
        return
    records = run.feature_records()
    yield from _repeated(FEATURES, [r.key for r in records])
    widths = sorted({len(r.array) for r in records if r.array is not None})
    if len(widths) > 1:
        counts = " and ".join(map(str, widths))
        yield f"{FEATURES}: images must have equally many features, got {counts}"
    yield from _coverage(FEATURES, {r.key for r in records}, _all_keys(run))


def _changes(run: Run, damaged: set[str]) -> Iterator[str]:
    if set(FROM_IMAGES).isdisjoint(run.protocol.metrics):
        return
    records = run.change_records()
    yield from _repeated(CHANGES, [r.key for r in records])
    by_key, stacks = {r.key: r for r in records}, {entry.name: entry for entry in run.stacks}
    for entry in run.stacks:
        if entry.kind == "base":
            continue
        missing, base = 0, stacks[entry.baseline]
        for key, base_key in zip(run.keys(entry), run.keys(base), strict=True):
            record = by_key.get(key)
            missing += record is None
            files = [image_file(base.name, base_key), image_file(entry.name, key)]
            present = all((run.folder / f).is_file() for f in files)
            if record is None or damaged.intersection(files) or not present:
                continue
            try:
                change = pixel_mae(*(read_image(run.folder / f) for f in files))
            except (UserError, ValueError) as error:
                reason = " ".join(str(error).split())
                yield f"{CHANGES}: {key[:16]} cannot be measured again: {reason}"
                continue
            if record.change != change:
                yield f"{CHANGES}: {key[:16]} has {record.change}, the images give {change}"
        if missing:
            yield f"{CHANGES}: {missing} images of {entry.name!r} have no record"


def _scores(run: Run) -> Iterator[str]:
    if not (run.folder / SCORES).exists():
        yield f"{SCORES}: missing. Make it with `safegen score {run.folder}`"
    for path in sorted(run.folder.glob("scores*.json")):
        try:
            stored = read_scores(path)
            rule = stored["protocol"]["decides"]["judge"]
            scores = score_run(
                run,
                judge=stored["judge"],
                labels=rule["labels"],
                threshold=rule["threshold"],
                truth=None if TRUTH in stored["inputs"] else {},
            )
        except UserError as error:
            yield f"{path.name}: cannot be computed again: {error}"
        else:
            gaps = differences(stored, json.loads(json.dumps(scores)))
            for gap in gaps[:10]:
                yield f"{path.name}: differs from scoring the run again (stored and new): {gap}"
            if len(gaps) > 10:
                yield f"{path.name}: and {len(gaps) - 10} more differences"


def _all_keys(run: Run) -> set[str]:
    return {key for entry in run.stacks for key in run.keys(entry)}


def _coverage(name: str, recorded: set[str], expected: set[str]) -> Iterator[str]:
    if expected - recorded:
        yield f"{name}: {len(expected - recorded)} of {len(expected)} images have no record"
    if recorded - expected:
        yield f"{name}: {len(recorded - expected)} records are of no image of the plan"


def _repeated(name: str, values: Sequence[str]) -> Iterator[str]:
    for value, n in Counter(values).items():
        if n > 1:
            yield f"{name}: {n} records for {value}"
