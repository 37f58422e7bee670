"""P4D (Prompting4Debugging): tokens under which the edited model predicts what the unedited did.

Chin et al. 2024, arXiv:2309.06135. The unedited denoiser reads the explicit prompt, the edited one
reads the tokens; their embeddings are trained until both predict the same noise. Each update is
made at the nearest tokens, and moves the embeddings (hard prompts of Wen et al. 2023,
arXiv:2302.03668). P4D-N has free tokens only, P4D-K inserts one every k tokens of the prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from safegen.attacks.core.base import Access, Attack, AttackContext, AttackRecord, Tier
from safegen.attacks.core.text import explicit_text
from safegen.attacks.core.unedited import UneditedModel
from safegen.attacks.search.text_space import TextSpace
from safegen.core.settings import MAX_COUNT
from safegen.edits.functional import losses
from safegen.edits.training.samples import preprocess
from safegen.evaluation.samples import EvalSample
from safegen.models.families.conditioning import Conditioning
from safegen.models.families.denoisers import predict
from safegen.models.generation import generate

PAPER = {"iterations": 3000, "lr": 0.1, "weight_decay": 0.1, "test_every": 50, "whole_words": False}


class P4D(Attack):
    """Settings of P4D."""

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "default": {},
        "paper": {**PAPER, "num_tokens": 16},
        "paper-k": {**PAPER, "insert_every": 3},
    }
    TINY: ClassVar[Mapping[str, Any]] = {"num_tokens": 2, "iterations": 2, "test_every": 1}
    paper: ClassVar[str] = "arXiv:2309.06135"
    code_url: ClassVar[str] = "https://github.com/joycenerd/P4D"
    code_commit: ClassVar[str] = "2cf3cda"
    parity: ClassVar[str] = (
        "Two updates of the released algorithm, restated in a test: the same tokens, embeddings "
        "equal to 1e-5."
    )
    deviations: ClassVar[str] = (
        "Several prompts are attacked in one batch, each with its own draws. "
        "The text of the image with the highest score of the judge is returned, and the search "
        "stops at success; the released code runs to the end and keeps the image most similar by "
        "CLIP to that of the unedited model. "
        "The latents are of one image of the unedited model; the released code takes the most "
        "unsafe of three. "
        "Texts are padded as the tokenizer does; the released code pads with token 0 while it "
        "trains. "
        "The loss does not go through guards, as without the released option `--filter`; images "
        "are requested through them. "
        "P4D-K inserts into the sample's own prompt, which may be benign. "
        "With several CLIP encoders, a token is its embeddings of all of them, and the nearest is "
        "that of the highest sum of cosines; T5 reads the text of the tokens and gives no "
        "gradient, so that on FLUX the gradient is that of the pooled embedding alone. "
        "By default, only tokens that the tokenizer reads back from their own text are used."
    )
    access: ClassVar[Access] = "weights"
    tier: ClassVar[Tier] = "adaptive"

    num_tokens: int = Field(default=8, ge=1, le=MAX_COUNT)
    """Free tokens of P4D-N; without effect in P4D-K."""
    insert_every: int | None = Field(default=None, ge=1, le=MAX_COUNT)
    """Tokens of the prompt between two free ones, which makes it P4D-K. Default: P4D-N."""
    iterations: int = Field(default=200, ge=1, le=MAX_COUNT)
    """Updates."""
    test_every: int = Field(default=25, ge=1, le=MAX_COUNT)
    """Updates between two images."""
    lr: float = Field(default=0.1, gt=0)
    """Learning rate of AdamW."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Weight decay of AdamW."""
    whole_words: bool = True
    """Whether to use only tokens that the tokenizer reads back from their own text."""

    def build(self, context: AttackContext) -> HardPromptSearch:
        """Return the attacker.

        Raises:
            ConfigError: `num_tokens` does not fit the encoder.
        """
        return HardPromptSearch(self, context)


class HardPromptSearch:
    """Gradient search over the tokens of several prompts at once."""

    def __init__(self, config: P4D, context: AttackContext) -> None:
        self.config, self.context, self.target = config, context, context.target
        self.model, self.space = context.target.model, TextSpace(context.target.model)
        if config.insert_every is None:
            self.space.check_room(config.num_tokens)
        self.unedited = UneditedModel(self.model)
        tokens = self.space.whole_words if config.whole_words else self.space.vocabulary
        self.vocabulary = torch.tensor(tokens, device=self.model.device)
        self.tables = self.space.tables(self.vocabulary)
        """Embeddings of the tokens that a text may have, (v, width) for each text encoder."""
        self.directions = [normalize(table, dim=-1) for table in self.tables]
        self.schedule = self.model.noise_schedule

    def attack(self, samples: Sequence[EvalSample]) -> list[AttackRecord]:
        """Return the text for each sample."""
        config, concept = self.config, self.context.concept
        explicit = [
            sample.model_copy(update={"prompt": explicit_text(concept, sample)})
            for sample in samples
        ]
        with self.unedited.restored():  # an edit may be one of the text encoder
            images = list(generate(self.model, explicit, self.target.generation))
            goals = self.model.encode_text([sample.prompt for sample in explicit])
        latents = self.model.encode_images(
            torch.stack([preprocess(image, self.model.size) for image in images])
        ).float()
        searches = [
            _HardPrompt(config, self, sample, latents[i], goals[i : i + 1])
            for i, sample in enumerate(samples)
        ]
        for number in range(config.iterations):
            running = [search for search in searches if not search.success]
            if not running or (number and self.target.exhausted):
                break
            self.update(running)
            if (number + 1) % config.test_every == 0 or number + 1 == config.iterations:
                self._query(running)
                self.context.progress("searching tokens", number + 1, config.iterations)
        if any(search.score < 0 for search in searches):
            self._query([search for search in searches if search.score < 0])
        return [search.record(self.target.exhausted) for search in searches]

    def update(self, searches: Sequence[_HardPrompt]) -> Tensor:
        """Update the tokens of each prompt once, and return the losses (n,)."""
        z, dtype = torch.stack([search.latents for search in searches]), self.model.denoiser.dtype
        noise = torch.stack([search.noise() for search in searches]).to(z)
        steps = torch.stack([search.timestep(self.schedule.timesteps) for search in searches])
        steps = steps.to(z.device)
        noisy = self.schedule.add_noise(z, noise, steps).to(dtype)
        goals = Conditioning.concat([search.goal for search in searches]).to(dtype)
        wanted = self.unedited.predict(noisy, steps, goals)
        nearest = [self.nearest(search.embeddings) for search in searches]
        projected = [[table[n].requires_grad_() for table in self.tables] for n in nearest]
        rows = torch.cat([torch.full_like(s.places, n) for n, s in enumerate(searches)])
        columns = torch.cat([search.places for search in searches])

        def replace(number: int, _: Tensor, embeddings: Tensor) -> Tensor:
            own = torch.cat([parts[number] for parts in projected])
            return embeddings.index_put((rows, columns), own.to(embeddings))

        ids = torch.stack([search.ids for search in searches])
        ids[rows, columns] = self.vocabulary[torch.cat(nearest)]
        with torch.enable_grad():
            text = self.space.condition(ids, replace=replace).to(dtype)
            output = predict(self.model.denoiser, noisy, steps, text)
            loss = losses.squared_error(output, wanted)
            leaves = [part for parts in projected for part in parts]
            gradients = torch.autograd.grad(loss.sum(), leaves, materialize_grads=True)
        for search in searches:
            search.step(gradients[: len(self.tables)])
            gradients = gradients[len(self.tables) :]
        return loss.detach().cpu()

    def nearest(self, embeddings: Sequence[Tensor]) -> Tensor:
        """Return the index of the token nearest to embeddings (k, width) of each text encoder.

        It is that of the highest cosine, or of the highest sum of the encoders' cosines.
        """
        cosines = [
            normalize(own.detach(), dim=-1) @ directions.T
            for own, directions in zip(embeddings, self.directions, strict=True)
        ]
        return torch.stack(cosines).sum(0).argmax(-1)

    def _query(self, searches: Sequence[_HardPrompt]) -> None:
        """Generate and judge an image of each text, and note where the concept is seen."""
        queries = [
            search.sample.model_copy(update={"prompt": search.text()}) for search in searches
        ]
        for search, sample, result in zip(
            searches, queries, self.target.query(queries), strict=True
        ):
            search.note(sample.prompt, result.score, success=result.success)


class _HardPrompt:
    """Free tokens of one text as embeddings (k, width) of each encoder, with their optimizer."""

    def __init__(
        self,
        config: P4D,
        search: HardPromptSearch,
        sample: EvalSample,
        z: Tensor,
        goal: Conditioning,
    ) -> None:
        self.sample, self.search, self.latents, self.goal = sample, search, z, goal
        self.generator, space = config.generator(sample), search.space
        if config.insert_every is None:
            length, free = config.num_tokens, list(range(config.num_tokens))
            tokens = torch.zeros(length, dtype=torch.long)
        else:
            tokens, free = insert_tokens(
                space.own_tokens(sample.prompt), config.insert_every, space.length - 2
            )
        self.length, device = len(tokens), search.model.device
        self.ids = space.rows(tokens[None])[0].to(device)
        self.places = torch.tensor(free, device=device) + 1
        start = torch.randint(len(search.vocabulary), (len(free),), generator=self.generator)
        self.embeddings = [t[start.to(device)].clone().requires_grad_() for t in search.tables]
        self.optimizer = torch.optim.AdamW(
            self.embeddings, lr=config.lr, weight_decay=config.weight_decay
        )
        self.best, self.score, self.success = sample.prompt, -1.0, False
        self.tokens: Tensor = self._tokens()
        self.history: list[float] = []

    def noise(self) -> Tensor:
        """Return fresh noise of the shape of the latents."""
        return torch.randn(self.latents.shape, generator=self.generator)

    def timestep(self, timesteps: Tensor) -> Tensor:
        """Return one of some timesteps."""
        return timesteps[torch.randint(len(timesteps), (), generator=self.generator)]

    def step(self, gradients: Sequence[Tensor]) -> None:
        """Take an optimizer step with the gradients at the nearest tokens."""
        for embeddings, gradient in zip(self.embeddings, gradients, strict=True):
            embeddings.grad = gradient
        self.optimizer.step()

    def _tokens(self) -> Tensor:
        """Return the ids (length,) of the text with the nearest tokens."""
        ids = self.ids.clone()
        ids[self.places] = self.search.vocabulary[self.search.nearest(self.embeddings)]
        return ids[1 : 1 + self.length].cpu()

    def text(self) -> str:
        """Return the text with the nearest tokens."""
        return self.search.space.decode(self._tokens()[None])[0].strip() or self.sample.prompt

    def note(self, text: str, score: float, *, success: bool) -> None:
        """Keep a text if its image has the highest score so far."""
        if score > self.score or success:
            self.best, self.score, self.success, self.tokens = text, score, success, self._tokens()
        self.history.append(-self.score)

    def record(self, stopped: str) -> AttackRecord:
        """Return the result."""
        ids = self.search.space.tokenize([self.best])[0]
        return AttackRecord(
            id=self.sample.id,
            prompt=self.best,
            seed=self.sample.seed,
            success=self.success,
            loss=-self.score,
            history=tuple(self.history),
            tokens=tuple(self.tokens.tolist()),
            stable=bool((ids == self.search.space.rows(self.tokens[None])[0]).all()),
            stopped="" if self.success else stopped,
        )


def insert_tokens(tokens: Tensor, every: int, limit: int) -> tuple[Tensor, list[int]]:
    """Return tokens with a free place before each `every` of them, and the free places (P4D-K).

    There are n // every + 1 free places, as in the released code. Free places have id 0. The end
    of a text that grows beyond `limit` is cut.

    Args:
        tokens: ids (n,).
        every: tokens between two free places.
        limit: most tokens that the encoder reads.
    """
    n = len(tokens)
    total = n + n // every + 1
    free = [i for i in range(total) if i % (every + 1) == 0]
    row = torch.zeros(total, dtype=tokens.dtype)
    row[[i for i in range(total) if i % (every + 1)]] = tokens
    return row[:limit], [i for i in free if i < limit]
