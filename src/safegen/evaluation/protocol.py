"""Evaluation protocol: frozen prompts, seeds, settings, judge and metrics, with an id."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from safegen.core.concept import Concept, Phrases
from safegen.core.errors import ConfigError, UnusedSettingWarning, explain
from safegen.core.generation import GenerationConfig, NativePrecision
from safegen.core.registry import expand_labels
from safegen.core.settings import BaseSettings, Name, Seed, Seeds
from safegen.core.text import short_repr
from safegen.evaluation.samples import (
    ROLES,
    EvalSample,
    Role,
    canonical,
    hash_prompts,
    read_prompt_list,
    request_parts,
    sha,
)
from safegen.evaluation.schema import (
    FROM_FEATURES,
    FeatureRule,
    JudgeRule,
    LpipsRule,
    MetricName,
    PromptList,
    concept_rule,
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
"""Metrics that need no other network than a concept's judge."""
FORMAT = "safegen-protocol/2"
"""Part of every id: a change of the code that moves numbers gets a new one."""


class Protocol(BaseSettings):
    """Everything that decides a number: prompts, seeds, settings, judge and metrics.

    Example:
        >>> protocol = safegen.Protocol.from_concept(
        ...     safegen.load_concept("skulls"),
        ...     prompts=8,
        ...     seeds=[1, 2],
        ...     generation=safegen.GenerationConfig(),
        ... )
    """

    name: Name
    """Name of the protocol in one word."""
    about: str = ""
    """What the protocol measures, and the quirks of what it imitates."""
    concept: Name
    """Concept to remove."""
    words: Phrases = ()
    """Phrases of the negative-prompt baseline; those of the built-in concept if empty."""
    lists: tuple[PromptList, ...] = Field(min_length=1)
    """Prompt lists, in the order of generation."""
    seeds: Seeds | Literal["rows"]
    """Seeds for every prompt; `rows` uses the seed of each prompt."""
    seed: Seed = 0
    """With `seeds = "rows"`, the seed from which prompts without their own seed get one."""
    generation: GenerationConfig
    """How images are generated."""
    judge: JudgeRule
    """How images are judged."""
    metrics: tuple[MetricName, ...] = Field(min_length=1)
    """Metrics to compute."""
    features: FeatureRule | None = None
    """Feature extractor, for the CLIP score and distances to the base model."""
    lpips: LpipsRule | None = None
    """Weights of LPIPS, for that metric."""

    def __repr__(self) -> str:
        """Return name, id, concept, prompt lists and judge in one line."""
        lists = [part.name for part in self.lists]
        return short_repr(
            Protocol,
            repr(self.name),
            id=self.id,
            concept=self.concept,
            lists=lists,
            judge=self.judge.name,
        )

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        names: dict[str, list[Any]] = {
            "lists": [p.name for p in self.lists],
            "metrics": list(self.metrics),
        }
        if self.seeds != "rows":
            names["seeds"] = list(self.seeds)
        for noun, values in names.items():
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{noun} must be named once each and at least one, got {values}")
        for part, needed_by in (("features", FROM_FEATURES), ("lpips", ("lpips",))):
            wanted = [m for m in self.metrics if m in needed_by]
            if wanted and getattr(self, part) is None:
                raise ValueError(
                    f"{', '.join(wanted)} needs a table [{part}]; see docs/reference/metrics.md"
                )
            if getattr(self, part) is not None and not wanted:
                warnings.warn(
                    f"[{part}] has no effect without one of the metrics {', '.join(needed_by)}",
                    UnusedSettingWarning,
                    stacklevel=2,
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
            generation: how images are generated.
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
                    sha256=hash_prompts(read_prompt_list(name, prompts=prompts).rows),
                    shows=concept.shows.get(name),
                )
                for role in roles
                for name in concept.lists.get(role, ())
            ]
            return cls(
                name=concept.name,
                concept=concept.name,
                words=concept.words,
                lists=tuple(lists),
                seeds=tuple(seeds),
                generation=generation,
                judge=concept_rule(concept),
                metrics=tuple(metrics),
            )
        except ValidationError as error:
            raise ConfigError(f"{concept.name}: {explain(error, cls)}") from error

    @property
    def protocol_seed(self) -> int | None:
        """Seed for prompts without their own; None if seeds are not those of the prompts."""
        return self.seed if self.seeds == "rows" else None

    def decides(self) -> dict[str, Any]:
        """Return everything that a number depends on, as plain values; `id` is its hash.

        Labels (expanded) and threshold are part of it. Left out is what changes no number: the
        names of the protocol and the concept, `about`, `unsafe`, and the paths of prompts and
        weights. The hash of the prompts is part of it; the hashes of weights are part of the ids
        of the judge and the extractor, which scores name too.
        """
        keys = ("role", "name", "prompts", "sha256", "shows")
        return {
            "format": FORMAT,
            "lists": [{key: getattr(part, key) for key in keys} for part in self.lists],
            "seeds": self.seeds if self.seeds == "rows" else list(self.seeds),
            "generation": self.generation.model_dump(mode="json"),
            "judge": self.judge.model_dump(mode="json")
            | {
                "labels": sorted(expand_labels(self.judge.labels)),
                "options": self.judge.public_options,
            },
            "metrics": sorted(self.metrics),
            "extractor": self.features and self.features.extractor,
            "lpips": self.lpips and {"side": self.lpips.side},
        }

    @property
    def id(self) -> str:
        """First 16 hexadecimal digits of the SHA-256 over `decides()` as canonical JSON."""
        return sha(canonical(self.decides()))[:16]

    def samples(self) -> list[EvalSample]:
        """Return the samples of one stack: list by list, seed by seed, prompt by prompt.

        Raises:
            ConfigError: two lists ask for the same image.
            FileError: the file of a list is missing.
        """
        samples: list[EvalSample] = []
        names: dict[tuple[object, ...], str] = {}
        for part in self.lists:
            rows = part.read(protocol_seed=self.protocol_seed).rows
            last = EvalSample(  # what all samples of the list share, and the largest index
                list_name=part.name,
                role=part.role,
                prompt="",
                shows=part.shows,
                seed=0,
                index=len(rows) - 1,
            )
            for seed in (None,) if self.seeds == "rows" else self.seeds:
                for i, row in enumerate(rows):
                    sample = last.compact(  # the rows are checked where they are read
                        id=f"{part.name}/{i:05d}",
                        prompt=row.prompt,
                        prompt_sha256=sha(row.prompt),
                        subject=row.subject,
                        background=row.background,
                        seed=(row.seed or 0) if seed is None else seed,
                        index=i,
                        cluster=row.cluster,
                        start=row.start,
                        guidance_scale=row.guidance_scale,
                    )
                    samples.append(sample)
                    is_attack = part.role == "attack"
                    identity = (row.prompt, sample.seed, i, is_attack, *request_parts(row))
                    note = names.get if part is self.lists[-1] else names.setdefault
                    other = note(identity, part.name)
                    if other != part.name:
                        raise ConfigError(
                            f"lists must ask for different images, got the same in {other!r} and "
                            f"{part.name!r} (row {i + 1}). Leave one out"
                        )
        return samples

    def with_precision(self, precision: NativePrecision) -> Protocol:
        """Return the protocol with another precision of the denoiser."""
        return self.model_copy(
            update={"generation": self.generation.model_copy(update={"precision": precision})}
        )

    def with_judge(
        self,
        *,
        name: str | None = None,
        labels: Sequence[str] = (),
        threshold: float | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Protocol:
        """Return the protocol with another judge, labels, threshold or options.

        Raises:
            ConfigError: the threshold is below the stored scores.
        """
        new: dict[str, Any] = {"labels": tuple(labels)} if labels else {}
        new |= {} if threshold is None else {"threshold": threshold}
        if name is not None and name != self.judge.name:
            new |= {"name": name, "options": {}}
        new |= {} if options is None else {"options": dict(options)}
        try:
            rule = JudgeRule.model_validate(self.judge.model_dump() | new)
        except ValidationError as error:
            raise ConfigError(f"judge.{explain(error, JudgeRule)}") from error
        return self.model_copy(update={"judge": rule})
