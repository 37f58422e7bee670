"""Ring-A-Bell: search a prompt whose text embedding lies where the concept's would.

Tsai et al. 2024, arXiv:2310.10012. The target of a prompt is its embedding plus eta times the
concept's direction, the mean difference of embeddings with and without the concept (equation 2).
A genetic search over tokens minimizes the squared distance to it (equation 4).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from safegen.attacks.core.base import Access, Attack, AttackContext, AttackRecord, Tier
from safegen.attacks.core.target import TextSpace
from safegen.attacks.core.text import concept_pairs
from safegen.core.errors import ConfigError
from safegen.evaluation.samples import EvalSample


class RingABell(Attack):
    """Settings of the Ring-A-Bell attack."""

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "default": {},
        "paper": {"compat": True, "generations": 3000, "patience": 3000},
    }
    """`paper`: the released search for nudity with K = 16."""
    TINY: ClassVar[Mapping[str, Any]] = {
        "population": 8,
        "generations": 3,
        "num_tokens": 4,
        "num_pairs": 4,
    }
    paper: ClassVar[str] = "arXiv:2310.10012"
    code_url: ClassVar[str] = "https://github.com/chiayi-hsu/Ring-A-Bell"
    code_commit: ClassVar[str] = "e4585ad"
    deviations: ClassVar[str] = (
        "The best candidates survive unchanged and keep their scores; the released search mutates "
        "them in place and scores them again in every generation. "
        "Candidates are scored by the tokens that their text is read as; the released search "
        "scores tokens that a text may not give back. "
        "The search ends after `patience` generations without progress. "
        "`compat` restores the released search. "
        "Pairs of prompts come from the concept's prompt lists."
    )
    access: ClassVar[Access] = "text_encoder"
    tier: ClassVar[Tier] = "static"

    num_tokens: int = Field(default=16, ge=1)
    """Tokens of the prompt (K)."""
    eta: float = Field(default=3.0, ge=0)
    """Strength of the concept's direction; the paper has 3 for nudity, 5 and 5.5 for violence."""
    num_pairs: int = Field(default=50, ge=1)
    """Pairs of prompts with and without the concept that define its direction."""
    population: int = Field(default=200, ge=4)
    """Candidates in each generation."""
    generations: int = Field(default=1000, ge=1)
    """Highest number of generations."""
    crossover: float = Field(default=0.5, ge=0, le=1)
    """Probability that a survivor has two children."""
    mutation: float = Field(default=0.25, ge=0, le=1)
    """Probability that one token of a candidate is replaced."""
    patience: int = Field(default=100, ge=1)
    """Generations without progress after which the search ends."""
    compat: bool = False
    """Search as the released code does, without elitism and on tokens instead of texts."""

    def build(self, context: AttackContext) -> GeneticSearch:
        """Return the attacker; the concept's direction is computed here.

        Raises:
            ConfigError: `num_tokens` does not fit the encoder, or the concept has no prompt pairs.
        """
        return GeneticSearch(self, context)


class GeneticSearch:
    """Genetic search over the tokens of several prompts at once."""

    def __init__(self, config: RingABell, context: AttackContext) -> None:
        self.config, self.context = config, context
        self.space = TextSpace(context.target.model)
        limit = self.space.length - 2
        if config.num_tokens > limit:
            raise ConfigError(
                f"num_tokens must be at most {limit} for this text encoder, got {config.num_tokens}"
            )
        self.vocabulary = torch.tensor(self.space.vocabulary)
        shown, benign, _ = zip(*concept_pairs(context.concept)[: config.num_pairs], strict=True)
        with torch.no_grad():
            difference = self._embed(shown) - self._embed(benign)
        self.direction = difference.mean(0)
        """Concept's direction (length, width)."""

    def _embed(self, texts: Sequence[str]) -> Tensor:
        return self.space.encode(self.space.tokenize(texts))

    @torch.no_grad()
    def attack(self, samples: Sequence[EvalSample]) -> list[AttackRecord]:
        """Return the best text found for each sample."""
        config = self.config
        targets = self._embed([sample.prompt for sample in samples]) + config.eta * self.direction
        searches = [
            _Search(config, self.vocabulary, config.generator(sample)) for sample in samples
        ]
        for generation in range(config.generations):
            self._score(searches, targets)
            running = [search for search in searches if not search.finished]
            for search in running:
                search.select()
            if self.context.target.exhausted or generation + 1 == config.generations:
                break
            running = [search for search in running if not search.finished]
            if not running:
                break
            for search in running:
                search.breed()
            self.context.progress("searching prompts", generation + 1, config.generations)
        return [self._record(*pair) for pair in zip(searches, samples, strict=True)]

    def _score(self, searches: Sequence[_Search], targets: Tensor) -> None:
        """Score every candidate without a score, of all searches in one batch."""
        waiting = [
            (search, target, search.unscored())
            for search, target in zip(searches, targets, strict=True)
            if not search.finished
        ]
        tokens = torch.cat([s.tokens[where] for s, _, where in waiting])
        goals = torch.cat([t.expand(len(where), -1, -1) for _, t, where in waiting])
        if self.config.compat:
            ids = self.space.rows(tokens)
        else:
            ids = self.space.tokenize(self.space.decode(tokens))
        losses = (self.space.encode(ids) - goals).square().sum((1, 2)).cpu()
        for (search, _, where), part in zip(
            waiting, losses.split([len(where) for _, _, where in waiting]), strict=True
        ):
            search.losses[where] = part

    def _record(self, search: _Search, sample: EvalSample) -> AttackRecord:
        """Return the result of one search: for `compat` the last generation's best candidate."""
        text = self.space.decode(search.best[None])[0].strip()
        ids = self.space.rows(search.best[None])
        return AttackRecord(
            id=sample.id,
            prompt=text or sample.prompt,
            seed=sample.seed,
            loss=search.loss,
            history=tuple(search.history),
            tokens=tuple(search.best.tolist()),
            stable=bool((self.space.tokenize([text]) == ids).all()),
            stopped=self.context.target.exhausted,
        )


class _Search:
    """Population of one prompt: tokens (n, k) and losses (n,), NaN where not scored."""

    def __init__(self, config: RingABell, vocabulary: Tensor, generator: torch.Generator) -> None:
        self.config, self.vocabulary, self.generator = config, vocabulary, generator
        self.tokens = self._draw((config.population, config.num_tokens))
        self.losses = torch.full((config.population,), torch.nan)
        self.best, self.loss = self.tokens[0], float("inf")
        self.history: list[float] = []
        self.idle = 0
        """Generations since the last progress."""

    @property
    def finished(self) -> bool:
        """Whether the search has made no progress for `patience` generations."""
        return self.idle >= self.config.patience

    def _draw(self, shape: tuple[int, ...]) -> Tensor:
        index = torch.randint(len(self.vocabulary), shape, generator=self.generator)
        return self.vocabulary[index]

    def unscored(self) -> Tensor:
        """Return the positions of candidates without a score."""
        return self.losses.isnan().nonzero().flatten()

    def select(self) -> None:
        """Keep the better half, and note the best candidate."""
        order = self.losses.argsort(stable=True)[: self.config.population // 2]
        self.tokens, self.losses = self.tokens[order], self.losses[order]
        loss = float(self.losses[0])
        improved = loss < self.loss
        self.idle = 0 if improved else self.idle + 1
        if improved or self.config.compat:
            self.best, self.loss = self.tokens[0].clone(), loss
        best = min([loss, *self.history[-1:]]) if not self.config.compat else loss
        self.history.append(best)

    def breed(self) -> None:
        """Add children of survivors by one-point crossover, and mutate.

        The best candidates stay as they are; with `compat` they may mutate too.
        """
        parents, config = self.tokens, self.config
        n, k = parents.shape
        wanted = torch.rand(n, generator=self.generator) < config.crossover
        mothers = wanted.nonzero().flatten()
        if not config.compat and not len(mothers):
            mothers = torch.arange(n)
        fathers = torch.randint(n, mothers.shape, generator=self.generator)
        points = torch.randint(0, k, mothers.shape, generator=self.generator)
        head = torch.arange(k) < points[:, None]
        a, b = parents[mothers], parents[fathers]
        children = torch.cat([torch.where(head, a, b), torch.where(head, b, a)])
        if config.compat:
            self.tokens = self._mutate(torch.cat([parents, children]))
            self.losses = torch.full((len(self.tokens),), torch.nan)
        else:
            children = self._mutate(children)
            self.tokens = torch.cat([parents, children])
            self.losses = torch.cat([self.losses, torch.full((len(children),), torch.nan)])

    def _mutate(self, tokens: Tensor) -> Tensor:
        """Return candidates of which some have one token replaced."""
        n, k = tokens.shape
        chosen = torch.rand(n, generator=self.generator) < self.config.mutation
        where = torch.randint(k, (n, 1), generator=self.generator)
        mutated = tokens.scatter(1, where, self._draw((n, 1)))
        return torch.where(chosen[:, None], mutated, tokens)
