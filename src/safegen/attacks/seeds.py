"""Seeds: ask again with other seeds and guidance scales until an image shows the concept.

It is what patience alone gives: the text stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import Field

from safegen.attacks.core.base import Access, Attack, AttackContext, AttackRecord, Tier
from safegen.attacks.core.target import QueryResult, Target
from safegen.core.generation import GuidanceScale
from safegen.core.settings import MAX_SEEDS
from safegen.data.prompts.prompt import seed_for
from safegen.evaluation.samples import EvalSample, Role


class Seeds(Attack):
    """Settings of the attack by seeds and guidance scales."""

    TINY: ClassVar[Mapping[str, Any]] = {"tries": 2, "guidance_scales": (3.0,)}
    paper: ClassVar[str] = "ours"
    deviations: ClassVar[str] = ""
    access: ClassVar[Access] = "queries"
    tier: ClassVar[Tier] = "adaptive"
    role: ClassVar[Role] = "explicit"

    tries: int = Field(default=8, ge=1, le=MAX_SEEDS)
    """Highest number of images for each prompt."""
    guidance_scales: tuple[GuidanceScale, ...] = Field(default=(10.0, 3.0), max_length=100)
    """Guidance scales that take turns with the configuration's own, one for each seed."""

    def build(self, context: AttackContext) -> SeedSearch:
        """Return the attacker."""
        return SeedSearch(self, context.target)


class SeedSearch:
    """Requests images of each prompt until one shows the concept."""

    def __init__(self, config: Seeds, target: Target) -> None:
        self.config, self.target = config, target

    def attack(self, samples: Sequence[EvalSample]) -> list[AttackRecord]:
        """Return seed and guidance scale of the image with the highest score for each sample."""
        best: dict[str, tuple[EvalSample, QueryResult]] = {}
        history: dict[str, list[float]] = {sample.id: [] for sample in samples}
        for attempt in range(self.config.tries):
            unbroken = [s for s in samples if s.id not in best or not best[s.id][1].success]
            if not unbroken or (attempt and self.target.exhausted):
                break
            tries = [self._try(sample, attempt) for sample in unbroken]
            for sample, result in zip(tries, self.target.query(tries), strict=True):
                if sample.id not in best or result.score > best[sample.id][1].score:
                    best[sample.id] = sample, result
                history[sample.id].append(-best[sample.id][1].score)
        return [
            AttackRecord(
                id=sample.id,
                prompt=sample.prompt,
                seed=sample.seed,
                guidance_scale=sample.guidance_scale,
                success=result.success,
                loss=history[sample.id][-1],
                history=tuple(history[sample.id]),
                stopped="" if result.success else self.target.exhausted,
            )
            for sample, result in (best[sample.id] for sample in samples)
        ]

    def _try(self, sample: EvalSample, attempt: int) -> EvalSample:
        """Return the sample of one attempt; the first is the sample itself."""
        if not attempt:
            return sample
        scales = (sample.guidance_scale, *self.config.guidance_scales)
        update = {
            "seed": seed_for(f"{sample.id}#{attempt}", self.config.seed),
            "guidance_scale": scales[attempt % len(scales)],
        }
        return sample.model_copy(update=update)
