"""Verification of a run's attack: records, found prompts, start files and settings."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator

from safegen.core.errors import UserError
from safegen.data.prompts.prompts import read_prompts
from safegen.evaluation.compare import differences, join_gaps
from safegen.evaluation.run.attack_records import AttackRecord, AttackRun, read_attack
from safegen.evaluation.run.folder import ATTACK, PROMPTS, SETTINGS, Run
from safegen.evaluation.run.journal import is_torn, read_journal
from safegen.evaluation.samples import hash_prompts, read_prompt_list


def verify_attack(run: Run) -> Iterator[str]:
    """Yield the faults of a run's attack; nothing if the run made none. No text is in them.

    Raises:
        FileError: the settings or the records are damaged, or are not of this run.
    """
    attack = read_attack(run)
    if attack is None:
        return
    if is_torn(run.folder / ATTACK):
        yield f"{ATTACK}: its last line is torn. Resume the run to repair it"
    ids = Counter(r.id for r in read_journal(run.folder / ATTACK, AttackRecord)[0])
    for id_, n in ids.items():
        if n > 1:
            yield f"{ATTACK}: {n} records for {id_}"
    decides = run.protocol.decides()
    decides["lists"] = [part for part in decides["lists"] if part["name"] != attack.found]
    wanted = json.loads(json.dumps(decides))
    if gaps := differences((attack.settings.model_extra or {}).get("protocol"), wanted):
        yield f"{SETTINGS}: its protocol is not the card's (settings and card): {join_gaps(gaps)}"
    try:
        yield from _prompts(run, attack)
    except UserError as error:
        yield f"{PROMPTS}: {' '.join(str(error).split())}"


def _prompts(run: Run, attack: AttackRun) -> Iterator[str]:
    """Yield the differences between the found prompts, the records and the protocol's list."""
    path = run.folder / PROMPTS
    found = read_prompts(path)  # checks the files of starts too
    for problem in found.problems:
        yield f"{PROMPTS}: {problem}"
    if len(found) != len(attack.records):
        yield f"{PROMPTS}: it has {len(found)} prompts, {ATTACK} {len(attack.records)} records"
        return
    for row, record in zip(found.rows, attack.records, strict=True):
        starts = [start and start.model_dump() for start in (row.start, record.start)]
        pairs = {
            "prompt": (row.prompt, record.prompt),
            "seed": (row.seed, record.seed),
            "start": starts,
            "attack": (row.attack and row.attack.name, attack.settings.name),
        }
        if wrong := [name for name, (a, b) in pairs.items() if a != b]:
            yield f"{PROMPTS}: line {row.line} and {ATTACK} differ in {', '.join(wrong)}"
    part = next((p for p in run.protocol.lists if p.name == attack.found), None)
    if part is not None:
        rows = read_prompt_list(
            str(path), protocol_seed=run.protocol.protocol_seed, unsafe=part.unsafe
        ).rows
        if hash_prompts(rows) != part.sha256:
            yield f"{PROMPTS}: its prompts are not those of the protocol's list {part.name!r}"
