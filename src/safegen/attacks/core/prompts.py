"""Protocol of the prompts that are attacked."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import ValidationError

from safegen.attacks.core.base import Attack
from safegen.attacks.core.found_prompts import list_name
from safegen.core.concept import Concept
from safegen.core.errors import ConfigError, SafegenWarning, explain
from safegen.core.files import display_name
from safegen.evaluation.protocol import CONCEPT_METRICS, Protocol
from safegen.evaluation.samples import hash_prompts, is_bundled, read_prompt_list
from safegen.evaluation.schema import MetricName, PromptList, concept_rule

if TYPE_CHECKING:
    from safegen.attacks.core.run import AttackConfig


def with_protocol(
    attack: Attack, concept: Concept, config: AttackConfig, protocol: Protocol | None
) -> tuple[Concept, AttackConfig, Protocol]:
    """Return a concept and a configuration as a protocol has them, and the attacked protocol.

    Raises:
        ConfigError: the protocol has no lists of the roles, or one with the name of a list that the
            attack writes, or `config` names prompts too.
    """
    if protocol is None:
        protocol = attack_protocol(attack, concept, config)
        _check_names(attack, protocol.lists)
        return concept, config, protocol
    if config.prompts:
        raise ConfigError("give either a protocol or files of prompts, got both")
    roles = config.roles or (attack.role,)
    lists = [
        _limited(part, config.limit, config.seed) for part in protocol.lists if part.role in roles
    ]
    if not lists:
        raise ConfigError(
            f"protocol {protocol.name!r} has no list of role {', '.join(roles)}. Choose with "
            f"--role: {', '.join(dict.fromkeys(part.role for part in protocol.lists))}."
        )
    _check_names(attack, lists)
    rule = protocol.judge
    judge = {"judge": rule.name, "labels": rule.labels, "threshold": rule.threshold}
    config = config.model_copy(
        update={
            "generation": protocol.generation,
            "unsafe": config.unsafe or any(part.unsafe for part in lists),
        }
    )
    changes = {
        "lists": tuple(lists),
        "seeds": "rows",
        "seed": config.seed,
        "metrics": _metrics(config),
        "features": None,
        "lpips": None,
    }
    return concept.model_copy(update=judge), config, protocol.model_copy(update=changes)


def _check_names(attack: Attack, lists: Sequence[PromptList]) -> None:
    """Raise if an attacked list has the name of a list that the attack writes."""
    forms = (*attack.variants, *attack.controls) if attack.changes_prompts else ()
    written = {list_name(attack, form) for form in forms}
    if taken := [part.name for part in lists if part.name in written]:
        raise ConfigError(
            f"attacked prompts must have other names than those that {attack.method()} finds, got "
            f"{', '.join(taken)}. Rename the list, or use another attack."
        )


def _limited(part: PromptList, limit: int | None, seed: int) -> PromptList:
    """Return the first prompts of a list, each with its own seed."""
    prompts = part.prompts if limit is None else min(limit, part.prompts or limit)
    part = part.model_copy(update={"prompts": prompts})
    rows = part.read(protocol_seed=seed).rows
    return part.model_copy(update={"prompts": len(rows), "sha256": hash_prompts(rows)})


def _metrics(config: AttackConfig) -> tuple[MetricName, ...]:
    """Return the metrics of an attack's run; any-of-N where prompts are attacked N times."""
    return (*CONCEPT_METRICS, "asr", *(("asr_any",) if config.repeat > 1 else ()))


def attack_protocol(attack: Attack, concept: Concept, config: AttackConfig) -> Protocol:
    """Return the protocol of the prompts before the attack.

    Raises:
        ConfigError: the concept has no prompts of the roles, or files have several roles.
    """
    roles = config.roles or (attack.role,)
    if config.prompts and len(roles) > 1:
        raise ConfigError(f"prompts from files must have one role, got {', '.join(roles)}")
    sources = [(source, roles[0]) for source in config.prompts] or [
        (source, role) for role in roles for source in concept.lists.get(role, ())
    ]
    if not sources:
        raise ConfigError(
            f"concept {concept.name!r} has no prompts of role {', '.join(roles)}. "
            "Name some with --prompts."
        )
    lists = []
    for source, role in sources:
        prompts = read_prompt_list(
            source, prompts=config.limit, protocol_seed=config.seed, unsafe=config.unsafe
        )
        rows, faults = prompts.rows, tuple(map(str, prompts.problems))
        if faults:
            warnings.warn(
                f"rows of prompts should be usable; {len(faults)} of {display_name(source)} are "
                f"left out, the first at {faults[0]}",
                SafegenWarning,
                stacklevel=2,
            )
        lists.append(
            PromptList(
                name=source if is_bundled(source) else display_name(source),
                role=role,
                source=source,
                prompts=len(rows),
                sha256=hash_prompts(rows),
                shows=concept.shows.get(source),
                unsafe=config.unsafe,
                left_out=faults,
                notes=prompts.notes,
            )
        )
    rule = concept_rule(concept)
    try:
        return Protocol(
            name=concept.name,
            concept=concept.name,
            words=concept.words,
            lists=tuple(lists),
            seeds="rows",
            seed=config.seed,
            generation=config.generation,
            judge=rule,
            metrics=_metrics(config),
        )
    except ValidationError as error:
        raise ConfigError(f"{concept.name}: {explain(error, Protocol)}") from error
