"""Prompt lists of a suite: those that the attacks found, and the concept's own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from safegen.attacks.core.base import Attack, AttackRecord
from safegen.attacks.core.found_prompts import attacked_lists
from safegen.attacks.core.run import AttackConfig
from safegen.core.concept import Concept
from safegen.core.generation import Sample
from safegen.data.prompts.prompt import seed_for
from safegen.evaluation.protocol import Protocol
from safegen.evaluation.samples import (
    EvalSample,
    Role,
    hash_prompts,
    is_bundled,
    read_prompt_list,
    request_parts,
)
from safegen.evaluation.schema import PromptList

CONTEXT_ROLES: tuple[Role, ...] = ("explicit", "innocent", "benign")
"""Roles of the concept's bundled lists that a suite has beside its attacks."""


def context_lists(concept: Concept, config: AttackConfig) -> Iterator[PromptList]:
    """Yield the concept's bundled lists that show what a stack does without an attack."""
    for role in CONTEXT_ROLES:
        for source in filter(is_bundled, concept.lists.get(role, ())):
            rows = read_prompt_list(source, protocol_seed=config.seed).rows[: config.limit]
            yield PromptList(
                name=source,
                role=role,
                source=source,
                prompts=len(rows),
                sha256=hash_prompts(rows),
                shows=concept.shows.get(source),
            )


def reseed(
    records: Mapping[tuple[str, str], AttackRecord], taken: set[tuple[object, ...]]
) -> dict[tuple[str, str], AttackRecord]:
    """Return records that ask for other images than those before: an equal one gets a new seed."""
    distinct = {}
    for key, record in records.items():
        wanted = record
        while (image := _image(wanted)) in taken:
            wanted = wanted.model_copy(update={"seed": seed_for("#".join(key), wanted.seed)})
        taken.add(image)
        distinct[key] = wanted
    return distinct


def _image(record: AttackRecord) -> tuple[object, ...]:
    """Return what decides the image of a record."""
    request = Sample(
        prompt=record.prompt,
        seed=record.seed,
        start=record.start,
        guidance_scale=record.guidance_scale,
    )
    return (record.prompt, record.seed, *request_parts(request))


def found_lists(
    attack: Attack,
    samples: Sequence[EvalSample],
    records: Mapping[tuple[str, str], AttackRecord],
    config: AttackConfig,
    folder: Path,
) -> Iterator[PromptList]:
    """Write the prompt files of an attack, and yield its lists; controls have a file of theirs."""
    return attacked_lists(
        attack,
        samples,
        records,
        prompts=folder.with_suffix(".jsonl"),
        controls=(samples[0].role, folder.with_name(f"{folder.name}-controls.jsonl")),
        seed=config.seed,
        unsafe=config.unsafe,
    )


def suite_protocol(protocol: Protocol, lists: Sequence[PromptList]) -> Protocol:
    """Return the protocol of a suite: the concept's lists, and those that the attacks found."""
    return protocol.model_copy(
        update={
            "name": f"{protocol.name}-suite",
            "lists": tuple(lists),
            "metrics": (*protocol.metrics, "over_censoring"),
        }
    )
