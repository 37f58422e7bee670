"""Evaluation of stacks under a protocol, in a directory that an interrupted run resumes from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from safegen.core.concept import load_concept
from safegen.core.errors import ConfigError, FileError
from safegen.core.progress import ProgressCallback, no_progress
from safegen.data.shards import Shard
from safegen.evaluation.engines.base import BatchEngine, BatchWorker
from safegen.evaluation.engines.local import LocalBatchEngine
from safegen.evaluation.engines.writer import RunWriter
from safegen.evaluation.protocol import Protocol
from safegen.evaluation.protocol_file import write_protocol
from safegen.evaluation.run.card import RunStack, check_directory, prepare
from safegen.evaluation.run.claim import claim_run
from safegen.evaluation.run.folder import PROTOCOL_FILE, Run, write_json
from safegen.evaluation.run.judge import Evaluators, load_evaluators
from safegen.evaluation.samples import EvalSample
from safegen.evaluation.scoring.score import score_run, scores_file
from safegen.stack import Stack
from safegen.stack_loader import StackLoader

Stage = Literal["generate", "judge", "score"]
Baselines = Literal["all", "none"]


def evaluate(
    protocol: Protocol,
    stacks: Sequence[Stack],
    out: Path,
    *,
    base: Stack | None = None,
    baselines: Baselines = "all",
    until: Stage = "score",
    references: Mapping[str, str] | None = None,
    loader: StackLoader | None = None,
    engine: BatchEngine | None = None,
    save_protocol: bool = False,
    shard: Shard | None = None,
    argv: Sequence[str] = (),
    progress: ProgressCallback = no_progress,
) -> Run:
    """Generate, judge and score the images of a protocol with some stacks.

    The same call resumes an interrupted run. A shard is not scored.

    Args:
        protocol: what to generate and how to judge it.
        stacks: stacks to evaluate. The base model of each is always evaluated too, first.
        out: directory of the run, new or of an earlier call.
        base: model that all stacks are compared with, those on other model files too. Default: each
            stack's own model without patches.
        baselines: `all` adds the base model with the concept's words as negative prompt, and black
            images.
        until: last stage to do: `generate`, `judge` or `score`.
        references: another stack to compare a stack with, besides its base; by name.
        loader: loads the stacks; on the accelerator or the CPU if not given.
        engine: where batches are generated and judged. Default: in this process.
        save_protocol: also write `protocol.toml`, which can be given again.
        shard: part of the batches to do; `merge_runs` joins the parts.
        argv: command line to note in the run's card.
        progress: called with (description, done, total).

    Raises:
        FileError: `out` is another run or something else, or cannot be written.
        ConfigError: there are no stacks, two are the same, or `base` has another architecture than
            a stack.
        UserError: a stack or judge cannot be loaded.
    """
    loader, engine = loader or StackLoader(), engine or LocalBatchEngine()
    engine.check()
    expanded = expand_baselines(protocol, stacks, baselines, references or {}, base=base)
    check_directory(out)
    with _explain_disk_errors(out), claim_run(out):
        # first: a library or weights may be missing
        evaluators = None if until == "generate" else load_evaluators(protocol)
        samples = protocol.samples()
        run = prepare(protocol, samples, expanded, out, loader, argv, shard)
        if save_protocol and not (out / PROTOCOL_FILE).exists():
            write_protocol(protocol, out)
        run_stages(
            run,
            samples,
            stacks=[s.stack for s in expanded],
            loader=loader,
            evaluators=evaluators,
            engine=engine,
            progress=progress,
        )
        if evaluators and until == "score" and shard is None:
            scores = score_run(run, judge=evaluators.id)
            write_json(scores_file(run, scores), scores)
    return run


def judge_run(
    run: Run,
    *,
    name: str | None = None,
    labels: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
    engine: BatchEngine | None = None,
    progress: ProgressCallback = no_progress,
) -> str:
    """Judge all images of a run that exist, and return the judge's id; no image is generated.

    Args:
        run: a run.
        name: another judge than the protocol's, by name or id.
        labels: labels of that judge; the protocol's if the judge is the same.
        options: options of the judge, in place of the protocol's.
        engine: where batches are judged. Default: in this process.
        progress: called with (description, done, total).

    Raises:
        ConfigError: another judge without labels, or the installed judge has another id than the
            given one.
        UserError: the judge cannot be loaded, or the directory cannot be written.
    """
    word = None if name is None else name.partition(":")[0]
    if word is not None and word != run.protocol.judge.name and not labels:
        raise ConfigError(
            f"the judge {name!r} has labels of its own. "
            f"Choose those that mean {run.protocol.concept} with --label"
        )
    with _explain_disk_errors(run.folder), claim_run(run.folder):
        protocol = run.protocol.with_judge(name=word, labels=labels, options=options)
        generated = {record.key for record in run.sample_records()}
        bases = {key for s in run.stacks if s.kind == "base" for key in run.keys(s)}
        measured = {r.key for r in run.feature_records()}, {r.key for r in run.change_records()}
        evaluators = load_evaluators(
            protocol,
            features=not generated <= measured[0],
            lpips=not generated - bases <= measured[1],
        )
        if name not in (None, word, evaluators.id):
            raise ConfigError(
                f"the judge {word!r} is {evaluators.id} here, not {name}. "
                "Use its name alone, or the options of that judge"
            )
        run_stages(
            run,
            run.samples,
            evaluators=evaluators,
            engine=engine or LocalBatchEngine(),
            progress=progress,
        )
    return evaluators.id


def run_stages(
    run: Run,
    samples: Sequence[EvalSample],
    *,
    stacks: Sequence[Stack] = (),
    loader: StackLoader | None = None,
    evaluators: Evaluators | None = None,
    engine: BatchEngine,
    progress: ProgressCallback,
) -> None:
    """Generate the images that are missing, judge those that are not judged, and record both.

    Args:
        run: the run.
        samples: samples of one stack; with prompts if there is a loader.
        stacks: the run's stacks, to generate images.
        loader: loads the stacks; nothing is generated without.
        evaluators: judge and networks; nothing is judged without.
        engine: where the batches are done.
        progress: called with (description, done, total).

    Raises:
        FileError: a journal is damaged or in use, or an image differs from the one in the run.
        ConfigError: memory does not suffice for one image.
    """
    worker = BatchWorker(run, stacks, loader, evaluators)
    with RunWriter(
        run, samples, evaluators, generates=loader is not None, progress=progress
    ) as writer:
        engine.run(writer, worker)


def expand_baselines(
    protocol: Protocol,
    stacks: Sequence[Stack],
    baselines: Baselines,
    references: Mapping[str, str] | None = None,
    *,
    base: Stack | None = None,
) -> list[RunStack]:
    """Return the stacks of a run: each base model, then the stacks on it, then its baselines.

    With a stated base, all stacks belong to it; those on its own model come first.

    Raises:
        ConfigError: there are no stacks, two of one name, or the stated base is no plain model.
    """
    if not stacks and base is None:
        raise ConfigError("stacks must be at least one, got none. Name one with --stack")
    if base is not None and not base.is_base:
        raise ConfigError(
            f"the base must be a model without patches, LoRAs, guards and negative prompt, "
            f"got {base.name!r}. Give it as a stack"
        )
    expanded: list[RunStack] = []
    for number, (plain, members) in enumerate(_group_by_base(stacks, base), 1):
        expanded.append(RunStack(plain, "base", plain.name))
        expanded += [
            RunStack(s, "given", plain.name, (references or {}).get(s.name)) for s in members
        ]
        if baselines == "all":
            suffix = f"-{number}" if number > 1 else ""
            words = ", ".join(protocol.words or load_concept(protocol.concept).words)
            common: dict[str, Any] = {"model": plain.model, "config": plain.config}
            extra = (
                Stack(name=f"negative-prompt{suffix}", negative_prompt=words, **common),
                Stack(name=f"black-image{suffix}", blank=True, **common),
            )
            expanded += [RunStack(s, "baseline", plain.name) for s in extra if s not in stacks]
    names = [s.stack.name for s in expanded]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(
            "stacks must have names that differ from each other and from the baselines, "
            f"got {', '.join(repeated)} more than once"
        )
    return expanded


def _group_by_base(stacks: Sequence[Stack], base: Stack | None) -> list[tuple[Stack, list[Stack]]]:
    """Return each base model of some stacks with the stacks that are compared with it."""

    def key(stack: Stack) -> tuple[str, Path | None]:
        return stack.model, stack.config

    given = {key(s): s for s in reversed(stacks) if s.is_base}
    if base is not None:
        plain = given.get(key(base), base)
        others = [s for s in stacks if s != plain]
        # stacks of one model follow each other, since one model is loaded at a time
        keys = list(dict.fromkeys([key(plain), *map(key, others)]))
        return [(plain, sorted(others, key=lambda s: keys.index(key(s))))]
    groups: dict[tuple[str, Path | None], tuple[Stack, list[Stack]]] = {}
    for stack in stacks:
        name = "base" if not groups else f"base-{len(groups) + 1}"
        plain = given.get(key(stack)) or Stack(name=name, model=stack.model, config=stack.config)
        plain, members = groups.setdefault(key(stack), (plain, []))
        if stack != plain:
            members.append(stack)
    return list(groups.values())


@contextmanager
def _explain_disk_errors(out: Path) -> Iterator[None]:
    """Turn an error of the disk into a message; what is written stays."""
    try:
        yield
    except OSError as error:
        raise FileError(
            f"{out} cannot be written: {error.strerror or error}. "
            "Fix that and run the same command again to resume."
        ) from error
