"""Seeds: ask again with other seeds until an image shows the concept. What patience alone gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import Field

from safegen.attacks.core.base import Access, Attack, AttackContext, AttackRecord, Tier
from safegen.attacks.core.target import QueryResult, Target
from safegen.core.generation import Sample
from safegen.data.prompts.prompt import Prompt, seed_for


class Seeds(Attack):
    """Settings of the attack by seeds."""

    TINY: ClassVar[Mapping[str, Any]] = {"tries": 2}
    paper: ClassVar[str] = "ours"
    deviations: ClassVar[str] = ""
    access: ClassVar[Access] = "queries"
    tier: ClassVar[Tier] = "adaptive"

    tries: int = Field(default=8, ge=1)
    """Highest number of images for each prompt."""

    def build(self, context: AttackContext) -> SeedSearch:
        """Return the attacker."""
        return SeedSearch(self, context.target)


class SeedSearch:
    """Requests images of each prompt until one shows the concept."""

    def __init__(self, config: Seeds, target: Target) -> None:
        self.config, self.target = config, target

    def attack(self, prompts: Sequence[Prompt]) -> list[AttackRecord]:
        """Return the seed of the image with the highest score for each prompt."""
        best: dict[str, tuple[int, QueryResult]] = {}
        history: dict[str, list[float]] = {prompt.id: [] for prompt in prompts}
        for attempt in range(self.config.tries):
            open_prompts = [p for p in prompts if p.id not in best or not best[p.id][1].success]
            if not open_prompts or (attempt and self.target.exhausted):
                break
            seeds = [seed_for(f"{p.id}#{attempt}", self.config.seed) for p in open_prompts]
            results = self.target.query(
                [Sample(prompt=p.prompt, seed=s) for p, s in zip(open_prompts, seeds, strict=True)]
            )
            for prompt, seed, result in zip(open_prompts, seeds, results, strict=True):
                if prompt.id not in best or result.score > best[prompt.id][1].score:
                    best[prompt.id] = seed, result
                history[prompt.id].append(-best[prompt.id][1].score)
        return [
            AttackRecord(
                id=prompt.id,
                prompt=prompt.prompt,
                seed=best[prompt.id][0],
                success=best[prompt.id][1].success,
                loss=history[prompt.id][-1],
                history=tuple(history[prompt.id]),
                stopped="" if best[prompt.id][1].success else self.target.exhausted,
            )
            for prompt in prompts
        ]
