"""A run: every picture of a protocol by every stack, judged while the next are drawn, in a folder that a killed run goes on from."""

from __future__ import annotations

import platform
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from safegen._version import __version__
from safegen.core.concept import load_concept
from safegen.core.errors import ConfigError, FileError
from safegen.core.files import display_name
from safegen.core.generation import NativePrecision
from safegen.core.progress import ProgressCallback, no_progress
from safegen.core.registry import PROTOCOLS
from safegen.evaluation.protocol import Protocol, differences, plan, read_protocol
from safegen.evaluation.run.folder import (
    CARD,
    CHANGES,
    FEATURES,
    FORMAT,
    PATCHES,
    PLAN,
    SAMPLES,
    SETTINGS,
    Line,
    Planned,
    Run,
    write_json,
    write_plan,
)
from safegen.evaluation.run.generate import run_stages
from safegen.evaluation.run.judge import Evaluators
from safegen.evaluation.samples import canonical, sha
from safegen.evaluation.scoring.table import score_run, scores_file
from safegen.judges import load_judge
from safegen.stack import Stack
from safegen.stack_loader import StackLoader

Stage = Literal["generate", "judge", "score"]
Baselines = Literal["all", "none"]
LIBRARIES = ("torch", "diffusers", "transformers")
OWN_BASE = r"base(-\d+)?"
"""Names of the bases that nobody gave."""
PATCH_METADATA = ("method", "seconds", "updates", "data", "description", "settings")
"""Metadata of a patch that the card repeats."""
DECIDE = ("id", "stacks", "versions", "device")
"""What of the card must not change when a run goes on: all that decides a picture."""


def evaluate(
    protocol: Protocol,
    stacks: Sequence[Stack],
    out: Path,
    *,
    baselines: Baselines = "all",
    until: Stage = "score",
    references: Mapping[str, str] | None = None,
    shelf: StackLoader | None = None,
    progress: ProgressCallback = no_progress,
) -> Run:
    """Draw, judge and score a protocol with some stacks, in the new folder `out` or going on in it.

    Args:
        protocol: what to draw and how to judge it.
        stacks: what draws. The base model of each is always drawn too, first.
        out: the run's folder.
        baselines: `all` adds the base model with the concept's words as negative prompt, and black
            pictures; `none` leaves those two out.
        until: last stage to do: `generate`, `judge` or `score`.
        references: name of a stack, and of another stack that it is tested against besides its base.
        shelf: opens the stacks; one for the CPU when not given.
        progress: called with (description, done, total).

    Raises:
        FileError: `out` is another run, something else, or cannot be written; what was drawn is kept
            and the same call goes on.
        ConfigError: the stacks are not all different.
        UserError: a stack or judge cannot be loaded.
    """
    shelf = shelf or StackLoader()
    everybody = expand_baselines(protocol, stacks, baselines)
    with _writing(out):
        look = (
            None if until == "generate" else load_evaluators(protocol)
        )  # first: it may not be installed
        run = prepare(protocol, everybody, out, shelf, references or {})
        planned = [Planned.of(item) for item in plan(protocol)]
        run_stages(
            run,
            planned,
            stacks=[stack for stack, _, _ in everybody],
            shelf=shelf,
            look=look,
            progress=progress,
        )
        if look and until == "score":
            scores = score_run(run, judge=look.id)
            write_json(scores_file(run, scores), scores)
    return run


def judge_run(
    run: Run,
    *,
    name: str | None = None,
    labels: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
    progress: ProgressCallback = no_progress,
) -> str:
    """Let a judge look at all that was drawn so far, and return its id; no picture is drawn.

    Args:
        run: a run.
        name: another judge than the protocol's, by name or id.
        labels: labels of that judge; the protocol's own when the judge is the same.
        options: its options, in place of the protocol's.
        progress: called with (description, done, total).

    Raises:
        ConfigError: another judge without labels, or the judge here has another id than the one that
            was named.
        UserError: the judge cannot be loaded, or the folder cannot be written.
    """
    word = None if name is None else name.partition(":")[0]
    if word is not None and word != run.protocol.judge.name and not labels:
        raise ConfigError(
            f"the judge {name!r} has labels of its own; say which mean {run.protocol.concept} with --label"
        )
    with _writing(run.folder):
        protocol = run.protocol.judged(name=word, labels=labels, options=options)
        look = load_evaluators(
            protocol, features=not _have(run, FEATURES), lpips=not _have(run, CHANGES)
        )
        if name not in (None, word, look.id):
            raise ConfigError(
                f"the judge {word!r} is {look.id} here, not {name}; name it by its name alone, or give it that one's options"
            )
        run_stages(run, run.planned, look=look, progress=progress)
    return look.id


def _have(run: Run, journal: str) -> bool:
    """Return whether all that was drawn is in a journal of measurements, so that what makes them need not be there."""
    apart = {
        key
        for entry in run.stacks
        if journal == CHANGES and entry["kind"] == "base"
        for key in run.keys(entry)
    }
    return {line["key"] for line in run.lines(SAMPLES)} - apart <= {
        line["key"] for line in run.lines(journal)
    }


def load_evaluators(protocol: Protocol, *, features: bool = True, lpips: bool = True) -> Evaluators:
    """Return a protocol's judge, and what else it needs to look at pictures; options that change what a judge sees are part of its id.

    Args:
        protocol: says which.
        features: load the extractor, if it names one.
        lpips: load LPIPS, if it names its weights.

    Raises:
        ConfigError: the CLIP score is asked of an extractor that reads no texts.
        UserError: the judge, extractor or weights cannot be loaded.
    """
    rule, options = protocol.judge, protocol.judge.told
    eye = load_judge(rule.name, labels=rule.labels, threshold=rule.threshold, **rule.options)
    id_ = eye.id + (f"#{sha(canonical(options))[:8]}" if options else "")
    look = Evaluators(
        eye, {"judge": id_, "name": rule.name, "options": options, "known": list(eye.label_space)}
    )
    if protocol.features and features:
        from safegen.features.base import TextExtractor, load_extractor

        extractor = load_extractor(protocol.features.extractor, weights=protocol.features.weights)
        if "clip_score" in protocol.metrics and not isinstance(extractor, TextExtractor):
            raise ConfigError(
                f"the CLIP score needs an extractor that reads texts too, as clip does, got {protocol.features.extractor!r}"
            )
        look = replace(look, extractor=extractor)
    if protocol.lpips and lpips:
        from safegen.features.lpips import Lpips

        look = replace(look, lpips=Lpips(**protocol.lpips.model_dump()))
    return look


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    """Word what the disk says; nothing of the run is lost by it."""
    try:
        yield
    except OSError as error:
        raise FileError(
            f"{out} cannot be written: {error.strerror or error}; mend that and give the same command again to go on"
        ) from error


def expand_baselines(
    protocol: Protocol, stacks: Sequence[Stack], baselines: Baselines
) -> list[tuple[Stack, str, str]]:
    """Return what is drawn as (stack, kind, name of the stack that it is held against), the base model of each first.

    Raises:
        ConfigError: no stacks, or two of one name.
    """
    if not stacks:
        raise ConfigError("there is nothing to evaluate; name a stack with --stack")
    bases: dict[tuple[str, Path | None], Stack] = {}
    for stack in stacks:
        drawn_by = (stack.model, stack.config)
        own = [s for s in stacks if s.is_base and (s.model, s.config) == drawn_by]
        name = "base" if not bases else f"base-{len(bases) + 1}"  # as in OWN_BASE
        bases.setdefault(
            drawn_by, own[0] if own else Stack(name=name, model=stack.model, config=stack.config)
        )
    out: list[tuple[Stack, str, str]] = []
    for number, ((model, config), base) in enumerate(bases.items(), 1):
        out.append((base, "base", base.name))
        out += [
            (s, "given", base.name)
            for s in stacks
            if (s.model, s.config) == (model, config) and s != base
        ]
        if baselines == "all":
            tail = f"-{number}" if number > 1 else ""
            words = ", ".join(load_concept(protocol.concept).words)
            extra = (
                Stack(
                    name=f"negative-prompt{tail}", model=model, config=config, negative_prompt=words
                ),
                Stack(name=f"black-image{tail}", model=model, config=config, blank=True),
            )
            out += [(s, "baseline", base.name) for s in extra if s not in stacks]
    names = [stack.name for stack, _, _ in out]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(
            f"stacks must have names of their own, and the baselines have theirs; twice: {', '.join(twice)}"
        )
    return out


def prepare(
    protocol: Protocol,
    stacks: Sequence[tuple[Stack, str, str]],
    out: Path,
    shelf: StackLoader,
    references: Mapping[str, str],
) -> Run:
    """Return the run in `out`, made anew or found to be the same.

    Raises:
        FileError: `out` holds something else, or another run; the message says what differs.
        ConfigError: two stacks draw the same.
    """
    items = plan(protocol)
    card = _card(protocol, stacks, shelf)
    for entry in card["stacks"]:
        if entry["name"] in references:
            entry["reference"] = references[entry["name"]]
    card["plan"] = {
        part.name: sum(i.list_name == part.name for i in items) for part in protocol.lists
    }
    if (out / CARD).exists():
        run = Run.open(out)
        old, new = (
            {k: c[k] for k in DECIDE} | {"protocol": p.decides()}
            for c, p in ((run.card, run.protocol), (card, protocol))
        )
        gaps = differences(old, new)
        if gaps:
            raise FileError(
                f"{out} is another run (then and now): {'; '.join(gaps)}; name another folder with --out"
            )
        return run
    if out.exists() and (
        not out.is_dir()
        or any(
            p.name not in (PLAN, SETTINGS, PATCHES) and ".tmp-" not in p.name for p in out.iterdir()
        )
    ):
        raise FileError(f"{out} already exists and is not a run; name another folder with --out")
    out.mkdir(parents=True, exist_ok=True)
    write_plan(
        out, [Planned.of(i) for i in items], {part.name: part.unsafe for part in protocol.lists}
    )
    write_json(out / CARD, card)  # last: a folder with a card is a run
    return Run.open(out)


def _card(protocol: Protocol, stacks: Sequence[tuple[Stack, str, str]], shelf: StackLoader) -> Line:
    """Return what a run says of itself.

    Paths are cut to file names: a card names no machine and no user.
    """
    entries, seen = [], dict[str, str]()
    for stack, kind, against in stacks:
        digest = shelf.hash(stack)
        if digest in seen and kind == "baseline":
            # black pictures of one size are the same for every model: no one could leave them out
            continue
        if digest in seen and kind == "base":
            raise ConfigError(
                f"the bases {seen[digest]!r} and {stack.name!r} draw the same: give the stacks on them the same words for model and config"
            )
        if digest in seen:
            raise ConfigError(
                f"the stacks {seen[digest]!r} and {stack.name!r} draw the same; leave one out"
            )
        seen[digest] = stack.name
        entries.append(_entry(stack, shelf) | {"hash": digest, "kind": kind, "against": against})
    parts = [
        p.model_copy(update={"source": display_name(p.source or ""), "requires": ""})
        for p in protocol.lists
    ]
    return {
        "format": FORMAT,
        "id": protocol.id,
        "protocol": protocol.model_copy(
            update={"lists": tuple(parts)} | _weights_told(protocol)
        ).model_dump(mode="json"),
        "stacks": entries,
        "versions": {"safegen": __version__} | {name: version(name) for name in LIBRARIES},
        "device": f"{shelf.device}, {shelf.dtype}",
        "platform": {
            "system": platform.system(),
            "machine": platform.machine(),
            "python": platform.python_version(),
        },
        "command": _command(protocol, stacks, shelf),
    }


def _weights_told(protocol: Protocol) -> Line:
    """Return the parts of a protocol that may name files of weights, with the files' last names only."""
    out: Line = {"judge": protocol.judge.model_copy(update={"options": protocol.judge.told})}
    if protocol.features and protocol.features.weights:
        out["features"] = protocol.features.model_copy(
            update={"weights": display_name(protocol.features.weights)}
        )
    if protocol.lpips:
        files = {key: display_name(getattr(protocol.lpips, key)) for key in ("trunk", "heads")}
        out["lpips"] = protocol.lpips.model_copy(update=files)
    return out


def _command(
    protocol: Protocol, stacks: Sequence[tuple[Stack, str, str]], shelf: StackLoader
) -> str:
    """Return what to type to make a run again, in a folder that holds its files: those of the user are called by their last name only."""
    precision = protocol.generation.precision
    if _built_in(protocol):
        words = ["--protocol", protocol.name]
    elif _built_in(protocol, precision):
        words = ["--protocol", protocol.name, "--precision", precision]
    else:
        words = ["--protocol", f"{protocol.name}.toml"]
    needed = {against for _, kind, against in stacks if kind == "given"}
    for stack, kind, _ in stacks:
        of_itself = kind == "baseline" or (
            stack.config and stack.name in needed and re.fullmatch(OWN_BASE, stack.name)
        )
        words += [] if of_itself else ["--stack", _spec(stack)]
    for part in protocol.lists:
        words += (
            ["--prompts", f"{part.name}={display_name(part.source or '')}"] if part.requires else []
        )
    words += [] if any(kind == "baseline" for _, kind, _ in stacks) else ["--baselines", "none"]
    for option, value in (("--device", shelf.device), ("--dtype", shelf.dtype)):
        words += [option, value] if value != getattr(StackLoader(), option[2:]) else []
    words += ["--allow-pickle"] if shelf.allow_pickle else []
    return shlex.join(["safegen", "evaluate", *words, "--out", "RUN"])


def _built_in(protocol: Protocol, precision: NativePrecision | None = None) -> bool:
    """Return whether a protocol's name, with another precision where one is given, stands for it: a file may have a built-in one's name."""
    if protocol.name not in PROTOCOLS:
        return False
    own = read_protocol(protocol.name)
    own = own.drawn(precision) if precision else own
    if len(own.lists) != len(protocol.lists):
        return False
    filled = [
        a if a.source else a.model_copy(update={"sha256": b.sha256, "prompts": b.prompts})
        for a, b in zip(own.lists, protocol.lists, strict=True)
    ]
    return own.model_copy(update={"lists": tuple(filled)}).id == protocol.id


def _entry(stack: Stack, shelf: StackLoader) -> Line:
    from safegen.patches.patch import Patch

    patches = [Patch.load(path) for path in stack.patches]
    model, weights = shelf.model(stack.model, stack.config)
    return {
        "name": stack.name,
        "model": display_name(stack.model),
        "weights": weights,
        "base": model.hash,
        "patches": [
            {
                "file": path.name,
                "hash": patch.hash,
                "parameters": sum(value.numel() for value in patch.tensors.values()),
                "layers": patch.layer_counts,
            }
            | {k: v for k, v in patch.metadata.to_json().items() if k in PATCH_METADATA}
            for path, patch in zip(stack.patches, patches, strict=True)
        ],
        "negative_prompt": stack.negative_prompt,
        "blank": stack.blank,
    } | {
        key: [one.fingerprint() for one in ones]
        for key, ones in (("loras", stack.loras), ("guards", stack.guards))
        if ones
    }


def _spec(stack: Stack) -> str:
    """Return a stack as the command line takes it.

    One with a config, LoRAs, a negative prompt or guards, or a blank one, is a recipe.
    """
    if (
        stack.config
        or stack.loras
        or stack.negative_prompt is not None
        or stack.guards
        or stack.blank
    ):
        return f"{stack.name}.toml"
    return f"{stack.name}={'+'.join([display_name(stack.model), *(p.name for p in stack.patches)])}"
