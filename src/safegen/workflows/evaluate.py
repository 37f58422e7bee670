"""Evaluate models beside their base, on a protocol or on the user's own prompts, in one call."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safegen.core.concept import Concept, load_concept
from safegen.core.errors import ConfigError, SafegenWarning, check_keywords
from safegen.core.generation import GenerationConfig, NativePrecision, preferred_precision
from safegen.core.progress import ProgressCallback, no_progress
from safegen.core.registry import MODELS
from safegen.data.shards import Shard
from safegen.edits.training.presets import is_full_size
from safegen.evaluation import evaluate as evaluation
from safegen.evaluation.engines.base import BatchEngine
from safegen.evaluation.own_prompts import (
    RowSeeds,
    concept_judge,
    concept_lists,
    limit_lists,
    prompt_protocol,
    read_lists,
)
from safegen.evaluation.protocol import Protocol
from safegen.evaluation.protocol_file import load_protocol
from safegen.evaluation.report.page import open_runs, write_report
from safegen.evaluation.run.folder import Run
from safegen.models.model import Model
from safegen.stack import Stack, load_stack
from safegen.stack_loader import StackLoader

BASE = "base"
"""Name of the base stack, if the user gives none."""
CONCEPT_PROMPTS = 24
"""Prompts of each list of a concept that are used without a limit."""
Stacks = Mapping[str, str | Path] | Sequence[str | Path | Stack]


class OwnBaseWarning(SafegenWarning):
    """An edited model is its own base, so nothing says what was removed from it."""


@check_keywords
def evaluate(
    base: Model | Stack | str | Path | None = None,
    stacks: Stacks = (),
    *,
    out: str | Path,
    concept: Concept | str | Path | None = None,
    prompts: str | Path | Sequence[str | Path] = (),
    column: str | None = None,
    judge: str | None = None,
    labels: Sequence[str] = (),
    threshold: float | None = None,
    judge_options: Mapping[str, Any] | None = None,
    protocol: Protocol | str | Path | None = None,
    seeds: int | Sequence[int] | RowSeeds | None = None,
    limit: int | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    true_cfg_scale: float | None = None,
    precision: NativePrecision | None = None,
    baselines: evaluation.Baselines = "all",
    until: evaluation.Stage = "score",
    shard: Shard | str | None = None,
    engine: BatchEngine | None = None,
    loader: StackLoader | None = None,
    argv: Sequence[str] = (),
    announce: Callable[[Protocol], None] = lambda _: None,
    progress: ProgressCallback = no_progress,
) -> Run:
    """Generate, judge and score the images of some stacks and of their base; return the run.

    The same call resumes an interrupted run. The protocol is written to `OUT/protocol.toml`, the
    report to `Run.report`. Printed, the run is a table of its rates.

    Args:
        base: model that all stacks are compared with: a name, a folder, a file or
            `hub:owner/name`, or a `Model` that is loaded. Default: each stack's own model without
            patches.
        stacks: sources by name, or a list of what `load_stack` reads.
        out: directory of the run, new or of an earlier call.
        concept: a name, a TOML file or a `Concept`: it gives judge, labels, threshold and words.
        prompts: files, `ROLE=FILE`, or `mini:LIST`. Default: the concept's own lists. With a
            protocol: `NAME=FILE` for its lists that need a file.
        column: column of the files that holds the prompts.
        judge: judge to use instead of the concept's.
        labels: its label or labels that mean the concept.
        threshold: lowest score of a detection that counts.
        judge_options: options of the judge.
        protocol: a built-in name, a TOML file or a `Protocol`; it sets everything else but `limit`
            and `precision`.
        seeds: number of seeds for each prompt (1 to N), the seeds, or `rows`. Default: 1.
        limit: first prompts of each list to use. It changes the protocol's ID.
        num_inference_steps: denoising steps. Default: 25 on a miniature model, else 50.
        guidance_scale: scale of guidance. Default: 5 on a miniature model, else 7.5.
        true_cfg_scale: FLUX: scale of guidance away from a negative prompt. Default: 1, off.
        precision: arithmetic of the denoiser. Default: what the device computes natively.
        baselines: `all` adds a negative prompt and black images.
        until: last stage to do: `generate`, `judge` or `score`.
        shard: part of the run to do, `1/4` to `4/4`; a shard is not scored, `merge` joins them.
        engine: where batches are done, such as `RayBatchEngine(workers=2)`. Default: this process.
        loader: loads the models.
        argv: command line to note in the run's card.
        announce: called with the protocol before anything is generated.
        progress: called with (description, done, total).

    Raises:
        UserError: an argument cannot be used.

    Example:
        >>> model = safegen.load("mini")
        >>> few = {"limit": 1, "num_inference_steps": 2, "baselines": "none"}
        >>> run = safegen.evaluate(model, concept="skulls", out="run", **few)
        >>> run.scores["stacks"]["base"]["lists"]["mini:skulls"]["concept"]["n"]
        1
    """
    if isinstance(base, Model):
        loader = loader or StackLoader(model=base)
        base = Stack(name=BASE, model=base.name)
    loader = loader or StackLoader()
    part = None if shard is None else Shard.parse(shard)
    prepared = prepare_evaluation(
        base,
        stacks,
        concept=concept,
        prompts=prompts,
        column=column,
        judge=judge,
        labels=labels,
        threshold=threshold,
        judge_options=judge_options,
        protocol=protocol,
        seeds=seeds,
        limit=limit,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        true_cfg_scale=true_cfg_scale,
        precision=precision,
        loader=loader,
    )
    announce(prepared.protocol)
    run = evaluation.evaluate(
        prepared.protocol,
        prepared.stacks,
        Path(out),
        base=prepared.base,
        baselines=baselines,
        until=until,
        shard=part,
        engine=engine,
        loader=loader,
        save_protocol=True,
        argv=argv,
        progress=progress,
    )
    if until == "score" and part is None:
        write_report(open_runs([run.folder]), run.folder)
    return run


@dataclass(frozen=True)
class PreparedEvaluation:
    """Arguments of an evaluation, read and checked."""

    protocol: Protocol
    """What is generated and how it is judged."""
    stacks: Sequence[Stack]
    """Stacks to evaluate."""
    base: Stack | None
    """Stated base of all stacks."""


def prepare_evaluation(
    base: Stack | str | Path | None = None,
    stacks: Stacks = (),
    *,
    concept: Concept | str | Path | None = None,
    prompts: str | Path | Sequence[str | Path] = (),
    column: str | None = None,
    judge: str | None = None,
    labels: Sequence[str] = (),
    threshold: float | None = None,
    judge_options: Mapping[str, Any] | None = None,
    protocol: Protocol | str | Path | None = None,
    seeds: int | Sequence[int] | RowSeeds | None = None,
    limit: int | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    true_cfg_scale: float | None = None,
    precision: NativePrecision | None = None,
    loader: StackLoader,
) -> PreparedEvaluation:
    """Return the protocol, stacks and base of an evaluation; nothing is generated.

    Arguments and errors are those of `evaluate`.
    """
    members, plain = _load_stacks(stacks), _load_base(base)
    sources = [prompts] if isinstance(prompts, str | Path) else list(prompts)
    first = plain or (members[0] if members else None)
    if first is None:
        raise ConfigError("a model must be given, got none. Name it first, or use --stack")
    named = {
        "concept": concept,
        "judge": judge,
        "label": ([labels] if isinstance(labels, str) else labels) or None,
        "threshold": threshold,
        "judge_option": judge_options or None,
        "column": column,
        "seeds": seeds,
        "steps": num_inference_steps,
        "guidance": guidance_scale,
        "true_cfg": true_cfg_scale,
    }
    if protocol is not None:
        rules = _given_protocol(protocol, sources, named)
    else:
        rules = _own_protocol(first, sources, named, limit, loader)
    if limit is not None:
        rules = limit_lists(rules, limit)
    if precision is not None:
        rules = rules.with_precision(precision)
    if plain is None:
        _warn_of_own_bases(members)
    return PreparedEvaluation(rules, members, plain)


def _load_stacks(stacks: Stacks) -> list[Stack]:
    """Return stacks from sources by name, or from a list of sources."""
    if isinstance(stacks, Mapping):
        specs = [f"{k}={v}" if isinstance(v, str | Path) else v for k, v in stacks.items()]
        return [load_stack(spec) for spec in specs]
    return [stack if isinstance(stack, Stack) else load_stack(stack) for stack in stacks]


def _load_base(base: Stack | str | Path | None) -> Stack | None:
    """Return the base stack; it is named `base` unless the user wrote `NAME=MODEL`."""
    if base is None or isinstance(base, Stack):
        return base
    stack = load_stack(base)
    name = stack.name if str(base).startswith(f"{stack.name}=") else BASE
    return stack.model_copy(update={"name": name})


def _given_protocol(
    protocol: Protocol | str | Path, prompts: Sequence[str | Path], named: Mapping[str, Any]
) -> Protocol:
    """Return a protocol that the user named, with the files of its lists.

    Raises:
        ConfigError: something is given that the protocol sets, or prompts are not `NAME=FILE`.
    """
    for name in (name for name, value in named.items() if value is not None):
        raise ConfigError(
            f"--{name.replace('_', '-')} has no effect with --protocol, which sets it. "
            "Leave one of the two out"
        )
    if isinstance(protocol, Protocol):
        if prompts:
            raise ConfigError(
                f"prompts must be left out with a Protocol, which has its own, got {len(prompts)}"
            )
        return protocol
    files = {}
    for pair in map(str, prompts):
        part, _, file = pair.partition("=")
        if not (part and file):
            raise ConfigError(f"--prompts must be NAME=FILE with --protocol, got {pair!r}")
        files[part] = file
    return load_protocol(str(protocol), prompts=files)


def _own_protocol(
    first: Stack,
    prompts: Sequence[str | Path],
    named: Mapping[str, Any],
    limit: int | None,
    loader: StackLoader,
) -> Protocol:
    """Return the protocol of a concept on the user's prompts, or on the concept's own.

    Raises:
        ConfigError: there is no concept, or a setting breaks its rule.
        UserError: a file of prompts or the model cannot be read.
    """
    if named["concept"] is None:
        raise ConfigError("a concept must be given, got none. Use --concept, or --protocol")
    known = named["concept"]
    concept = known if isinstance(known, Concept) else load_concept(str(known))
    rule = concept_judge(
        concept,
        named["judge"],
        labels=named["label"] or (),
        threshold=named["threshold"],
        options=named["judge_option"],
    )
    seeds = 1 if named["seeds"] is None else named["seeds"]
    if prompts:
        lists = read_lists(
            list(map(str, prompts)),
            concept,
            limit=limit,
            row_seeds=seeds == "rows",
            column=named["column"],
            unsafe=first.model not in MODELS,
        )
    else:
        lists = concept_lists(concept, limit=CONCEPT_PROMPTS if limit is None else limit)
    return prompt_protocol(
        concept,
        lists,
        judge=rule,
        seeds=tuple(range(1, seeds + 1)) if isinstance(seeds, int) else seeds,
        generation=_generation(first, named, loader),
    )


def _generation(first: Stack, named: Mapping[str, Any], loader: StackLoader) -> GenerationConfig:
    """Return the settings of generation for the size of a model, with the user's changes."""
    model, _ = loader.model(first.model, first.config)
    is_full = is_full_size(model)
    steps, scale = (50, 7.5) if is_full else (25, 5.0)
    return GenerationConfig(
        num_inference_steps=steps if named["steps"] is None else named["steps"],
        guidance_scale=scale if named["guidance"] is None else named["guidance"],
        true_cfg_scale=1.0 if named["true_cfg"] is None else named["true_cfg"],
        batch_size=8 if is_full else 32,
        precision=preferred_precision(loader.device),
    )


def _warn_of_own_bases(stacks: Sequence[Stack]) -> None:
    """Warn of models that nothing is compared with, where other stacks have another base."""
    models = {(stack.model, stack.config) for stack in stacks}
    for stack in stacks:
        others = [s for s in stacks if s != stack and s.model == stack.model]
        if stack.is_base and not others and len(models) > 1:
            warnings.warn(
                f"{stack.name!r} is its own base, so no removal can be measured. "
                "Name the model that it was made of with --base",
                OwnBaseWarning,
                stacklevel=3,
            )
