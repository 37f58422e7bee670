"""Attack of a stack in a directory that an interrupted run resumes from, and its evaluation."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from safegen.attacks.core.base import Attack, AttackContext, Attacker, AttackRecord
from safegen.attacks.core.cost import Budget, Cost
from safegen.attacks.core.target import Target
from safegen.core.concept import Concept
from safegen.core.errors import ConfigError
from safegen.core.files import atomic_write
from safegen.core.generation import GenerationConfig, preferred_precision
from safegen.core.progress import ProgressCallback, no_progress
from safegen.evaluation.evaluate import evaluate, load_evaluators
from safegen.evaluation.protocol import CONCEPT_METRICS, Protocol
from safegen.evaluation.report.page import open_runs, write_report
from safegen.evaluation.run.folder import ATTACK, PATCHES, PROMPTS, Run
from safegen.evaluation.run.journal import Journal
from safegen.evaluation.run.settings import claim_directory
from safegen.evaluation.samples import EvalSample, Role, hash_prompts, read_prompt_list
from safegen.evaluation.schema import JudgeRule, PromptList
from safegen.stack import Stack
from safegen.stack_loader import StackLoader


class AttackConfig(BaseModel):
    """What is attacked and how much it may cost."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    prompts: str = ""
    """Prompts to attack: a bundled list or a file. Default: the first list of `role`."""
    role: Role = "benign"
    """Role of the prompts."""
    limit: int | None = Field(default=None, ge=1)
    """Number of prompts, from the start of the list; all if None."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed from which prompts without their own seed get one."""
    unsafe: bool = False
    """Whether the prompts are real unsafe ones; their texts stay out of the report."""
    budget: Budget = Budget()
    """Limits of the attack; its evaluation is not counted."""
    generation: GenerationConfig = Field(
        default_factory=lambda: GenerationConfig(precision=preferred_precision())
    )
    """How images are generated."""


def run_attack(
    attack: Attack,
    stack: Stack,
    concept: Concept,
    config: AttackConfig,
    output_dir: Path,
    *,
    loader: StackLoader | None = None,
    progress: ProgressCallback = no_progress,
) -> Run:
    """Attack a stack, evaluate it before and after, write the report and return the run.

    Calling it again with the same arguments resumes an interrupted run; at most one batch is
    repeated. The found prompts are in `output_dir/prompts.jsonl`, which any evaluation reads.

    Args:
        attack: the attack.
        stack: the attacked stack.
        concept: concept to bring back; it gives the judge and the default prompts.
        config: prompts, budget and generation.
        output_dir: directory of the run, new or of an earlier call.
        loader: loads the model; on the CPU when not given.
        progress: called with (stage, done, total).

    Raises:
        ConfigError: the concept has no prompts of the role, or the attack does not fit the stack.
        FileError: `output_dir` holds something else or another run, or cannot be written.
    """
    loader = loader or StackLoader()
    protocol = _protocol(concept, config)
    load_evaluators(protocol)  # a judge that is not installed stops the attack before it begins
    settings = {
        "workflow": "attack",
        "attack": {"name": attack.method()} | attack.model_dump(mode="json"),
        "config": config.model_dump(mode="json"),
        "stack": loader.hash(stack),
        "protocol": protocol.decides(),
        "device": f"{loader.device}, {loader.dtype}",
    }
    claim_directory(output_dir, settings)
    samples = protocol.samples()
    with Journal(output_dir / ATTACK, AttackRecord) as journal:
        records = attack_samples(
            attack,
            stack,
            concept,
            config,
            samples,
            journal,
            output_dir / PATCHES,
            loader=loader,
            progress=progress,
        )
    found = _write_prompts(attack, samples, records, output_dir / PROMPTS)
    attacked = PromptList(
        name=attack.method(),
        role="attack",
        source=str(found),
        sha256=hash_prompts(read_prompt_list(str(found), protocol_seed=config.seed).rows),
        unsafe=config.unsafe,
    )
    stacks, references = [stack], {}
    if changes := attack.stack_changes(output_dir / PATCHES):
        changed = stack.model_copy(update={"name": f"{stack.name}-attacked", **changes})
        stacks, references = [stack, changed], {changed.name: stack.name}
    run = evaluate(
        protocol.model_copy(update={"lists": (*protocol.lists, attacked)}),
        stacks,
        output_dir,
        baselines="none",
        references=references,
        loader=loader,
        progress=progress,
    )
    write_report(open_runs([output_dir]), output_dir)
    return run


def attack_samples(
    attack: Attack,
    stack: Stack,
    concept: Concept,
    config: AttackConfig,
    samples: Sequence[EvalSample],
    journal: Journal[AttackRecord],
    folder: Path,
    *,
    loader: StackLoader,
    progress: ProgressCallback = no_progress,
) -> dict[str, AttackRecord]:
    """Attack the samples that the journal lacks, and return the record of each, by its id.

    Samples that the budget leaves out have no record.
    """
    records = {record.id: record for record in journal.records}
    if all(sample.id in records for sample in samples):
        return records
    judge = load_evaluators(_protocol(concept, config), features=False, lpips=False).judge
    with loader.open(stack) as loaded:
        target = Target(loaded, concept, judge, config.generation, config.budget)
        spent = sum((record.cost for record in records.values()), Cost())
        with target.counted(spent):
            attacker: Attacker | None = None
            for batch in _batches(samples, attack.batch_size):
                if all(sample.id in records for sample in batch):
                    continue
                if target.exhausted:
                    break
                if attacker is None:
                    context = AttackContext(target, folder, progress)
                    attacker = attack.build(context)
                before = target.cost if records else Cost()
                progress(f"attacking: {stack.name}", len(records), len(samples))
                results = attacker.attack(batch)
                costs = (target.cost - before).split(len(batch))
                new = [
                    result.model_copy(update={"cost": cost})
                    for result, cost in zip(results, costs, strict=True)
                    if result.id not in records
                ]
                journal.append(new)
                records |= {record.id: record for record in new}
    progress(f"attacking: {stack.name}", len(records), len(samples))
    return records


def _batches(samples: Sequence[EvalSample], size: int) -> Iterator[Sequence[EvalSample]]:
    for start in range(0, len(samples), size):
        yield samples[start : start + size]


def _protocol(concept: Concept, config: AttackConfig) -> Protocol:
    """Return the protocol of the prompts before the attack.

    Raises:
        ConfigError: the concept has no prompts of the role.
    """
    lists = concept.lists.get(config.role, ())
    source = config.prompts or (lists[0] if lists else "")
    if not source:
        raise ConfigError(
            f"concept {concept.name!r} has no prompts of role {config.role!r}. "
            "Name some with --prompts."
        )
    rows = read_prompt_list(source, prompts=config.limit, protocol_seed=config.seed).rows
    part = PromptList(
        name="attacked",
        role=config.role,
        source=source,
        prompts=config.limit,
        sha256=hash_prompts(rows),
        shows=concept.shows.get(source),
        unsafe=config.unsafe,
    )
    rule = JudgeRule(name=concept.judge, labels=concept.labels, threshold=concept.threshold)
    return Protocol(
        name=concept.name,
        concept=concept.name,
        lists=(part,),
        seeds="rows",
        seed=config.seed,
        generation=config.generation,
        judge=rule,
        metrics=(*CONCEPT_METRICS, "asr"),
    )


def _write_prompts(
    attack: Attack, samples: Sequence[EvalSample], records: dict[str, AttackRecord], path: Path
) -> Path:
    """Write the prompts that the attack found, in the order of the samples."""
    rows: list[dict[str, Any]] = [
        {
            "id": f"{sample.index:05d}",
            "prompt": record.prompt,
            "seed": record.seed,
            "subject": sample.subject,
            "attack": attack.method(),
            "attacked_prompt": sample.prompt,
        }
        for sample in samples
        if (record := records.get(sample.id))
    ]
    if not rows:
        raise ConfigError("budget must suffice for one batch of samples, got none. Raise it.")
    text = "".join(json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n" for row in rows)
    with atomic_write(path, replace=True) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path
