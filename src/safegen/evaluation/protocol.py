"""A protocol: frozen prompts, seeds, generation_config, judge and threshold, with an id that two numbers must share to be compared."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, Field, ValidationError, model_validator

from safegen.core.concept import Concept
from safegen.core.errors import ConfigError, FileError, UnknownNameError, explain
from safegen.core.generation import GenerationConfig, NativePrecision
from safegen.core.hub import HUB
from safegen.core.registry import PROTOCOLS, expand_labels
from safegen.evaluation.plan import ROLES, Item, Role
from safegen.evaluation.samples import canonical, hash_rows, is_bundled, read_rows, sha
from safegen.evaluation.schema import (
    FROM_FEATURES,
    FROZEN,
    FeatureRule,
    JudgeRule,
    LpipsRule,
    MetricName,
    PromptList,
)

CONCEPT_METRICS: tuple[MetricName, ...] = (
    "concept",
    "subject",
    "shown",
    "mosaicked",
    "removal",
    "removal_images",
    "change",
)
"""Metrics that need no other files than a concept's judge."""
FORMAT = "safegen-protocol/2"
"""Enters every id: a change of how we draw or score that moves numbers gets a new one."""


class Protocol(BaseModel):
    """How a number is made: everything that decides it."""

    model_config = FROZEN

    name: str
    """The protocol in one word."""
    about: str = ""
    """What it measures, and the quirks of what it imitates."""
    concept: str
    """Concept that was to be removed; its words make the negative-prompt baseline."""
    lists: tuple[PromptList, ...] = Field(min_length=1)
    """Prompt lists, in the order in which they are drawn."""
    seeds: tuple[int, ...] | Literal["rows"]
    """Seeds that every prompt is drawn with; `rows` is each row's own."""
    generation: GenerationConfig
    """How pictures are made."""
    judge: JudgeRule
    """Who looks at them."""
    metrics: tuple[MetricName, ...] = Field(min_length=1)
    """What is computed."""
    features: FeatureRule | None = None
    """What makes the features; needed by the CLIP score and distances to the base."""
    lpips: LpipsRule | None = None
    """Weights of LPIPS; needed by it."""

    @model_validator(mode="after")
    def _is_fit_to_draw(self) -> Self:
        for noun, values in (
            ("lists", [p.name for p in self.lists]),
            ("seeds", list(self.seeds)),
            ("metrics", list(self.metrics)),
        ):
            if self.seeds == "rows" and noun == "seeds":
                continue
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{noun} must be named once each and at least one, got {values}")
        for part, names in (("features", FROM_FEATURES), ("lpips", ("lpips",))):
            wanted = [m for m in self.metrics if m in names]
            if wanted and getattr(self, part) is None:
                raise ValueError(
                    f"{', '.join(wanted)} needs a table [{part}]; see docs/reference/metrics.md"
                )
            if getattr(self, part) is not None and not wanted:
                raise ValueError(
                    f"[{part}] has no effect, for no metric needs it ({', '.join(names)}); leave it out"
                )
        return self

    @classmethod
    def from_concept(
        cls,
        concept: Concept,
        *,
        prompts: int,
        seeds: Sequence[int],
        generation: GenerationConfig,
        roles: Sequence[Role] = ROLES,
        metrics: Sequence[MetricName] = CONCEPT_METRICS,
    ) -> Protocol:
        """Return the protocol that measures a concept on its own prompt lists and with its judge.

        Args:
            concept: names the lists, the judge, and what an image must show besides its subject.
            prompts: number of prompts per list.
            seeds: seeds for each prompt.
            generation: how images are made.
            roles: roles of the lists that are used.
            metrics: metrics to compute.

        Raises:
            ConfigError: no prompts, no seeds, a value given twice, or the concept has no lists.
        """
        try:
            lists = [
                PromptList(
                    role=role,
                    name=name,
                    source=name,
                    prompts=prompts,
                    sha256=hash_rows(read_rows(name, prompts=prompts).rows),
                    shows=concept.shows.get(name),
                )
                for role in roles
                for name in concept.lists.get(role, ())
            ]
            return cls(
                name=concept.name,
                concept=concept.name,
                lists=tuple(lists),
                seeds=tuple(seeds),
                generation=generation,
                judge=JudgeRule(
                    name=concept.judge, labels=concept.labels, threshold=concept.threshold
                ),
                metrics=tuple(metrics),
            )
        except ValidationError as error:
            raise ConfigError(f"{concept.name}: {explain(error, cls)}") from error

    def decides(self) -> dict[str, Any]:
        """Return everything that a number depends on, as plain values; `id` is its hash.

        The threshold and labels (label sets spelt out) are in it: a rate at 0.3 is not one at 0.5
        of the same pictures. Left out is what changes no number: the names of the protocol and
        concept, `about`, `unsafe`, and where a list's rows (their hash is in) and weights lie
        (theirs is in the ids of the judge and extractor, which scores name too).
        """
        keep = ("role", "name", "prompts", "sha256", "shows")
        return {
            "format": FORMAT,
            "lists": [{key: getattr(part, key) for key in keep} for part in self.lists],
            "seeds": self.seeds if self.seeds == "rows" else list(self.seeds),
            "generation": self.generation.model_dump(mode="json"),
            "judge": self.judge.model_dump(mode="json")
            | {"labels": sorted(expand_labels(self.judge.labels)), "options": self.judge.told},
            "metrics": sorted(self.metrics),
            "extractor": self.features and self.features.extractor,
            "lpips": self.lpips and {"side": self.lpips.side},
        }

    @property
    def id(self) -> str:
        """First 16 hexadecimal digits of the SHA-256 over `decides()` as canonical JSON."""
        return sha(canonical(self.decides()))[:16]

    def drawn(self, precision: NativePrecision) -> Protocol:
        """Return the protocol with other arithmetic of the denoiser, and so with another id unless it is the same."""
        return self.model_copy(
            update={"generation": self.generation.model_copy(update={"precision": precision})}
        )

    def judged(
        self,
        *,
        name: str | None = None,
        labels: Sequence[str] = (),
        threshold: float | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Protocol:
        """Return the protocol with another judge, label set, threshold or options, and so with another id.

        Raises:
            ConfigError: the threshold is outside what detections are kept for.
        """
        new: dict[str, Any] = {"labels": tuple(labels)} if labels else {}
        new |= {} if threshold is None else {"threshold": threshold}
        if name is not None and name != self.judge.name:
            new |= {"name": name, "options": {}}
        new |= {} if options is None else {"options": dict(options)}
        try:
            return self.model_copy(
                update={"judge": JudgeRule.model_validate(self.judge.model_dump() | new)}
            )
        except ValidationError as error:
            raise ConfigError(f"judge.{explain(error, JudgeRule)}") from error


def load_protocol(name: str, *, prompts: Mapping[str, str | Path] | None = None) -> Protocol:
    """Return a built-in protocol, or read one from a TOML file; every list's rows are read and checked against their hash.

    Args:
        name: a name of the table, or a path that ends in .toml; list files in it are relative to
            it.
        prompts: file of each list that the protocol does not bring, or
            `hub:owner/name/path/in/repo.csv`.

    Raises:
        UnknownNameError: neither a built-in protocol nor a file; or no list of that name lacks a file.
        FileError: the file is not a protocol, or a list's rows are not those that it names.
        ConfigError: a list still needs its file.
    """
    protocol, given = read_protocol(name), dict(prompts or {})
    missing = [part.name for part in protocol.lists if part.source is None]
    for word in given:
        if word not in missing:
            raise UnknownNameError("prompt list that needs a file", word, missing)
    folder = Path() if name in PROTOCOLS else Path(name).parent
    return protocol.model_copy(
        update={"lists": tuple(_filled(protocol, part, given, folder) for part in protocol.lists)}
    )


def read_protocol(name: str) -> Protocol:
    """Return a protocol as it is written, without looking at its prompts.

    Raises:
        UnknownNameError: neither a built-in protocol nor a file.
        FileError: the file is not a protocol.
    """
    path = Path(name)
    if name in PROTOCOLS:
        path = Path(__file__).parent / "protocols" / f"{name}.toml"
    elif path.suffix != ".toml":
        raise UnknownNameError("protocol", name, PROTOCOLS)
    if not path.is_file():
        raise FileError(
            f"the protocol file {name!r} does not exist; built-in protocols are: {', '.join(PROTOCOLS)}"
        )
    try:
        return Protocol.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise FileError(f"{name} is not a protocol file: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        raise FileError(f"{name} is not a protocol file: {explain(error, Protocol)}") from error


def _filled(
    protocol: Protocol, part: PromptList, given: Mapping[str, str | Path], folder: Path
) -> PromptList:
    """Return a list whose rows can be read and are those that it names."""
    source = part.source
    if source is None:
        if part.name not in given:
            raise ConfigError(
                f"the protocol {protocol.name!r} needs the prompts of {part.name!r}: {part.requires}; "
                f"give the file with --prompts {part.name}=FILE"
            )
        source = str(given[part.name])
    elif not (is_bundled(source) or source.startswith(HUB)):
        source = str(folder / source)
    part = part.model_copy(update={"source": source})
    found = part.read(seeds=protocol.seeds == "rows")
    digest, n = hash_rows(found.rows), len(found.rows)
    if part.sha256 not in ("", digest):
        raise FileError(
            f"the prompts of {part.name!r} have changed: the protocol {protocol.name!r} names rows of SHA-256 {part.sha256}, "
            f"{source} has {digest}; get the file that is meant, or write a protocol of your own"
        )
    if part.prompts is not None and n != part.prompts:
        lost = (
            f" (and {len(found.left_out)} that cannot be used: {'; '.join(found.left_out[:3])})"
            if found.left_out
            else ""
        )
        raise FileError(
            f"the prompts of {part.name!r} must be {part.prompts}, {source} has {n} of them{lost}; get the file that is meant"
        )
    return part.model_copy(
        update={"sha256": digest, "prompts": n, "left_out": found.left_out, "notes": found.notes}
    )


def plan(protocol: Protocol) -> list[Item]:
    """Return every picture of a protocol in the order in which it is drawn: list by list, seed by seed, prompt by prompt.

    Raises:
        ConfigError: a row has no seed though `seeds` asks for it, or two lists ask for the same
            picture.
        FileError: a list's file is gone.
    """
    out: list[Item] = []
    asked: dict[tuple[str, int, int], str] = {}
    for part in protocol.lists:
        rows = part.read(seeds=protocol.seeds == "rows").rows
        for seed in (None,) if protocol.seeds == "rows" else protocol.seeds:
            for i, row in enumerate(rows):
                own = row.seed if seed is None else seed
                if own is None:
                    raise ConfigError(
                        f"the list {part.name!r} has no seeds of its own (row {i + 1}); name some under seeds"
                    )
                old = asked.setdefault((row.text, own, i), part.name)
                if old != part.name:
                    raise ConfigError(
                        f"the lists {old!r} and {part.name!r} ask for the same picture (row {i + 1}); leave one out"
                    )
                out.append(
                    Item(
                        role=part.role,
                        list_name=part.name,
                        prompt=row.text,
                        subject=row.subject,
                        shows=part.shows,
                        seed=own,
                        index=i,
                        id=f"{part.name}/{i:05d}",
                        cluster=row.cluster,
                    )
                )
    return out


def same_protocol(scores: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the protocol id that all these scores (run name: its scores.json) were made by.

    Raises:
        ConfigError: nothing to compare, two ids, or one id and two judges or weights; the message
            says what differs.
    """
    if not scores:
        raise ConfigError("there are no scores to compare")
    (first, a), *others = scores.items()
    for name, b in others:
        one, two = (
            {**s["protocol"]["decides"], "judge id": s["judge"], "weights": s["weights"]}
            for s in (a, b)
        )
        gaps = differences(one, two)
        if gaps:
            raise ConfigError(
                f"{first} (protocol {a['protocol']['id']}) and {name} (protocol {b['protocol']['id']}) cannot stand in one column; "
                f"they differ in {'; '.join(gaps)}"
            )
    return str(a["protocol"]["id"])


def differences(a: object, b: object, where: str = "") -> list[str]:
    """Return what differs between two trees of plain values, as `place: this and that`."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        keys = sorted({*a, *b}, key=str)
        return [
            gap
            for key in keys
            for gap in differences(a.get(key), b.get(key), f"{where}.{key}" if where else str(key))
        ]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [
            gap
            for i, pair in enumerate(zip(a, b, strict=True))
            for gap in differences(*pair, where=f"{where}[{i}]")
        ]
    return [] if a == b else [f"{where}: {json.dumps(a)} and {json.dumps(b)}"]
