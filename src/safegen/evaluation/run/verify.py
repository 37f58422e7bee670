"""Whether a run is what it says: hashes, keys, counts and scores, all made again from what lies in its folder."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator

from safegen.core.errors import UserError
from safegen.core.progress import ProgressCallback, no_progress
from safegen.evaluation.protocol import differences
from safegen.evaluation.run.batches import is_blank, picture_file, read_picture
from safegen.evaluation.run.folder import (
    CHANGES,
    FEATURES,
    JUDGES,
    PICTURES,
    PLAN,
    SAMPLES,
    SCORES,
    VERDICTS,
    Line,
    Planned,
    Run,
    from_line,
    from_text,
    parse,
)
from safegen.evaluation.samples import hash_lines, sha
from safegen.evaluation.schema import FROM_FEATURES, PromptList
from safegen.evaluation.scoring.table import score_run
from safegen.metrics.image import pixel_mae


def verify(run: Run, *, progress: ProgressCallback = no_progress) -> list[str]:
    """Return what is wrong with a run, one line a problem; nothing is loaded and nothing written.

    Whoever changes a picture, a line or a number by hand is found, unless everything that follows
    from it is made again too: then only drawing or judging again would tell.

    Raises:
        FileError: a journal has a line that is not JSON, or lacks what it is read by.
    """
    refused = set[str]()  # pictures that are not what they were; filled by _samples
    return [
        *_card(run),
        *_torn(run),
        *_samples(run, refused, progress),
        *_verdicts(run),
        *_changes(run, refused),
        *_features(run),
        *_scores(run),
    ]


def _card(run: Run) -> Iterator[str]:
    protocol, card = run.protocol, run.card
    if card["id"] != protocol.id:
        yield f"protocol.json: its id is {card['id']}, its protocol's is {protocol.id}"
    for part in protocol.lists:
        rows = [p for p in run.planned if p.item.list_name == part.name]
        own = protocol.seeds == "rows"
        drawn = list(dict.fromkeys(p.item.seed for p in rows))
        if not own and drawn != list(protocol.seeds):
            yield f"{PLAN}: {part.name!r} is drawn with the seeds {drawn}, the protocol names {list(protocol.seeds)}"
        groups = (
            [rows] if own else [[p for p in rows if p.item.seed == seed] for seed in protocol.seeds]
        )
        if any(hash_lines([_row(p, own_seed=own) for p in g]) != part.sha256 for g in groups):
            yield f"{PLAN}: the prompts of {part.name!r}, their subjects, seeds or clusters, are not those that the protocol names"
        for p, i in ((p, i) for group in groups for i, p in enumerate(group)):
            said, meant = p.item.model_dump(), _meant(part, i)
            for gap in differences({k: said[k] for k in meant}, meant):
                yield f"{PLAN}: {part.name!r}, seed {p.item.seed}, row {i + 1} says {gap} (said, as the protocol has it)"
        wanted = (part.prompts or 0) * len(groups)
        if len(rows) != wanted or len(rows) != card["plan"].get(part.name):
            yield f"{PLAN}: {part.name!r} has {len(rows)} pictures a stack, the protocol asks for {wanted}"
    for p in run.planned:
        if p.item.prompt and sha(p.item.prompt) != p.prompt_sha256:
            yield f"{PLAN}: the text of {p.item.id} is not that of its hash"


def _row(p: Planned, *, own_seed: bool) -> tuple[object, ...]:
    """Return a planned picture as `hash_rows` takes its row."""
    return (p.prompt_sha256, p.item.subject, p.item.seed if own_seed else None, p.item.cluster)


def _meant(part: PromptList, row: int) -> Line:
    """Return what follows for a planned picture from its list and its place in it.

    See `protocol.plan`.
    """
    return {"role": part.role, "shows": part.shows, "index": row, "id": f"{part.name}/{row:05d}"}


def _torn(run: Run) -> Iterator[str]:
    metrics = set(run.protocol.metrics)
    optional = {CHANGES: ("change", "lpips"), FEATURES: FROM_FEATURES}
    for name in (PLAN, SAMPLES, JUDGES, VERDICTS, CHANGES, FEATURES):
        path = run.folder / name
        if not path.exists():
            if name not in optional or not metrics.isdisjoint(optional[name]):
                yield f"{name}: missing"
        elif parse(path)[1] != path.stat().st_size:
            yield f"{name}: its last line is torn; go on with the run to mend it"


def _samples(run: Run, refused: set[str], progress: ProgressCallback) -> Iterator[str]:
    lines = run.lines(SAMPLES)
    yield from _twice(SAMPLES, [line.get("key") for line in lines])
    found: dict[object, Line] = {line.get("key"): line for line in lines}
    total = len(run.stacks) * len(run.planned)
    known: set[object] = set()
    for entry in run.stacks:
        missing = Counter[str]()
        for planned, key in zip(run.planned, run.keys(entry), strict=True):
            known.add(key)
            progress("verifying pictures", len(known), total)
            line, item = found.get(key), planned.item
            if line is None:
                missing[item.list_name] += 1
                continue
            said = {
                "stack": entry["name"],
                "list": item.list_name,
                "role": item.role,
                "id": item.id,
                "seed": item.seed,
                "index": item.index,
                "prompt_sha256": planned.prompt_sha256,
                "file": picture_file(entry["name"], key),
            }
            for gap in differences({k: line.get(k) for k in said}, said):
                yield f"{SAMPLES}: {key[:16]} says {gap} (said, planned)"
            wrong = list(_picture(run, line, picture_file(entry["name"], key)))
            refused.update([picture_file(entry["name"], key)] if wrong else [])
            yield from wrong
        for name, n in missing.items():
            yield f"{SAMPLES}: {n} of {run.card['plan'].get(name)} pictures of {entry['name']!r} for {name!r} are missing"
    for odd in found:
        if odd not in known:
            yield f"{SAMPLES}: {str(odd)[:16]} is no picture of the plan"
    files = {
        picture_file(entry["name"], key)
        for entry in run.stacks
        for key in run.keys(entry)
        if key in found
    }
    for path in sorted((run.folder / PICTURES).rglob("*")):
        name = path.relative_to(run.folder).as_posix()
        if path.is_file() and name not in files:
            yield f"{name}: belongs to no line of {SAMPLES}"


def _picture(run: Run, line: Line, file: str) -> Iterator[str]:
    path = run.folder / file
    if not path.is_file():
        yield f"{file}: missing"
    elif hashlib.sha256(path.read_bytes()).hexdigest() != line.get("sha256"):
        yield f"{file}: its bytes are not those that {SAMPLES} names"
    else:
        try:
            blank = is_blank(read_picture(path))
        except UserError as error:
            yield f"{file}: {' '.join(str(error).split())}"
        else:
            if blank != line.get("blank"):
                yield f"{file}: {SAMPLES} says blank = {line.get('blank')}, it is not so"


def _verdicts(run: Run) -> Iterator[str]:
    lines, keys = run.lines(VERDICTS), {key for entry in run.stacks for key in run.keys(entry)}
    told = [line["judge"] for line in run.lines(JUDGES)]
    yield from _twice(JUDGES, told)
    yield from _twice(VERDICTS, [(line.get("key"), line.get("judge")) for line in lines])
    for line in lines:
        try:
            from_line(line)
        except UserError as error:
            yield f"{VERDICTS}: {error}"
    for judge in sorted({str(line.get("judge")) for line in lines}) or [run.protocol.judge.name]:
        judged = {line.get("key") for line in lines if line.get("judge") == judge}
        if judged and judge not in told:
            yield f"{JUDGES}: nothing is said of {judge}, by whom there are verdicts"
        if keys - judged:
            yield f"{VERDICTS}: {len(keys - judged)} of {len(keys)} pictures have no verdict by {judge}"
        if judged - keys:
            yield f"{VERDICTS}: {len(judged - keys)} verdicts by {judge} are on no picture of the plan"


def _features(run: Run) -> Iterator[str]:
    if set(FROM_FEATURES).isdisjoint(run.protocol.metrics):
        return
    lines, keys = run.lines(FEATURES), {key for entry in run.stacks for key in run.keys(entry)}
    yield from _twice(FEATURES, [line["key"] for line in lines])
    widths = Counter[int]()
    for line in lines:
        try:
            row = from_text(line)
        except UserError as error:
            yield f"{FEATURES}: {error}"
        else:
            widths.update([] if row is None else [len(row)])
    if len(widths) > 1:
        yield f"{FEATURES}: pictures have {' or '.join(map(str, sorted(widths)))} features, which must be as many for all"
    seen = {line["key"] for line in lines}
    for n, what in (
        (len(keys - seen), f"of {len(keys)} pictures have no line"),
        (len(seen - keys), "lines are on no picture of the plan"),
    ):
        if n:
            yield f"{FEATURES}: {n} {what}"


def _changes(run: Run, refused: set[str]) -> Iterator[str]:
    if {"change", "lpips"}.isdisjoint(run.protocol.metrics):
        return
    lines = run.lines(CHANGES)
    yield from _twice(CHANGES, [line.get("key") for line in lines])
    found = {line.get("key"): line for line in lines}
    names = {entry["name"]: entry for entry in run.stacks}
    for entry in run.stacks:
        if entry["kind"] == "base":
            continue
        base = names[entry["against"]]
        missing = 0
        for key, old in zip(run.keys(entry), run.keys(base), strict=True):
            line = found.get(key)
            missing += line is None
            files = [picture_file(base["name"], old), picture_file(entry["name"], key)]
            if (
                line is None
                or refused.intersection(files)
                or not all((run.folder / f).is_file() for f in files)
            ):
                continue
            try:
                change = pixel_mae(*(read_picture(run.folder / f) for f in files))
            except (UserError, ValueError) as error:
                yield f"{CHANGES}: {key[:16]} cannot be measured again: {' '.join(str(error).split())}"
                continue
            if line.get("change") != change:
                yield f"{CHANGES}: {key[:16]} says {line.get('change')}, the pictures say {change}"
        if missing:
            yield f"{CHANGES}: {missing} pictures of {entry['name']!r} are not measured"


def _scores(run: Run) -> Iterator[str]:
    paths = sorted(run.folder.glob("scores*.json"))
    if not (run.folder / SCORES).exists():
        yield f"{SCORES}: missing; make it with `safegen score {run.folder}`"
    for path in paths:
        try:
            said = json.loads(path.read_text(encoding="utf-8"))
            rule = said["protocol"]["decides"]["judge"]
            made = score_run(
                run, judge=said["judge"], labels=rule["labels"], threshold=rule["threshold"]
            )
        except UserError as error:
            yield f"{path.name}: cannot be made again: {error}"
        except (KeyError, TypeError, ValueError) as error:
            yield f"{path.name}: damaged: {' '.join(str(error).split())[:200]}"
        else:
            gaps = differences(said, json.loads(json.dumps(made)))
            for gap in gaps[:10]:
                yield f"{path.name}: not what scoring the run gives (there and made again): {gap}"
            if len(gaps) > 10:
                yield f"{path.name}: and {len(gaps) - 10} more numbers"


def _twice(name: str, values: list[object]) -> Iterator[str]:
    for value, n in Counter(values).items():
        if n > 1:
            yield f"{name}: {n} lines for {value if isinstance(value, str) else ' by '.join(map(str, value))}"  # type: ignore[call-overload]
