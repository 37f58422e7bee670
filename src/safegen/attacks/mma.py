"""MMA-Diffusion: search tokens whose pooled text embedding is that of a prompt for the concept.

Yang et al. 2024, arXiv:2311.17516, the text attack: greedy coordinate gradient (Zou et al. 2023,
arXiv:2307.15043) on the cosine of pooled embeddings, without tokens that name the concept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cosine_similarity, one_hot

from safegen.attacks.core.base import Access, Attack, AttackContext, AttackRecord, Tier
from safegen.attacks.core.target import TextSpace
from safegen.attacks.core.text import explicit_text, naming_tokens
from safegen.core.errors import ConfigError
from safegen.evaluation.samples import EvalSample
from safegen.models.text_encoder import TextEncoderView


class MMA(Attack):
    """Settings of the text attack of MMA-Diffusion."""

    TINY: ClassVar[Mapping[str, Any]] = {
        "num_tokens": 4,
        "iterations": 2,
        "candidates": 8,
        "top_k": 8,
    }
    paper: ClassVar[str] = "arXiv:2311.17516"
    code_url: ClassVar[str] = "https://github.com/cure-lab/MMA-Diffusion"
    code_commit: ClassVar[str] = "d5701a5"
    deviations: ClassVar[str] = (
        "The best tokens so far are kept and returned. "
        "Banned are tokens that are, or are parts of, words of the concept's phrases; the released "
        "list is of sensitive words. "
        "The search ends after `patience` iterations without progress. "
        "The image attack on a safety checker is left out."
    )
    access: ClassVar[Access] = "text_encoder"
    tier: ClassVar[Tier] = "static"

    num_tokens: int = Field(default=20, ge=1)
    """Tokens of the prompt."""
    iterations: int = Field(default=1000, ge=1)
    """Highest number of iterations."""
    candidates: int = Field(default=512, ge=1)
    """Candidates in an iteration, each with one token replaced."""
    top_k: int = Field(default=256, ge=1)
    """Tokens that a position may change to: those of the largest gradient."""
    patience: int = Field(default=100, ge=1)
    """Iterations without progress after which the search ends."""
    ban_names: bool = True
    """Whether tokens that name the concept are banned."""

    def build(self, context: AttackContext) -> GreedySearch:
        """Return the attacker.

        Raises:
            ConfigError: `num_tokens` does not fit the encoder.
        """
        return GreedySearch(self, context)


class GreedySearch:
    """Greedy coordinate gradient over the tokens of one prompt after another."""

    def __init__(self, config: MMA, context: AttackContext) -> None:
        self.config, self.context = config, context
        self.space = TextSpace(context.target.model)
        self.view = TextEncoderView(context.target.model.pipeline)
        limit = self.space.length - 2
        if config.num_tokens > limit:
            raise ConfigError(
                f"num_tokens must be at most {limit} for this text encoder, got {config.num_tokens}"
            )
        banned = set(naming_tokens(context.concept, self.view)) if config.ban_names else set()
        allowed = [i for i in self.space.vocabulary if i not in banned]
        self.allowed = torch.tensor(allowed)
        """Ids of the tokens that a prompt may have (v,)."""
        table = self.space.encoder.get_input_embeddings().weight.detach().float()
        self.table = table[self.allowed.to(table.device)]

    def attack(self, samples: Sequence[EvalSample]) -> list[AttackRecord]:
        """Return the best text found for each sample."""
        records = []
        for number, sample in enumerate(samples):
            self.context.progress("searching prompts", number, len(samples))
            records.append(self._search(sample))
        return records

    def _search(self, sample: EvalSample) -> AttackRecord:
        config, draw = self.config, self.config.generator(sample)
        goal = self.view.pooled_texts([explicit_text(self.context.concept, sample)])
        tokens = torch.randint(len(self.allowed), (config.num_tokens,), generator=draw)
        best, loss, idle = tokens, float("inf"), 0
        history: list[float] = []
        for _ in range(config.iterations):
            if idle >= config.patience or (history and self.context.target.exhausted):
                break
            choices = (
                (-self._gradient(best, goal)).topk(min(config.top_k, len(self.allowed))).indices
            )
            candidates = self._candidates(best, choices.cpu(), draw)
            losses = self._losses(candidates, goal)
            index = int(losses.argmin())
            idle += 1
            if float(losses[index]) < loss:
                best, loss, idle = candidates[index], float(losses[index]), 0
            history.append(loss)
        ids = self.allowed[best]
        text = self.space.decode(ids[None])[0].strip()
        return AttackRecord(
            id=sample.id,
            prompt=text or sample.prompt,
            seed=sample.seed,
            loss=loss,
            history=tuple(history),
            tokens=tuple(ids.tolist()),
            stable=bool((self.space.tokenize([text]) == self.space.rows(ids[None])).all()),
            stopped=self.context.target.exhausted,
        )

    def _gradient(self, tokens: Tensor, goal: Tensor) -> Tensor:
        """Return the gradient of the loss by the one-hot tokens (k, v)."""
        ids = self.space.rows(self.allowed[tokens][None]).to(self.space.device)
        k = len(tokens)
        weights = one_hot(tokens, len(self.allowed)).to(self.table).requires_grad_()

        def replace(_: Tensor, embeddings: Tensor) -> Tensor:
            words = (weights @ self.table).to(embeddings)[None]
            return torch.cat([embeddings[:, :1], words, embeddings[:, 1 + k :]], dim=1)

        with torch.enable_grad(), self.space.embeddings(replace):
            hidden = self.space.encoder(ids).last_hidden_state[:, k + 1]
            loss = 1 - cosine_similarity(self._project(hidden).float(), goal)
            (gradient,) = torch.autograd.grad(loss.sum(), weights)
        return gradient

    def _project(self, hidden: Tensor) -> Tensor:
        """Return end-mark embeddings as `TextEncoderView.pooled` does."""
        projection = getattr(self.space.encoder, "text_projection", None)
        return hidden if projection is None else projection(hidden)

    def _candidates(self, tokens: Tensor, choices: Tensor, draw: torch.Generator) -> Tensor:
        """Return the tokens, and copies with one token replaced that their text gives back."""
        n, k = self.config.candidates, len(tokens)
        where = torch.randint(k, (n, 1), generator=draw)
        picks = torch.randint(choices.shape[1], (n, 1), generator=draw)
        replaced = choices[where[:, 0]].gather(1, picks)
        candidates = torch.cat([tokens[None], tokens.repeat(n, 1).scatter(1, where, replaced)])
        candidates = candidates.unique(dim=0)
        ids = self.allowed[candidates]
        stable = (self.space.tokenize(self.space.decode(ids)) == self.space.rows(ids)).all(1)
        return candidates[stable] if bool(stable.any()) else candidates

    @torch.no_grad()
    def _losses(self, candidates: Tensor, goal: Tensor) -> Tensor:
        """Return 1 - cosine of each candidate's pooled embedding with the goal."""
        ids = self.space.rows(self.allowed[candidates]).to(self.space.device)
        lengths = [candidates.shape[1]] * len(ids)
        parts = [self.view.pooled(part, lengths[: len(part)]) for part in ids.split(256)]
        return 1 - cosine_similarity(torch.cat(parts), goal).cpu()
