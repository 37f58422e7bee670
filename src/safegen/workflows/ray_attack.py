"""Attack on Ray: workers search prompts in shards, and actors evaluate what they found."""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safegen.attacks.core.base import Attack
from safegen.attacks.core.run import AttackConfig, run_attack
from safegen.attacks.core.shards import attack_shard, is_attack_shard, merge_attacks
from safegen.core.concept import Concept
from safegen.core.errors import ConfigError, SafegenWarning, UserError
from safegen.core.files import check_output
from safegen.core.progress import ProgressCallback, no_progress
from safegen.data.shards import Shard
from safegen.evaluation.engines.actor import WorkerFailure, prepare_process
from safegen.evaluation.engines.driver import WorkerWarning
from safegen.evaluation.engines.ray import (
    RETRIES,
    START_SECONDS,
    RayBatchEngine,
    death_error,
    room_error,
)
from safegen.evaluation.protocol import Protocol
from safegen.evaluation.run.folder import SETTINGS, Run
from safegen.stack import Stack
from safegen.stack_loader import StackLoader

PARTS = ".parts"
"""Ending of the folder with the shards of an attack, beside that of its run."""
PART = r"\d+-of-(\d+)"
"""Name of the folder of a shard."""


@dataclass(frozen=True)
class ShardSearch:
    """What a worker needs to attack a shard."""

    attack: Attack
    stack: Stack
    concept: Concept
    config: AttackConfig
    protocol: Protocol | None
    parts: Path
    """Folder of the shards."""
    directory: Path
    """Working directory, to which paths are relative."""
    device: str
    dtype: str
    allow_pickle: bool
    threads: int


def attack_on_ray(
    attack: Attack,
    stack: Stack,
    concept: Concept,
    config: AttackConfig,
    output_dir: Path,
    *,
    engine: RayBatchEngine,
    protocol: Protocol | None = None,
    loader: StackLoader | None = None,
    argv: Sequence[str] = (),
    progress: ProgressCallback = no_progress,
) -> Run:
    """Attack a stack with workers of Ray, evaluate it with actors, and return the run.

    The search is split into one shard per worker, in a folder beside the run's; see `attack_shard`.
    An attack that trains once for all prompts is done in this process. The same call resumes.

    Args:
        attack: the attack.
        stack: the attacked stack.
        concept: concept to bring back.
        config: prompts and generation, without a budget.
        output_dir: directory of the run, new or of an earlier call.
        engine: workers and cluster.
        protocol: gives the prompts, the judge and `generation` in place of concept and config.
        loader: loads the model.
        argv: command line to note in the run's card.
        progress: called with (stage, done, total).

    Raises:
        ConfigError: there is a budget, which counts the whole attack. Others are those of
            `run_attack` and `RayBatchEngine.run`.
        UserError: what a worker raised.
    """
    loader = loader or StackLoader()
    engine.check()
    if limits := config.budget.model_dump(exclude_none=True):
        raise ConfigError(
            f"budget must be left out with the engine ray, got {', '.join(limits)}: it ends the "
            "whole attack, which no worker sees. Use --limit"
        )
    attacked = attack, stack, concept, config
    trains_once = not attack.changes_prompts or attack.attacked_stacks(stack, output_dir)
    parts = output_dir.absolute().with_name(output_dir.name + PARTS)
    if not trains_once and not (output_dir / SETTINGS).exists():
        check_output(output_dir)  # the merge would refuse it after the whole search
        parts.mkdir(parents=True, exist_ok=True)
        device = "cuda" if loader.device.startswith("cuda") else loader.device
        loading = device, loader.dtype, loader.allow_pickle, engine.threads
        search = ShardSearch(*attacked, protocol, parts, Path.cwd(), *loading)
        try:
            merge_attacks(_search(search, engine, progress), output_dir)
        finally:
            with suppress(OSError):  # it has shards, from which the same call resumes
                parts.rmdir()
    common: dict[str, Any] = {"loader": loader, "engine": engine, "argv": argv}
    run = run_attack(*attacked, output_dir, protocol=protocol, progress=progress, **common)
    if not trains_once:
        _remove_shards(parts)
    return run


def _search(search: ShardSearch, engine: RayBatchEngine, progress: ProgressCallback) -> list[Path]:
    """Attack all shards, and return their folders.

    Raises:
        ConfigError: no worker starts, or a shard ended its worker again and again.
        UserError: what a worker raised.
    """
    gpus = int(search.device == "cuda")
    with engine.connect(gpus=gpus) as (ray, workers):
        from ray.exceptions import RayError, RayTaskError

        count = _begun_shards(search.parts) or workers
        remote = ray.remote(max_retries=RETRIES, num_cpus=engine.threads, num_gpus=gpus)
        if not ray.wait([remote(_start).remote()], timeout=START_SECONDS)[0]:
            raise room_error(engine.threads, gpus)
        task = remote(_attack_part)
        shared = ray.put(search)
        shards = [Shard(index=i, count=count) for i in range(1, count + 1)]
        running = {task.remote(shared, shard): shard for shard in shards}
        title = f"attacking: {search.stack.name} in {count} shards"
        progress(title, 0, count)
        while running:
            (reference,), _ = ray.wait(list(running))
            shard = running.pop(reference)
            try:
                failure, messages = ray.get(reference)
            except RayTaskError:
                raise
            except RayError as error:
                raise death_error(f"shard {shard}", error) from error
            for message in messages:
                warnings.warn(message, WorkerWarning, stacklevel=1)
            if failure is not None:
                raise failure.to_error()
            progress(title, count - len(running), count)
    return [_part(search.parts, shard) for shard in shards]


def _start() -> None:
    """Return once a worker runs."""


def _attack_part(search: ShardSearch, shard: Shard) -> tuple[WorkerFailure | None, tuple[str, ...]]:
    """Attack a shard in the process of a worker; return the user's error, and the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", SafegenWarning)
        failure = _try_part(search, shard)
    own = (w for w in caught if issubclass(w.category, SafegenWarning))
    return failure, tuple(dict.fromkeys(str(w.message) for w in own))


def _try_part(search: ShardSearch, shard: Shard) -> WorkerFailure | None:
    """Attack a shard, and return the error that the user caused."""
    from safegen.core.quiet import silence_libraries

    try:
        prepare_process(search.directory, search.parts, search.threads)
        loader = StackLoader(
            device=search.device, dtype=search.dtype, allow_pickle=search.allow_pickle
        )
        with silence_libraries():
            attack_shard(
                search.attack,
                search.stack,
                search.concept,
                search.config,
                _part(search.parts, shard),
                shard,
                protocol=search.protocol,
                loader=loader,
            )
    except UserError as error:
        return WorkerFailure(type(error).__name__, str(error))
    return None


def _part(parts: Path, shard: Shard) -> Path:
    """Return the folder of a shard."""
    return parts / f"{shard.index}-of-{shard.count}"


def _remove_shards(parts: Path) -> None:
    """Remove the shards of an attack, and their folder if nothing else is in it."""
    for path in list(parts.iterdir()) if parts.is_dir() else ():
        if re.fullmatch(PART, path.name) and is_attack_shard(path):
            shutil.rmtree(path)
    with suppress(OSError):
        parts.rmdir()


def _begun_shards(parts: Path) -> int:
    """Return the number of shards that an earlier call began; 0 if there is none."""
    names = [path.name for path in parts.iterdir()] if parts.is_dir() else []
    found = [re.fullmatch(PART, name) for name in names]
    return max((int(match[1]) for match in found if match), default=0)
