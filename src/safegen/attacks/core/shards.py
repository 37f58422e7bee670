"""Shards of an attack: each finds the prompts of its batches, and a merge puts them together."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from safegen.attacks.core.base import Attack, AttackRecord
from safegen.attacks.core.cost import Cost
from safegen.attacks.core.prompts import with_protocol
from safegen.attacks.core.run import (
    AttackConfig,
    attack_samples,
    check_model,
    claim_attack,
    repeat_samples,
    split_samples,
)
from safegen.core.concept import Concept
from safegen.core.documents import read_json_object, read_record
from safegen.core.errors import ConfigError, FileError
from safegen.core.files import staged_directory
from safegen.core.progress import ProgressCallback, no_progress
from safegen.core.settings import Count
from safegen.data.shards import Shard
from safegen.evaluation.compare import differences, join_gaps
from safegen.evaluation.journal_parts import JournalParts
from safegen.evaluation.merge import MAX_LINES
from safegen.evaluation.protocol import Protocol
from safegen.evaluation.run.folder import (
    ATTACK,
    ATTACK_FILES,
    SETTINGS,
    SHARD,
    check_links,
    write_json,
)
from safegen.evaluation.run.journal import Journal
from safegen.evaluation.shards import device_kind
from safegen.stack import Stack
from safegen.stack_loader import StackLoader


class AttackShard(BaseModel):
    """Samples of one shard of an attack (`shard.json`)."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    shard: Shard
    """The shard."""
    total: Annotated[int, Field(ge=1, lt=2**53)]
    """Number of samples of all shards."""
    samples: dict[Count, str]
    """Id of each sample of this shard, by its place among all samples."""
    variants: tuple[str, ...] = Field(min_length=1)
    """Forms of the attack, controls last."""


def attack_shard(
    attack: Attack,
    stack: Stack,
    concept: Concept,
    config: AttackConfig,
    output_dir: Path,
    shard: Shard,
    *,
    protocol: Protocol | None = None,
    loader: StackLoader | None = None,
    progress: ProgressCallback = no_progress,
) -> int:
    """Attack the batches of one shard, and return how many samples they have.

    `merge_attacks` joins the shards, and `run_attack` with the same arguments evaluates what they
    found. The same call resumes an interrupted one.

    Args:
        attack: the attack.
        stack: the attacked stack.
        concept: concept to bring back.
        config: prompts and generation, without a budget.
        output_dir: directory of the shard, new or of an earlier call.
        shard: the shard.
        protocol: gives the prompts, the judge and `generation` in place of concept and config.
        loader: loads the model; on the CPU when not given.
        progress: called with (stage, done, total).

    Raises:
        ConfigError: there is a budget, which counts the whole attack, or the attack trains once for
            all prompts. Others are those of `run_attack`.
        FileError: `output_dir` holds something else or another shard, or cannot be written.
    """
    if limits := config.budget.model_dump(exclude_none=True):
        raise ConfigError(
            f"budget must be left out of a shard, got {', '.join(limits)}: it ends the whole "
            "attack, which no shard sees. Use --limit"
        )
    if not attack.changes_prompts:
        raise ConfigError(
            f"attacks in shards must find prompts, got {attack.method()!r}, which changes the "
            "model once for all prompts. Leave --shard out"
        )
    check_model(stack)
    loader = loader or StackLoader()
    concept, config, protocol = with_protocol(attack, concept, config, protocol)
    claimed = (attack, stack, concept, config, protocol, output_dir, loader)
    with claim_attack(*claimed, shard=str(shard)):
        samples = repeat_samples(protocol.samples(), config.repeat)
        own = split_samples(samples, attack.batch_size, shard)
        card = AttackShard(
            shard=shard,
            total=len(samples),
            samples={sample.index: sample.id for batch in own for sample in batch},
            variants=(*attack.variants, *attack.controls),
        )
        write_json(output_dir / SHARD, card.model_dump(mode="json"))
        with Journal(output_dir / ATTACK, AttackRecord) as journal:
            attack_samples(
                attack,
                stack,
                concept,
                config,
                samples,
                journal,
                output_dir / ATTACK_FILES,
                loader=loader,
                shard=shard,
                progress=progress,
            )
    return len(card.samples)


def is_attack_shard(folder: Path) -> bool:
    """Return whether a folder is a shard of an attack."""
    return (folder / SHARD).is_file() and (folder / SETTINGS).is_file()


def merge_attacks(folders: Sequence[Path], out: Path) -> int:
    """Merge the shards of an attack into a directory, and return the number of samples.

    The records are those of one process; seconds differ. `run_attack` in `out` goes on from them:
    it writes the found prompts and evaluates them. `out` appears complete or not at all.

    Args:
        folders: directories of all shards. A shard may be given twice, if its records are equal.
        out: new directory of the whole attack, or one that an earlier call made.

    Raises:
        FileError: a folder is no shard of an attack, two contradict each other, a shard is missing
            or not finished, or `out` is something else.
        ConfigError: the shards are of different attacks.
    """
    folders = list(dict.fromkeys(folder.resolve() for folder in folders))
    settings = _common_settings(folders)
    cards = [read_record(AttackShard, folder / SHARD) for folder in folders]
    records = JournalParts(folders, ATTACK, AttackRecord, _key, same=_equal_results)
    names = _check_complete(folders, cards, records)
    if (out / SETTINGS).exists():
        if gaps := differences(read_json_object(out / SETTINGS), settings):
            raise FileError(
                f"{out} is another attack (then and now): {join_gaps(gaps)}. "
                "Name another directory with --out"
            )
        found = JournalParts([out], ATTACK, AttackRecord, _key)
        if lacking := sum(name not in found for name in names):
            raise FileError(
                f"{out} must be new or merged before, got an attack that lacks {lacking} records. "
                "Resume it with its command, or name another directory with --out"
            )
        return cards[0].total
    with staged_directory(out) as staging:
        for folder in folders:
            _copy_files(folder / ATTACK_FILES, staging / ATTACK_FILES)
        records.write(staging / ATTACK, names)
        write_json(staging / SETTINGS, settings)
    return cards[0].total


def _key(record: AttackRecord) -> str:
    return _name(record.id, record.variant)


def _name(id_: str, variant: str) -> str:
    return json.dumps([id_, variant])


def _equal_results(one: AttackRecord, other: AttackRecord) -> bool:
    """Return whether two records are equal, except for their costs."""
    a, b = (record.model_copy(update={"cost": Cost()}) for record in (one, other))
    return a == b


def _common_settings(folders: Sequence[Path]) -> dict[str, Any]:
    """Return the settings of an attack that all shards have.

    Raises:
        FileError: a folder is no shard of an attack.
        ConfigError: the settings differ.
    """
    found = list[Mapping[str, Any]]()
    for folder in folders:
        if not is_attack_shard(folder):
            raise FileError(
                f"{folder} must be a shard of an attack, but has no {SHARD}. Leave it out"
            )
        check_links(folder)
        settings = read_json_object(folder / SETTINGS)
        settings["device"] = device_kind(str(settings.get("device")))
        found.append({key: value for key, value in settings.items() if key != "shard"})
        if gaps := differences(found[0], found[-1]):
            raise ConfigError(
                f"shards to merge must be of one attack, got {folders[0]} and {folder}, which "
                f"differ in {join_gaps(gaps)}. Leave one of them out"
            )
    return dict(found[0])


def _check_complete(
    folders: Sequence[Path], cards: Sequence[AttackShard], records: JournalParts[AttackRecord]
) -> list[str]:
    """Return the names of all records in order.

    Raises:
        ConfigError: the shards are of different numbers of shards.
        FileError: a shard is missing or not finished.
    """
    counts = sorted({card.shard.count for card in cards})
    if len(counts) > 1:
        raise ConfigError(
            "shards to merge must be of one number of shards, got "
            f"{' and '.join(f'I/{count}' for count in counts)}. Leave the others out"
        )
    places = {place: id_ for card in cards for place, id_ in card.samples.items()}
    given = {card.shard.index for card in cards}
    others = (i for i in range(1, counts[0] + 1) if i not in given)
    faults = [f"{i}/{counts[0]} (not given)" for i in others if len(places) < cards[0].total]
    for card, folder in zip(cards, folders, strict=True):
        names = [_name(id_, form) for id_ in card.samples.values() for form in card.variants]
        if lacking := sum(name not in records for name in names):
            faults.append(f"{card.shard} ({folder.name} lacks {lacking} records in {ATTACK})")
    if faults:
        more = f" and {len(faults) - MAX_LINES} more" if len(faults) > MAX_LINES else ""
        raise FileError(
            f"every shard must be finished, but not: {', '.join(faults[:MAX_LINES])}{more}. "
            "Finish each with its command and --shard, and merge all again"
        )
    order = sorted(places)
    return [_name(places[place], form) for place in order for form in cards[0].variants]


def _copy_files(source: Path, target: Path) -> None:
    """Copy the files of an attack.

    Raises:
        FileError: a file is there already, with other bytes.
    """
    for path in sorted(source.rglob("*")) if source.is_dir() else ():
        copy = target / path.relative_to(source)
        if path.is_dir():
            copy.mkdir(parents=True, exist_ok=True)
        elif not copy.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
        elif copy.read_bytes() != path.read_bytes():
            raise FileError(
                f"parts must agree, got another {path.name} in {path.parent}. "
                "Leave one of the parts out."
            )
