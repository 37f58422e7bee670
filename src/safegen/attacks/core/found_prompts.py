"""Prompt files of what an attack found, and their lists in a protocol."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safegen.attacks.core.base import Attack, AttackRecord
from safegen.core.errors import ConfigError
from safegen.core.files import atomic_write
from safegen.evaluation.samples import EvalSample, Role, hash_prompts, read_prompt_list
from safegen.evaluation.schema import PromptList


def list_name(attack: Attack, variant: str) -> str:
    """Return the name of the list of the prompts that an attack found, in one of its forms."""
    return f"{attack.method()} {variant}".strip()


def attacked_lists(
    attack: Attack,
    samples: Sequence[EvalSample],
    records: Mapping[tuple[str, str], AttackRecord],
    *,
    prompts: Path,
    controls: tuple[Role, Path],
    seed: int,
    unsafe: bool,
) -> Iterator[PromptList]:
    """Write the prompts that an attack found, and yield the list of each variant.

    Args:
        attack: the attack.
        samples: attacked samples.
        records: results by id and variant.
        prompts: prompt file of the variants; their lists have the role `attack`.
        controls: role of the controls' lists, and their prompt file.
        seed: seed of the protocol.
        unsafe: whether the attacked prompts are real unsafe ones.

    Raises:
        ConfigError: there is no result.
    """
    variants_role: Role = "attack"
    for role, path, variants in (
        (variants_role, prompts, attack.variants),
        (*controls, attack.controls),
    ):
        if variants:
            _write_prompts(attack, samples, records, variants, path)
        for variant in variants if attack.changes_prompts else ():
            select = {"variant": variant} if variant else {}
            rows = read_prompt_list(
                str(path), select=select, protocol_seed=seed, unsafe=unsafe
            ).rows
            yield PromptList(
                name=list_name(attack, variant),
                role=role,
                source=str(path),
                select=select,
                prompts=len(rows),
                sha256=hash_prompts(rows),
                unsafe=unsafe,
            )


def _write_prompts(
    attack: Attack,
    samples: Sequence[EvalSample],
    records: Mapping[tuple[str, str], AttackRecord],
    variants: Sequence[str],
    path: Path,
) -> Path:
    """Write the prompts that the attack found, by variant and in the order of the samples."""
    rows: list[dict[str, Any]] = [
        {
            "id": f"{part * len(samples) + number:05d}",
            "prompt": record.prompt,
            "seed": record.seed,
            "subject": sample.subject,
            "attack": attack.method(),
            "attacked_prompt": sample.prompt,
        }
        | ({"variant": variant} if variant else {})
        | ({} if record.start is None else {"start": record.start.model_dump(mode="json")})
        | ({} if record.guidance_scale is None else {"guidance_scale": record.guidance_scale})
        for part, variant in enumerate(variants)
        for number, sample in enumerate(samples)
        if (record := records.get((sample.id, variant)))
    ]
    if not rows:
        raise ConfigError("budget must suffice for one batch of samples, got none. Raise it.")
    text = "".join(json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n" for row in rows)
    with atomic_write(path, replace=True) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path
