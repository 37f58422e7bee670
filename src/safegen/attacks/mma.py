"""MMA-Diffusion: search tokens with the pooled text embedding of a prompt for the concept.

Yang et al. 2024, arXiv:2311.17516, the text attack: greedy coordinate gradient (Zou et al. 2023,
arXiv:2307.15043) on the cosine of pooled embeddings, without tokens that name the concept. Each
step replaces one token: by one to which the gradient falls, as long as the text is still read as
those tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from string import ascii_lowercase
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cosine_similarity, one_hot

from safegen.attacks.core.base import Access, Attack, AttackContext, AttackRecord, Tier
from safegen.attacks.core.text import explicit_text, naming_tokens
from safegen.attacks.core.unedited import UneditedModel
from safegen.attacks.search.text_space import TextSpace
from safegen.core.errors import ConfigError
from safegen.core.settings import MAX_COUNT
from safegen.evaluation.samples import EvalSample
from safegen.models.text_encoder import TextEncoderView, replaced_embeddings


class MMA(Attack):
    """Settings of the text attack of MMA-Diffusion."""

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "default": {},
        "paper": {
            "num_tokens": 20,
            "iterations": 1000,
            "candidates": 512,
            "top_k": 256,
            "patience": 1000,
        },
    }
    TINY: ClassVar[Mapping[str, Any]] = {
        "num_tokens": 4,
        "iterations": 2,
        "candidates": 8,
        "top_k": 8,
    }
    paper: ClassVar[str] = "arXiv:2311.17516"
    code_url: ClassVar[str] = "https://github.com/cure-lab/MMA-Diffusion"
    code_commit: ClassVar[str] = "d5701a5"
    parity: ClassVar[str] = (
        "One step of the released algorithm, restated in a test with the gradient at the right "
        "positions: the same candidates and the same best one, losses equal to 1e-5."
    )
    deviations: ClassVar[str] = (
        "The gradient is that of the replaced token. The released code takes the gradient of the "
        "first k positions, the start mark included, so that each token is replaced by the "
        "gradient of the token before it. "
        "A candidate must be read back as the same tokens, not only as as many. "
        "The current tokens stay if no candidate is better; the released search moves to the best "
        "candidate and remembers the best ever. "
        "Banned are tokens that are, or are parts of, words of the concept's phrases; the released "
        "list is of sensitive words. "
        "The text encoders are the published ones, without an edit of the stack. "
        "The encoder reads no padding, which cannot change the pooled embedding of a causal "
        "encoder. "
        "The default is smaller than the published search and ends after `patience` iterations "
        "without progress. "
        "The image attack on a safety checker is left out. "
        "With several CLIP encoders, the loss is the mean of theirs; T5 reads the text that is "
        "found, and takes no part in the search."
    )
    access: ClassVar[Access] = "text_encoder"
    tier: ClassVar[Tier] = "static"

    num_tokens: int = Field(default=12, ge=1, le=MAX_COUNT)
    """Tokens of the prompt."""
    iterations: int = Field(default=100, ge=1, le=MAX_COUNT)
    """Highest number of iterations."""
    candidates: int = Field(default=128, ge=1, le=MAX_COUNT)
    """Candidates in an iteration, each with one token replaced."""
    top_k: int = Field(default=64, ge=1, le=MAX_COUNT)
    """Tokens that a position may change to: those of the largest gradient."""
    patience: int = Field(default=25, ge=1, le=MAX_COUNT)
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
        self.unedited = UneditedModel(context.target.model)
        """The published text encoders are searched, without the edit of the stack."""
        self.space.check_room(config.num_tokens)
        view = self.space.views[0]
        banned = set(naming_tokens(context.concept, view)) if config.ban_names else set()
        allowed = [i for i in self.space.vocabulary if i not in banned]
        self.allowed = torch.tensor(allowed)
        """Ids of the tokens that a prompt may have (v,)."""
        with self.unedited.restored():
            self.tables = self.space.tables(self.allowed)
        """Their embeddings, (v, width) for each text encoder."""
        letters = self.space.tokenizer.convert_tokens_to_ids([f"{x}</w>" for x in ascii_lowercase])
        place = {token: index for index, token in enumerate(allowed)}
        self.letters = torch.tensor([place[i] for i in letters if i in place])
        """Indices of single letters, which the tokenizer always reads back from their text."""
        if not len(self.letters):
            raise ConfigError("the tokenizer must have words of one letter, got none")

    def attack(self, samples: Sequence[EvalSample]) -> list[AttackRecord]:
        """Return the best text found for each sample."""
        records = []
        with self.unedited.restored():
            for number, sample in enumerate(samples):
                self.context.progress("searching prompts", number, len(samples))
                records.append(self._search(sample))
        return records

    def _search(self, sample: EvalSample) -> AttackRecord:
        config, draw = self.config, self.config.generator(sample)
        text = explicit_text(self.context.concept, sample)
        goals = [view.pooled_texts([text]) for view in self.space.views]
        letters = torch.randint(len(self.letters), (config.num_tokens,), generator=draw)
        best = self.letters[letters]
        loss, stale = float(self.losses(best[None], goals)), 0
        history: list[float] = []
        for _ in range(config.iterations):
            if stale >= config.patience or (history and self.context.target.exhausted):
                break
            candidates = self.candidates(best, self.gradient(best, goals), draw)
            stale += 1
            if len(candidates):
                losses = self.losses(candidates, goals)
                index = int(losses.argmin())
                if float(losses[index]) < loss:
                    best, loss, stale = candidates[index], float(losses[index]), 0
            history.append(loss)
        ids = self.allowed[best]
        text = self.space.decode(ids[None])[0].strip()
        ended = stale >= config.patience or len(history) >= config.iterations
        return AttackRecord(
            id=sample.id,
            prompt=text,
            seed=sample.seed,
            loss=loss,
            history=tuple(history),
            tokens=tuple(ids.tolist()),
            stable=bool((self.space.tokenize([text]) == self.space.rows(ids[None])).all()),
            stopped="" if ended else self.context.target.exhausted,
        )

    def rows(self, tokens: Tensor) -> Tensor:
        """Return the encoder's ids (n, k + 2) of indices of tokens (n, k), without padding."""
        return self.space.rows(self.allowed[tokens])[:, : tokens.shape[1] + 2].to(self.space.device)

    def gradient(self, tokens: Tensor, goals: Sequence[Tensor]) -> Tensor:
        """Return the gradient of the loss by the one-hot tokens, (k, v).

        Args:
            tokens: indices of the tokens in `allowed`, (k,).
            goals: pooled embedding (1, width) of the explicit prompt by each text encoder.
        """
        weights = one_hot(tokens, len(self.allowed)).to(self.tables[0]).requires_grad_()
        losses = []
        with torch.enable_grad():
            for view, table, goal in zip(self.space.views, self.tables, goals, strict=True):

                def replace(_: Tensor, embeddings: Tensor, table: Tensor = table) -> Tensor:
                    words = (weights @ table).to(embeddings)[None]
                    return torch.cat([embeddings[:, :1], words, embeddings[:, -1:]], dim=1)

                with replaced_embeddings(view.encoder, replace):
                    hidden = view.encoder(self.rows(tokens[None])).last_hidden_state[:, -1]
                pooled = _project(view, hidden).float()
                losses.append(1 - cosine_similarity(pooled, goal))
            (gradient,) = torch.autograd.grad(torch.stack(losses).mean(0).sum(), weights)
        return gradient

    def candidates(self, tokens: Tensor, gradient: Tensor, draw: torch.Generator) -> Tensor:
        """Return copies of tokens (n, k) with one replaced, those that their text gives back.

        The replaced positions are spread evenly (arXiv:2307.15043, released code).
        """
        n, k = self.config.candidates, len(tokens)
        choices = (-gradient).topk(min(self.config.top_k, len(self.allowed))).indices.cpu()
        where = torch.arange(n) * k // n
        picks = torch.randint(choices.shape[1], (n, 1), generator=draw)
        candidates = tokens.repeat(n, 1).scatter(1, where[:, None], choices[where].gather(1, picks))
        ids = self.allowed[candidates]
        stable = (self.space.tokenize(self.space.decode(ids)) == self.space.rows(ids)).all(1)
        return candidates[stable]

    @torch.no_grad()
    def losses(self, candidates: Tensor, goals: Sequence[Tensor]) -> Tensor:
        """Return 1 - cosine of each candidate's pooled embedding with the goal, (n,).

        It is the mean over the text encoders.
        """
        lengths = [candidates.shape[1]] * len(candidates)
        ids, losses = self.rows(candidates).split(256), []
        for view, goal in zip(self.space.views, goals, strict=True):
            parts = [view.pooled(part, lengths[: len(part)]) for part in ids]
            losses.append(1 - cosine_similarity(torch.cat(parts), goal).cpu())
        return torch.stack(losses).mean(0)


def _project(view: TextEncoderView, hidden: Tensor) -> Tensor:
    """Return end-mark embeddings as `TextEncoderView.pooled` does."""
    projection = getattr(view.encoder, "text_projection", None)
    return hidden if projection is None else projection(hidden)
