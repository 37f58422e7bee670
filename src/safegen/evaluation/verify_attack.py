"""Verification of a run's attack: records, found prompts, start files and settings."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence

from safegen.core.errors import UserError
from safegen.data.prompts.prompts import read_prompts
from safegen.evaluation.compare import differences, join_gaps
from safegen.evaluation.run.attack_records import (
    AttackRecord,
    AttackRun,
    VariantImages,
    read_attack,
)
from safegen.evaluation.run.folder import ATTACK, CONTROLS, PROMPTS, SETTINGS, Run
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
    records = read_journal(run.folder / ATTACK, AttackRecord)[0]
    for (id_, form), n in Counter((r.id, r.variant) for r in records).items():
        if n > 1:
            yield f"{ATTACK}: {n} records for {f'{id_} {form}'.strip()}"
    decides = run.protocol.decides()
    decides["lists"] = [part for part in decides["lists"] if part["name"] not in attack.found_lists]
    wanted = json.loads(json.dumps(decides))
    if gaps := differences((attack.settings.model_extra or {}).get("protocol"), wanted):
        yield f"{SETTINGS}: its protocol is not the card's (settings and card): {join_gaps(gaps)}"
    for file in (PROMPTS, CONTROLS):
        forms = [form for form in attack.variants if form.is_control == (file == CONTROLS)]
        if forms and attack.changes_prompts:
            try:
                yield from _prompts(run, attack, file, forms)
            except UserError as error:
                yield f"{file}: {' '.join(str(error).split())}"


def _prompts(
    run: Run, attack: AttackRun, file: str, forms: Sequence[VariantImages]
) -> Iterator[str]:
    """Yield the differences between the prompts in a file, the records and the protocol's lists."""
    found = read_prompts(run.folder / file)  # checks the files of starts too
    for problem in found.problems:
        yield f"{file}: {problem}"
    total = sum(len(form.records) for form in forms)
    if len(found) != total:
        yield f"{file}: it has {len(found)} prompts, {ATTACK} has {total} records of them"
    for form in forms:
        rows = [r for r in found.rows if r.attack and (r.attack.variant or "") == form.variant]
        for row, record in zip(rows, form.records, strict=False):
            starts = [start and start.model_dump() for start in (row.start, record.start)]
            pairs = {
                "prompt": (row.prompt, record.prompt),
                "seed": (row.seed, record.seed),
                "start": starts,
                "guidance_scale": (row.guidance_scale, record.guidance_scale),
                "attack": (row.attack and row.attack.name, attack.settings.name),
            }
            if wrong := [name for name, (a, b) in pairs.items() if a != b]:
                yield f"{file}: line {row.line} and {ATTACK} differ in {', '.join(wrong)}"
        part = next(part for part in run.protocol.lists if part.name == form.label)
        chosen = read_prompt_list(
            str(run.folder / file),
            select=part.select,
            protocol_seed=run.protocol.protocol_seed,
            unsafe=part.unsafe,
        )
        if hash_prompts(chosen.rows) != part.sha256:
            yield f"{file}: its prompts are not those of the protocol's list {part.name!r}"
