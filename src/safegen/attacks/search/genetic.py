"""Genetic search over rows of tokens: an elitist one, and the one that Ring-A-Bell released."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch

Tokens = tuple[int, ...]
"""Tokens of one candidate."""
ATTEMPTS = 20
"""Draws for each child that is wanted; children that were drawn before are discarded."""


class GeneticSearch(Protocol):
    """Search of one prompt; the caller scores its proposals."""

    proposals: list[Tokens]
    """Candidates to score next; none if the search is at its end."""
    best: Tokens
    """Result so far."""
    loss: float
    """Loss of the result."""
    history: list[float]
    """Lowest loss so far, by generation."""
    stagnation: int
    """Generations since the last progress."""

    def advance(self, losses: Sequence[float]) -> None:
        """Select survivors by the losses of the proposals, and propose the next candidates."""
        ...


class ElitistSearch:
    """Search in which the best candidates survive unchanged with their losses (ours).

    Each child is new. It comes from one or two survivors and is mutated: one token is replaced
    (55 %), inserted (15 %) or removed (10 %), the last one making or filling the room, or two are
    swapped (20 %).
    """

    def __init__(
        self,
        vocabulary: Sequence[int],
        num_tokens: int,
        *,
        population: int,
        crossover: float,
        mutation: float,
        seed: int,
    ) -> None:
        """Draw the first candidates.

        Args:
            vocabulary: tokens that a candidate may have.
            num_tokens: tokens of a candidate.
            population: candidates in each generation; half of them survive.
            crossover: probability that a child has two parents.
            mutation: probability that a child is mutated.
            seed: seed of every draw.
        """
        self.vocabulary, self.survivors = vocabulary, population // 2
        self.crossover, self.mutation = crossover, mutation
        self.random = random.Random(seed)
        self.population: list[tuple[float, Tokens]] = []
        """Survivors with their losses, the best first."""
        self.seen: set[Tokens] = set()
        self.proposals = self._new(population, lambda: self._draw(num_tokens))
        self.best, self.loss = self.proposals[0], float("inf")
        self.history: list[float] = []
        self.stagnation = 0

    def advance(self, losses: Sequence[float]) -> None:
        """Select survivors by the losses of the proposals, and propose their children."""
        scored = list(zip(losses, self.proposals, strict=True))
        ordered = sorted(self.population + scored, key=lambda pair: pair[0])
        self.population = ordered[: self.survivors]
        loss, best = self.population[0]
        self.stagnation = 0 if loss < self.loss else self.stagnation + 1
        self.best, self.loss = best, loss
        self.history.append(loss)
        self.proposals = self._new(self.survivors, self._child)

    def _new(self, n: int, draw: Callable[[], Tokens]) -> list[Tokens]:
        """Return up to `n` candidates that were not drawn before."""
        new: list[Tokens] = []
        for _ in range(n * ATTEMPTS):
            if len(new) == n:
                break
            if (candidate := draw()) not in self.seen:
                self.seen.add(candidate)
                new.append(candidate)
        return new

    def _draw(self, n: int) -> Tokens:
        return tuple(self.random.choices(self.vocabulary, k=n))

    def _parent(self) -> Tokens:
        """Return the better of two survivors."""
        n = len(self.population)
        return self.population[min(self.random.randrange(n), self.random.randrange(n))][1]

    def _child(self) -> Tokens:
        child = self._parent()
        if self.random.random() < self.crossover:
            point = self.random.randint(0, len(child))
            child = child[:point] + self._parent()[point:]
        return self._mutate(child) if self.random.random() < self.mutation else child

    def _mutate(self, tokens: Tokens) -> Tokens:
        i, j = (self.random.randrange(len(tokens)) for _ in range(2))
        (token,) = self._draw(1)
        kind = self.random.random()
        if kind < 0.55:
            return (*tokens[:i], token, *tokens[i + 1 :])
        if kind < 0.7:
            return (*tokens[:i], token, *tokens[i:-1])
        if kind < 0.8:
            return (*tokens[:i], *tokens[i + 1 :], token)
        swapped = list(tokens)
        swapped[i], swapped[j] = swapped[j], swapped[i]
        return tuple(swapped)


class ReleasedSearch:
    """Search as Ring-A-Bell's released code does it, with its order of draws.

    Survivors may mutate and are scored in every generation. The result is the best of the last
    generation, not the best ever.
    """

    def __init__(
        self,
        vocabulary: Sequence[int],
        num_tokens: int,
        *,
        population: int,
        crossover: float,
        mutation: float,
        seed: int,
    ) -> None:
        """Draw the first candidates.

        Args:
            vocabulary: successive ids that a candidate may have.
            num_tokens: tokens of a candidate.
            population: first candidates; half of them survive, and more may have children.
            crossover: probability that a survivor has two children.
            mutation: probability that a candidate is mutated.
            seed: seed of every draw, modulo 2**32, as `random`, `numpy` and `torch` take it.
        """
        self.low, self.high = vocabulary[0], vocabulary[-1] + 1
        self.survivors, self.crossover, self.mutation = population // 2, crossover, mutation
        seed %= 2**32
        self.random = random.Random(seed)
        self.numpy = np.random.RandomState(seed)  # the generator of the released code
        generator = torch.Generator().manual_seed(seed)
        shape = (population, num_tokens)
        tokens = torch.randint(self.low, self.high, shape, generator=generator)
        self.proposals: list[Tokens] = [tuple(row) for row in tokens.tolist()]
        self.best, self.loss = self.proposals[0], float("inf")
        self.history: list[float] = []
        self.stagnation = 0

    def advance(self, losses: Sequence[float]) -> None:
        """Select survivors by the losses of all candidates, and breed and mutate them."""
        order = sorted(range(len(losses)), key=losses.__getitem__)[: self.survivors]
        parents = [self.proposals[i] for i in order]
        self.best, self.loss = parents[0], losses[order[0]]
        lowest = min([self.loss, *self.history[-1:]])
        self.stagnation = 0 if [lowest] != self.history[-1:] else self.stagnation + 1
        self.history.append(lowest)
        self.proposals = [self._mutate(candidate) for candidate in self._breed(parents)]

    def _breed(self, parents: Sequence[Tokens]) -> list[Tokens]:
        """Return the parents, each followed by its two children by one-point crossover."""
        candidates = []
        for parent in parents:
            candidates.append(parent)
            if self.random.random() < self.crossover:
                other = parents[self.numpy.randint(0, len(parents), size=(1,))[0]]
                point = int(self.numpy.randint(1, len(parent) + 1, size=(1,))[0]) - 1
                candidates += [parent[:point] + other[point:], other[:point] + parent[point:]]
        return candidates

    def _mutate(self, tokens: Tokens) -> Tokens:
        """Return a candidate of which one token may be replaced."""
        if self.random.random() >= self.mutation:
            return tokens
        i = int(self.numpy.randint(1, len(tokens) + 1, size=(1,))[0]) - 1
        token = int(self.numpy.randint(self.low, self.high, size=(1,))[0])
        return (*tokens[:i], token, *tokens[i + 1 :])
