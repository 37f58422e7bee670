"""Ring-A-Bell: search a prompt with the text embedding of a concept.

Tsai et al. 2024, arXiv:2310.10012. The target of a prompt is its embedding plus eta times the
concept's direction, the mean difference of embeddings with and without the concept (equation 2).
A genetic search over tokens minimizes the squared distance to it (equation 4).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from safegen.attacks.core.base import Access, Attack, AttackContext, AttackRecord, Tier
from safegen.attacks.core.text import concept_pairs, read_pairs
from safegen.attacks.core.unedited import UneditedModel
from safegen.attacks.search.genetic import ElitistSearch, GeneticSearch, ReleasedSearch
from safegen.attacks.search.text_space import TextSpace
from safegen.core.settings import MAX_COUNT
from safegen.evaluation.samples import EvalSample

MAX_POPULATION = 10_000
"""Largest population: its embeddings are compared in memory."""


class RingABell(Attack):
    """Settings of the Ring-A-Bell attack."""

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "default": {},
        "paper": {
            "compat": True,
            "num_tokens": 16,
            "eta": 3.0,
            "population": 200,
            "generations": 3000,
            "patience": 3000,
            "crossover": 0.5,
            "mutation": 0.25,
        },
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
    parity: ClassVar[str] = (
        "With `compat` and equal seeds of `random`, `numpy` and `torch`, the population is that of "
        "the released loop, restated in the tests, token by token after 12 generations on the "
        "miniature model. The released prompts for SD 1.4 were not searched again."
    )
    deviations: ClassVar[str] = (
        "The best candidates survive unchanged and keep their scores. The released search may "
        "lose its best candidate, since survivors mutate too, and it scores every survivor again. "
        "A candidate is scored by the tokens that its text is read as, and is made of tokens that "
        "a text gives back. The released search scores tokens: with CLIP, 19 % of its texts of 16 "
        "random tokens, and none of 75, are read as those. "
        "A child differs from all candidates before it. A mutation replaces, inserts, removes or "
        "swaps tokens. "
        "Several prompts are searched in one batch. "
        "The text encoders are the published ones, without an edit of the stack. "
        "The search ends after `patience` generations without progress. "
        "`compat` restores the released search, also the draw of tokens without the first one. "
        "Pairs of prompts come from the concept's prompt lists, or from `pairs`. The released "
        "direction for nudity leaves out 19 of 250 pairs, as their images showed none. "
        "E is the token embeddings that the denoiser reads: those of all text encoders, T5 "
        "included, and on FLUX of T5 alone; the paper's is CLIP's. Candidates are CLIP's tokens."
    )
    access: ClassVar[Access] = "text_encoder"
    tier: ClassVar[Tier] = "static"

    num_tokens: int = Field(default=16, ge=1, le=MAX_POPULATION)
    """Tokens of the prompt (K)."""
    eta: float = Field(default=3.0, ge=0)
    """Strength of the concept's direction; the paper has 3 for nudity, 5 and 5.5 for violence."""
    num_pairs: int = Field(default=50, ge=1, le=MAX_COUNT)
    """Pairs of prompts with and without the concept that define its direction, from the first."""
    pairs: Path | None = None
    """CSV file of pairs. Columns: `prompt` and `prompt1`, or `sensitive prompt` and
    `normal prompt`. Default: pairs of the concept's prompt lists."""
    population: int = Field(default=32, ge=4, le=MAX_POPULATION)
    """Candidates in each generation; the better half survives."""
    generations: int = Field(default=200, ge=1, le=MAX_COUNT)
    """Highest number of generations."""
    crossover: float = Field(default=0.5, ge=0, le=1)
    """Probability that a child has two parents; with `compat`, that a survivor has two children."""
    mutation: float = Field(default=1.0, ge=0, le=1)
    """Probability that a child is mutated; with `compat`, that a candidate is."""
    patience: int = Field(default=40, ge=1, le=MAX_COUNT)
    """Generations without progress after which the search ends."""
    compat: bool = False
    """Search as the released code does, without elitism and on tokens instead of texts."""

    def build(self, context: AttackContext) -> GeneticAttacker:
        """Return the attacker; the concept's direction is computed here.

        Raises:
            ConfigError: `num_tokens` does not fit the encoder, or the concept has no prompt pairs.
            FileError: the file of pairs cannot be read.
        """
        return GeneticAttacker(self, context)


class GeneticAttacker:
    """Genetic search over the tokens of several prompts at once."""

    def __init__(self, config: RingABell, context: AttackContext) -> None:
        self.config, self.context = config, context
        self.space = TextSpace(context.target.model)
        self.space.check_room(config.num_tokens)
        self.vocabulary = self._vocabulary()
        pairs = read_pairs(config.pairs) if config.pairs else concept_pairs(context.concept)
        shown, benign = zip(*((pair[0], pair[1]) for pair in pairs), strict=True)
        n = config.num_pairs
        self.unedited = UneditedModel(context.target.model)
        """The published text encoders are searched, without the edit of the stack."""
        with torch.no_grad(), self.unedited.restored():
            self.direction = concept_direction(self._embed(shown[:n]), self._embed(benign[:n]))
        """Concept's direction (length, width)."""

    def _embed(self, texts: Sequence[str]) -> Tensor:
        return self.space.encode(self.space.tokenize(texts), texts)

    def _vocabulary(self) -> list[int]:
        """Return the tokens of candidates: printable ones that their own text is read as.

        With `compat`, all below the start mark but the first, as the released code draws them.
        """
        space = self.space
        if self.config.compat:
            return list(range(1, space.tokenizer.bos_token_id))
        tokens = torch.tensor(space.vocabulary)[:, None]
        texts = space.decode(tokens)
        stable = (space.tokenize(texts) == space.rows(tokens)).all(1).tolist()
        return [
            token
            for token, text, same in zip(space.vocabulary, texts, stable, strict=True)
            if same and text.strip().isprintable()
        ]

    @torch.no_grad()
    def attack(self, samples: Sequence[EvalSample]) -> list[AttackRecord]:
        """Return the best text found for each sample; with `compat`, the last generation's best."""
        with self.unedited.restored():
            return self._search(samples)

    def _search(self, samples: Sequence[EvalSample]) -> list[AttackRecord]:
        config, kind = self.config, ReleasedSearch if self.config.compat else ElitistSearch
        targets = self._embed([sample.prompt for sample in samples]) + config.eta * self.direction
        searches = [
            kind(
                self.vocabulary,
                config.num_tokens,
                population=config.population,
                crossover=config.crossover,
                mutation=config.mutation,
                seed=config.generator(sample).initial_seed(),
            )
            for sample in samples
        ]
        pairs = list(zip(searches, targets, strict=True))
        for generation in range(config.generations):
            running = [(s, target) for s, target in pairs if s.stagnation < config.patience]
            if not any(search.proposals for search, _ in running):
                break
            self._score(running)
            self.context.progress("searching prompts", generation + 1, config.generations)
            if self.context.target.exhausted:
                break
        return [self._record(*pair) for pair in zip(searches, samples, strict=True)]

    def _score(self, running: Sequence[tuple[GeneticSearch, Tensor]]) -> None:
        """Score the proposals of all searches in one batch, and begin the next generation."""
        tokens = torch.tensor([t for search, _ in running for t in search.proposals])
        sizes = [len(search.proposals) for search, _ in running]
        goals = [target.expand(n, -1, -1) for (_, target), n in zip(running, sizes, strict=True)]
        texts = self.space.decode(tokens)
        ids = self.space.rows(tokens) if self.config.compat else self.space.tokenize(texts)
        losses = (self.space.encode(ids, texts) - torch.cat(goals)).square().sum((1, 2))
        for (search, _), part in zip(running, losses.split(sizes), strict=True):
            search.advance(part.tolist())

    def _record(self, search: GeneticSearch, sample: EvalSample) -> AttackRecord:
        """Return the result of one search."""
        tokens = torch.tensor([search.best])
        text, config = self.space.decode(tokens)[0].strip(), self.config
        ended = search.stagnation >= config.patience or len(search.history) >= config.generations
        return AttackRecord(
            id=sample.id,
            prompt=text or sample.prompt,
            seed=sample.seed,
            loss=search.loss,
            history=tuple(search.history),
            tokens=search.best,
            stable=bool((self.space.tokenize([text]) == self.space.rows(tokens)).all()),
            stopped="" if ended or not search.proposals else self.context.target.exhausted,
        )


def concept_direction(shown: Tensor, benign: Tensor) -> Tensor:
    """Return the mean difference (length, width) of embeddings with and without a concept.

    c = mean_i [E(p_i with the concept) - E(p_i without)] (Tsai et al. 2024, equation 2), by
    position.

    Args:
        shown: embeddings (n, length, width) of prompts with the concept.
        benign: those of the same prompts without it.
    """
    return (shown - benign).mean(0)
