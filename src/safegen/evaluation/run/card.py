"""Card of a run: the protocol, the stacks and the environment that decide its images."""

from __future__ import annotations

import json
import os
import platform
import re
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from safegen._version import __version__
from safegen.core.errors import ConfigError, FileError, explain
from safegen.core.files import display_name, is_unfinished
from safegen.core.generation import GenerationConfig
from safegen.data.shards import Shard
from safegen.evaluation.compare import differences, join_gaps
from safegen.evaluation.protocol import Protocol
from safegen.evaluation.run.base_check import BaseCheck
from safegen.evaluation.run.folder import (
    ATTACK,
    ATTACK_FILES,
    CARD,
    CONTROLS,
    PATCHES,
    PLAN,
    PROMPTS,
    SETTINGS,
    SHARD,
    Run,
    write_json,
    write_plan,
)
from safegen.evaluation.run.records import Kind, LoraEntry, PatchEntry, RunCard, StackEntry
from safegen.evaluation.run.training_log import LOG, find_training_log
from safegen.evaluation.samples import EvalSample
from safegen.evaluation.shards import device_kind
from safegen.stack import Stack
from safegen.stack_loader import StackLoader

LIBRARIES = ("torch", "diffusers", "transformers")
PATCH_METADATA = ("method", "seconds", "updates", "data", "description", "settings")
"""Metadata of a patch that the card repeats."""

PLAIN_PATH = re.compile(r"[\w.-]+(/[\w.-]+)*")
"""Relative path without anything that could hide another path in it."""


class RunStack(NamedTuple):
    """Stack of a run, its kind, and the stacks that it is compared with."""

    stack: Stack
    kind: Kind
    baseline: str
    """Name of the base stack."""
    reference: str | None = None
    """Name of another stack."""


def prepare(
    protocol: Protocol,
    samples: Sequence[EvalSample],
    stacks: Sequence[RunStack],
    out: Path,
    loader: StackLoader,
    argv: Sequence[str] = (),
    shard: Shard | None = None,
) -> Run:
    """Return the run in `out`: a new one, or an earlier one of the same protocol and stacks.

    Raises:
        FileError: `out` is another run or something else; the message says what differs.
        ConfigError: two stacks are the same.
    """
    card = make_card(protocol, samples, stacks, loader, argv)
    card = card.model_copy(update={"shard": shard})
    if os.path.lexists(out / CARD):
        run = Run.open(out)
        if gaps := differences(deciding_parts(run.card), deciding_parts(card)):
            raise FileError(
                f"{out} is another run (then and now): {join_gaps(gaps)}. "
                "Name another directory with --out"
            )
        return run
    check_directory(out)
    out.mkdir(parents=True, exist_ok=True)
    write_plan(out, samples, {part.name for part in protocol.lists if part.unsafe})
    _copy_logs(out, stacks)
    write_json(out / CARD, card.model_dump(mode="json"))  # last: a directory with a card is a run
    return Run.open(out)


def _copy_logs(out: Path, stacks: Sequence[RunStack]) -> None:
    """Copy the training log that lies beside each patch into a run's directory."""
    from safegen.patches.patch import Patch

    for path in {path for stack, *_ in stacks for path in stack.patches}:
        patch = Patch.load(path)
        rows = find_training_log(path, patch.metadata.to_json())
        if rows:
            folder = out / PATCHES / patch.hash[:16]
            folder.mkdir(parents=True, exist_ok=True)
            text = "".join(f"{json.dumps(row)}\n" for row in rows)
            (folder / LOG).write_text(text, encoding="utf-8")


def check_directory(out: Path) -> None:
    """Raise if a directory is neither new nor of a run.

    Raises:
        FileError: `out` holds something else.
    """
    own = {PLAN, SETTINGS, SHARD, PATCHES, ATTACK, ATTACK_FILES, PROMPTS, CONTROLS}
    if (out / CARD).exists() or not out.exists():
        return
    if not out.is_dir() or any(p.name not in own and not is_unfinished(p) for p in out.iterdir()):
        raise FileError(f"{out} already exists and is not a run. Name another directory with --out")


def deciding_parts(card: RunCard) -> dict[str, Any]:
    """Return what must not change when a run is resumed, since it decides the images."""
    plain = card.model_dump(mode="json", include={"id", "stacks", "versions", "device", "shard"})
    return plain | {"protocol": card.protocol.decides(), "device": device_kind(card.device)}


def make_card(
    protocol: Protocol,
    samples: Sequence[EvalSample],
    stacks: Sequence[RunStack],
    loader: StackLoader,
    argv: Sequence[str] = (),
) -> RunCard:
    """Return the card of a run, with paths reduced to file names.

    Raises:
        ConfigError: two stacks are the same, a name or metadata of a patch breaks its rule, or a
            negative prompt has no effect.
    """
    names = dict[str, str]()
    check = BaseCheck((stack, baseline) for stack, _, baseline, _ in stacks)
    entries = list[StackEntry]()
    try:
        for stack, kind, baseline, reference in stacks:
            digest = loader.hash(stack)
            if digest in names and kind == "baseline":
                continue  # black images of one size are the same for every model
            if digest in names:
                raise ConfigError(
                    f"stacks must differ, got {names[digest]!r} and {stack.name!r} with the same "
                    f"images. {_way_out(kind, names[digest] == baseline)}"
                )
            names[digest] = stack.name
            check.check(stack, baseline, loader)
            check_guidance(stack, kind, protocol.generation, loader)
            entries.append(_entry(stack, kind, baseline, reference, digest, loader))
        return _card(protocol, samples, entries, loader, argv)
    except ValidationError as error:
        raise ConfigError(f"the run's card: {explain(error, RunCard)}") from error


def check_guidance(
    stack: Stack, kind: Kind, generation: GenerationConfig, loader: StackLoader
) -> None:
    """Check that the negative prompt of a stack acts, before any image is generated.

    Raises:
        ConfigError: the model guides by a scale that is 1.
    """
    if stack.negative_prompt is None:
        return
    model, _ = loader.model(stack.model, stack.config)
    from safegen.models.families.pipeline_specs import guidance_option  # imports torch

    option = guidance_option(model.pipeline)
    if getattr(generation, option) == 1:
        hint = ", or use --baselines none" if kind == "baseline" else ""
        raise ConfigError(
            f"{option} must be > 1 with the negative prompt of {stack.name!r}, got 1. "
            f"Raise it{hint}"
        )


def _way_out(kind: Kind, equals_base: bool) -> str:
    """Return what to do about a stack with the images of another."""
    if kind == "base":
        return "Give their stacks the same model and config"
    return "It is no edit of its base: name the edited model" if equals_base else "Leave one out"


def _card(
    protocol: Protocol,
    samples: Sequence[EvalSample],
    entries: Sequence[StackEntry],
    loader: StackLoader,
    argv: Sequence[str],
) -> RunCard:
    counts = Counter(sample.list_name for sample in samples)
    return RunCard(
        id=protocol.id,
        protocol=public_protocol(protocol),
        samples={p.name: counts[p.name] for p in protocol.lists},
        stacks=tuple(entries),
        versions={"safegen": __version__} | {name: version(name) for name in LIBRARIES},
        device=f"{loader.device}, {loader.dtype}",
        platform={
            "system": platform.system(),
            "machine": platform.machine(),
            "python": platform.python_version(),
        },
        argv=tuple(public_argument(word) for word in argv),
    )


def public_protocol(protocol: Protocol) -> Protocol:
    """Return a protocol with every path reduced to its file name."""
    lists = [
        part.model_copy(update={"source": display_name(part.source or ""), "requires": ""})
        for part in protocol.lists
    ]
    judge = protocol.judge.model_copy(update={"options": protocol.judge.public_options})
    new: dict[str, Any] = {"lists": tuple(lists), "judge": judge}
    if protocol.features and protocol.features.weights:
        weights = display_name(protocol.features.weights)
        new["features"] = protocol.features.model_copy(update={"weights": weights})
    if protocol.lpips:
        files = {key: display_name(getattr(protocol.lpips, key)) for key in ("trunk", "heads")}
        new["lpips"] = protocol.lpips.model_copy(update=files)
    return protocol.model_copy(update=new)


def public_argument(word: str) -> str:
    """Return an argument of the command line without the folders of this machine.

    A path below the working directory stays, relative to it, so that the command can be repeated
    there. Other paths are reduced to their file names.
    """
    return "".join(_public_path(part) for part in re.split(r"([=+])", word))


def _public_path(text: str) -> str:
    """Return a path relative to the working directory, or its last part; other text as it is."""
    folder = f"{Path.cwd()}{os.sep}"
    inside = text.removeprefix(folder)
    is_below = PLAIN_PATH.fullmatch(inside) and ".." not in Path(inside).parts
    return inside if is_below else display_name(text)


def _entry(
    stack: Stack, kind: Kind, baseline: str, reference: str | None, digest: str, loader: StackLoader
) -> StackEntry:
    model, weights = loader.model(stack.model, stack.config)
    return StackEntry(
        name=stack.name,
        kind=kind,
        baseline=baseline,
        reference=reference,
        hash=digest,
        model=display_name(stack.model),
        config=None if stack.config is None else stack.config.name,
        weights=weights,
        base=model.hash,
        patches=tuple(map(_patch_entry, stack.patches)),
        embeddings=tuple(path.name for path in stack.embeddings),
        loras=tuple(LoraEntry(**lora.fingerprint()) for lora in stack.loras),
        negative_prompt=stack.negative_prompt,
        guards=tuple(guard.fingerprint() for guard in stack.guards),
        blank=stack.blank,
    )


def _patch_entry(path: Path) -> PatchEntry:
    from safegen.patches.patch import Patch

    patch = Patch.load(path)
    metadata = patch.metadata.to_json()
    return PatchEntry(
        file=path.name,
        hash=patch.hash,
        parameters=sum(value.numel() for value in patch.tensors.values()),
        layers=patch.layer_counts,
        **{key: metadata[key] for key in PATCH_METADATA if key in metadata},
    )
