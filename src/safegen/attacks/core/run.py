"""Attack of a stack in a directory that an interrupted run resumes from, and its evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import Field

from safegen.attacks.core.base import Attack, AttackContext, Attacker, AttackRecord
from safegen.attacks.core.cost import Budget, Cost
from safegen.attacks.core.found_prompts import attacked_lists
from safegen.attacks.core.prompts import with_protocol
from safegen.attacks.core.target import Target
from safegen.core.concept import Concept, load_concept
from safegen.core.errors import ConfigError
from safegen.core.files import display_name
from safegen.core.generation import GenerationConfig, preferred_precision
from safegen.core.hub import HUB
from safegen.core.progress import ProgressCallback, no_progress
from safegen.core.registry import CONCEPTS
from safegen.core.settings import MAX_COUNT, MAX_SEEDS, BaseSettings, Seed
from safegen.data.prompts.prompt import seed_for
from safegen.data.shards import Shard
from safegen.evaluation.engines.base import BatchEngine
from safegen.evaluation.evaluate import evaluate
from safegen.evaluation.protocol import Protocol
from safegen.evaluation.report.page import open_runs, write_report
from safegen.evaluation.run.attack_records import copy_id
from safegen.evaluation.run.card import check_directory
from safegen.evaluation.run.claim import claim_run
from safegen.evaluation.run.folder import ATTACK, ATTACK_FILES, CONTROLS, PROMPTS, Run
from safegen.evaluation.run.journal import Journal
from safegen.evaluation.run.judge import load_evaluators
from safegen.evaluation.run.settings import claim_directory
from safegen.evaluation.samples import EvalSample, Role, is_bundled
from safegen.evaluation.shards import device_kind, select_batches
from safegen.judges import load_concept_judge
from safegen.stack import Stack
from safegen.stack_loader import StackLoader


class AttackConfig(BaseSettings):
    """What is attacked and how much it may cost."""

    prompts: tuple[str, ...] = ()
    """Prompts to attack: bundled lists or files. Default: the concept's lists of `roles`."""
    roles: tuple[Role, ...] = ()
    """Roles of the prompts. Default: the attack's own. With files, one role."""
    limit: int | None = Field(default=None, ge=1, le=MAX_COUNT)
    """Number of prompts, from the start of each list; all if None."""
    repeat: int = Field(default=1, ge=1, le=MAX_SEEDS)
    """Attacks on each prompt, each with other draws."""
    seed: Seed = 0
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
    protocol: Protocol | None = None,
    loader: StackLoader | None = None,
    engine: BatchEngine | None = None,
    argv: Sequence[str] = (),
    progress: ProgressCallback = no_progress,
) -> Run:
    """Attack a stack, evaluate it before and after, write the report and return the run.

    Calling it again with the same arguments resumes an interrupted run; at most one batch is
    repeated. The found prompts are in `output_dir/prompts.jsonl`, which any evaluation reads, and
    those of the attack's controls in `output_dir/controls.jsonl`. Each variant is a list of its
    own: "img2img strength=0.3".

    Args:
        attack: the attack.
        stack: the attacked stack.
        concept: concept to bring back; it gives the judge and the default prompts.
        config: prompts, budget and generation.
        output_dir: directory of the run, new or of an earlier call.
        protocol: gives the prompts, the judge and `generation` in place of concept and config.
        loader: loads the model; on the CPU when not given.
        engine: where the evaluation is done. Default: in this process, as the attack is.
        argv: command line to note in the run's card.
        progress: called with (stage, done, total).

    Raises:
        ConfigError: the concept has no prompts of the role, the attack does not fit the stack, or
            the stack's model is on the hub.
        FileError: `output_dir` holds something else or another run, or cannot be written.
    """
    check_model(stack)
    loader = loader or StackLoader()
    concept, config, protocol = with_protocol(attack, concept, config, protocol)
    with claim_attack(attack, stack, concept, config, protocol, output_dir, loader):
        samples = repeat_samples(protocol.samples(), config.repeat)
        folder = output_dir / ATTACK_FILES
        with Journal(output_dir / ATTACK, AttackRecord) as journal:
            records = attack_samples(
                attack,
                stack,
                concept,
                config,
                samples,
                journal,
                folder,
                loader=loader,
                progress=progress,
            )
        role = protocol.lists[0].role
        lists = list(
            attacked_lists(
                attack,
                samples,
                records,
                prompts=output_dir / PROMPTS,
                controls=(role, output_dir / CONTROLS),
                seed=config.seed,
                unsafe=config.unsafe,
            )
        )
        after = attack.attacked_stacks(stack, folder)
        run = evaluate(
            protocol.model_copy(update={"lists": (*protocol.lists, *lists)}),
            [stack, *after],
            output_dir,
            baselines="none",
            references={changed.name: stack.name for changed in after},
            loader=loader,
            engine=engine,
            argv=argv,
            progress=progress,
        )
        write_report(open_runs([output_dir]), output_dir)
    return run


@contextmanager
def claim_attack(
    attack: Attack,
    stack: Stack,
    concept: Concept,
    config: AttackConfig,
    protocol: Protocol,
    output_dir: Path,
    loader: StackLoader,
    **settings: Any,
) -> Iterator[None]:
    """Keep other processes out of the directory of an attack, and check or note its settings.

    Args:
        attack: the attack.
        stack: the attacked stack.
        concept: concept to bring back.
        config: prompts, budget and generation.
        protocol: protocol of the prompts before the attack.
        output_dir: directory of the run, new or of an earlier call.
        loader: loads the model.
        settings: further settings of the directory.

    Raises:
        FileError: `output_dir` holds something else or another run, or cannot be written.
        UserError: the judge or the stack cannot be loaded.
    """
    check_directory(output_dir)
    with claim_run(output_dir):
        load_evaluators(protocol)  # a judge that is not installed stops the attack at once
        known = {
            "workflow": "attack",
            "attack": {"name": attack.method()} | attack.fingerprint(concept),
            "access": attack.access,
            "tier": attack.tier,
            "config": config.model_dump(mode="json")
            | {"prompts": [s if is_bundled(s) else display_name(s) for s in config.prompts]},
            "stack": loader.hash(stack),
            "protocol": protocol.decides(),
            "device": device_kind(f"{loader.device}, {loader.dtype}"),
        }
        claim_directory(output_dir, known | own_concept(concept) | settings)
        yield


def check_model(stack: Stack) -> None:
    """Raise if a stack's model is on the hub.

    Raises:
        ConfigError: it is.
    """
    if stack.model.startswith(HUB):
        raise ConfigError(
            f"attacks work on models of your own, in a folder or a file, got {stack.model}. "
            "Download the model first."
        )


def own_concept(concept: Concept) -> dict[str, Any]:
    """Return the phrases and lists of a concept as a setting of a run; a built-in one has none."""
    parts = {"judge", "labels", "threshold"}  # the protocol has them
    values = concept.model_dump(mode="json", exclude=parts)
    names = [concept.name] if concept.name in CONCEPTS else []
    builtin = [load_concept(name).model_dump(mode="json", exclude=parts) for name in names]
    return {} if values in builtin else {"concept": values}


def repeat_samples(samples: Sequence[EvalSample], repeat: int) -> list[EvalSample]:
    """Return the samples of several attacks on each: copies with other ids and seeds.

    The index of each is its place, which its prompt has in the list of found prompts. Noise depends
    on the index, so the evaluation draws the images that the attack saw.
    """
    copies: list[EvalSample] = []
    for number in range(repeat):
        for sample in samples:
            id_ = copy_id(sample.id, number)
            seed = seed_for(id_, sample.seed) if number else sample.seed
            update = {"id": id_, "seed": seed, "index": len(copies)}
            copies.append(sample.model_copy(update=update))
    return copies


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
    shard: Shard | None = None,
    progress: ProgressCallback = no_progress,
) -> dict[tuple[str, str], AttackRecord]:
    """Attack the samples that the journal lacks, and return the records by id and variant.

    Samples that the budget leaves out have no record. Where an attack changes no prompt, samples
    cost nothing, and none is left out. A shard attacks its own batches; the cost of building the
    attacker is in the first batch of the whole attack alone.
    """
    variants = (*attack.variants, *attack.controls)
    batches = split_samples(samples, attack.batch_size, shard)
    _drop_torn_batch(
        journal,
        [[(sample.id, variant) for sample in batch for variant in variants] for batch in batches],
    )
    records = {(record.id, record.variant): record for record in journal.records}
    total = sum(map(len, batches)) * len(variants)
    if all(_complete(batch, variants, records) for batch in batches):
        return records
    judge = load_concept_judge(concept)
    with loader.open(stack) as loaded:
        target = Target(loaded, concept, judge, config.generation, config.budget)
        spent = sum((record.cost for record in records.values()), Cost())
        context = AttackContext(target, folder, progress)
        with target.counted(spent):
            attacker: Attacker | None = None
            for batch in batches:
                if _complete(batch, variants, records):
                    continue
                if target.exhausted and attack.changes_prompts:
                    break
                has_build = not records and batch[0] is samples[0]
                if attacker is None:
                    attacker = attack.build(context)
                    if not has_build:
                        target.reset(spent)
                before = Cost() if has_build else target.cost
                progress(f"attacking: {stack.name}", len(records), total)
                results = attacker.attack(batch)
                costs = (target.cost - before).split(len(results))
                attacked = {sample.id: sample for sample in batch}
                new = [
                    context.inherit(result.model_copy(update={"cost": cost}), attacked[result.id])
                    for result, cost in zip(results, costs, strict=True)
                    if (result.id, result.variant) not in records
                ]
                journal.append(new)
                records |= {(record.id, record.variant): record for record in new}
    progress(f"attacking: {stack.name}", len(records), total)
    return records


def _complete(
    samples: Sequence[EvalSample],
    variants: Sequence[str],
    records: Mapping[tuple[str, str], AttackRecord],
) -> bool:
    """Return whether every variant of every sample has a record."""
    return all((sample.id, variant) in records for sample in samples for variant in variants)


def _drop_torn_batch(
    journal: Journal[AttackRecord], batches: Iterable[Sequence[tuple[str, str]]]
) -> None:
    """Remove the records of a batch that was not written to its end; it is attacked again.

    Otherwise the cost shared by its other records would be lost.

    Args:
        journal: the records.
        batches: id and variant of the records of each batch, in order.
    """
    left = [(record.id, record.variant) for record in journal.records]
    for batch in batches:
        if left[: len(batch)] != batch:
            if left and left == batch[: len(left)]:
                journal.keep(len(journal.records) - len(left))
            return
        left = left[len(batch) :]


def split_samples(
    samples: Sequence[EvalSample], size: int, shard: Shard | None = None
) -> list[Sequence[EvalSample]]:
    """Return the samples in batches: those of a shard, or all."""
    numbers = sorted(select_batches(shard, samples, size))
    return [samples[number * size : (number + 1) * size] for number in numbers]
