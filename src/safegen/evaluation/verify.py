"""Verification of a run: hashes, keys, counts and scores, computed again from its files."""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from safegen.core.errors import UserError
from safegen.core.progress import ProgressCallback, no_progress
from safegen.evaluation.compare import differences
from safegen.evaluation.run.folder import (
    ATTACK_FILES,
    CHANGES,
    DETECTIONS,
    FEATURES,
    JUDGES,
    PATCHES,
    PLAN,
    SAMPLES,
    SCORES,
    TIMINGS,
    TRUTH,
    Run,
)
from safegen.evaluation.run.journal import is_torn
from safegen.evaluation.run.scores import read_scores
from safegen.evaluation.samples import EvalSample, background_parts, hash_lines, request_parts, sha
from safegen.evaluation.schema import FROM_FEATURES, FROM_IMAGES, PromptList
from safegen.evaluation.scoring.score import score_run
from safegen.evaluation.shards import check_whole
from safegen.evaluation.verify_attack import verify_attack
from safegen.evaluation.verify_images import KeyTally, verify_images


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
    keys = [key for entry in run.stacks for key in run.keys(entry)]
    places = {key: place for place, key in enumerate(keys)}
    before = [*_plan(run), *_journals(run), *_patches(run), *verify_attack(run)]
    samples, changes = verify_images(run, places, progress)
    detections, features = _detections(run, places), _features(run, places)
    return [*before, *samples, *detections, *changes, *features, *_scores(run)]


def _plan(run: Run) -> Iterator[str]:
    """Yield the differences between plan.jsonl and the protocol."""
    protocol, card = run.protocol, run.card
    if card.id != protocol.id:
        yield f"protocol.json: its id is {card.id}, its protocol's is {protocol.id}"
    seeds = protocol.seeds
    by_list: dict[str, list[EvalSample]] = {part.name: [] for part in protocol.lists}
    for sample in run.samples:
        by_list.setdefault(sample.list_name, []).append(sample)
    for part in protocol.lists:
        samples, groups = by_list[part.name], [by_list[part.name]]
        if seeds != "rows":
            by_seed: dict[int, list[EvalSample]] = {}
            for sample in samples:
                by_seed.setdefault(sample.seed, []).append(sample)
            if list(by_seed) != list(seeds):
                yield (
                    f"{PLAN}: {part.name!r} has the seeds {list(by_seed)}, "
                    f"the protocol {list(seeds)}"
                )
            groups = [by_seed.get(seed, []) for seed in seeds]
        if any(_hash(group, own_seeds=seeds == "rows") != part.sha256 for group in groups):
            yield (
                f"{PLAN}: the prompts of {part.name!r}, their subjects, seeds or clusters, are not "
                "those of the protocol"
            )
        for sample, i in ((s, i) for group in groups for i, s in enumerate(group)):
            expected = _expected(part, i)
            found = {k: getattr(sample, k) for k in expected}
            for gap in differences(found, expected) if found != expected else ():
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
        (
            s.prompt_sha256,
            s.subject,
            s.seed if own_seeds else None,
            s.cluster,
            *request_parts(s),
            *background_parts(s),
        )
        for s in samples
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
    deque(run.timing_records(), maxlen=0)  # raises at a damaged line, as for the other journals


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


def _detections(run: Run, places: Mapping[str, int]) -> Iterator[str]:
    tallies = dict[str, KeyTally]()
    for record in run.detections_records():
        if record.judge not in tallies:
            tallies[record.judge] = KeyTally(places)
        tallies[record.judge].add(record.key)
    judges = Counter(r.judge for r in run.judge_records())
    yield from (f"{JUDGES}: {n} records for {judge}" for judge, n in judges.items() if n > 1)
    for judge, tally in tallies.items():
        yield from tally.repeated(DETECTIONS, f" by {judge}")
    for judge in sorted(tallies) or [run.protocol.judge.name]:
        if judge in tallies and judge not in judges:
            yield f"{JUDGES}: no record of {judge}, which has detections"
        yield from tallies.get(judge, KeyTally(places)).coverage(f"{DETECTIONS}, {judge}")


def _features(run: Run, places: Mapping[str, int]) -> Iterator[str]:
    if set(FROM_FEATURES).isdisjoint(run.protocol.metrics):
        return
    tally, lengths = KeyTally(places), set[int]()
    for record in run.feature_records():
        tally.add(record.key)
        lengths |= set() if record.array is None else {len(record.array)}
    yield from tally.repeated(FEATURES)
    if len(widths := sorted(lengths)) > 1:
        counts = " and ".join(map(str, widths))
        yield f"{FEATURES}: images must have equally many features, got {counts}"
    yield from tally.coverage(FEATURES)


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
