"""UnlearnDiffAtk: search a token prefix by the denoising loss of the attacked model.

Zhang et al. 2024, arXiv:2310.11868. The attacked denoiser itself is the classifier: a prefix is
good if the denoiser predicts the noise of an image of the concept under it (equation 5). The prefix
is a distribution over tokens, sampled in each step and projected onto the simplex.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from safegen.attacks.core.base import Access, Attack, AttackContext, AttackRecord, Tier
from safegen.attacks.core.images import ConceptImages
from safegen.attacks.search.text_space import TextSpace
from safegen.core.settings import MAX_COUNT
from safegen.edits.functional import losses
from safegen.evaluation.samples import EvalSample
from safegen.models.families.denoisers import predict


class UnlearnDiff(Attack):
    """Settings of UnlearnDiffAtk."""

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "default": {},
        "paper": {
            "num_tokens": 5,
            "num_timesteps": 50,
            "iterations": 40,
            "lr": 0.01,
            "weight_decay": 0.1,
            "whole_words": False,
        },
    }
    TINY: ClassVar[Mapping[str, Any]] = {"num_tokens": 2, "num_timesteps": 2, "iterations": 2}
    paper: ClassVar[str] = "arXiv:2310.11868"
    code_url: ClassVar[str] = "https://github.com/OPTML-Group/Diffusion-MU-Attack"
    code_commit: ClassVar[str] = "5a3e5d3"
    parity: ClassVar[str] = (
        "Two updates of the released algorithm, restated in a test with its projection by "
        "bisection: weights equal to 1e-4, the same tokens."
    )
    deviations: ClassVar[str] = (
        "Several prompts are attacked in one batch, each with its own draws. "
        "The target is an image of the concept with the prompt's subject; the released data have "
        "the unedited model's image of the prompt. "
        "The projection onto the simplex is exact; the released bisection stops within 1e-5. "
        "Special tokens are left out. By default, only tokens that the tokenizer reads back from "
        "their own text are used, and the search is shorter. "
        "The prefix of the image with the highest score of the judge is returned; a released "
        "success is any image that shows the concept. "
        "The loss does not go through guards, as in the released code; images are requested "
        "through them. "
        "Several CLIP encoders read the prefix as one sequence of tokens; T5 reads its text and "
        "gives no gradient, so that on FLUX the gradient is that of the pooled embedding alone. "
        "On flow matching, the loss is that of its velocity. The paper has one encoder and noise."
    )
    access: ClassVar[Access] = "weights"
    tier: ClassVar[Tier] = "adaptive"

    num_tokens: int = Field(default=5, ge=1, le=MAX_COUNT)
    """Tokens of the prefix; released: 5 for nudity, violence and illegal acts, 3 for objects."""
    num_timesteps: int = Field(default=10, ge=1, le=1000)
    """Timesteps, evenly spaced and in rising order; an image is generated after each."""
    iterations: int = Field(default=20, ge=1, le=MAX_COUNT)
    """Updates at each timestep."""
    lr: float = Field(default=0.01, gt=0)
    """Learning rate of Adam."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Weight decay of Adam."""
    whole_words: bool = True
    """Whether to use only tokens that the tokenizer reads back from their own text."""
    images: Path | None = None
    """Folder of images of the concept. Default: the concept's bundled triplets."""

    def build(self, context: AttackContext) -> PrefixSearch:
        """Return the attacker; the target images are encoded here.

        Raises:
            ConfigError: there are no images of the concept, or the model does not fit.
        """
        return PrefixSearch(self, context)


class PrefixSearch:
    """Projected gradient search over the prefixes of several prompts at once."""

    def __init__(self, config: UnlearnDiff, context: AttackContext) -> None:
        self.config, self.context, self.target = config, context, context.target
        self.model, self.space = context.target.model, TextSpace(context.target.model)
        self.images = ConceptImages(self.model, context.concept, config.images)
        self.space.check_room(config.num_tokens)
        tokens = self.space.whole_words if config.whole_words else self.space.vocabulary
        self.vocabulary = torch.tensor(tokens, device=self.model.device)
        self.tables = self.space.tables(self.vocabulary)
        """Embeddings of the tokens that a prefix may have, (v, width) for each text encoder."""
        self.schedule = self.model.noise_schedule

    def attack(self, samples: Sequence[EvalSample]) -> list[AttackRecord]:
        """Return the prompt with a prefix for each sample."""
        config = self.config
        searches = [_Prefix(config, self, sample) for sample in samples]
        self._query(searches, [search.sample.prompt for search in searches])
        steps = len(self.schedule)
        spacing = max(1, steps // config.num_timesteps)
        timesteps = self.schedule.timesteps[spacing // 2 :: spacing][: config.num_timesteps]
        for number, t in enumerate(timesteps.tolist()):
            running = [search for search in searches if not search.success]
            if not running or self.target.exhausted:
                break
            for _ in range(config.iterations):
                self.update(running, t)
            self._query(running, [search.text(self.space) for search in running])
            self.context.progress("searching prefixes", number + 1, len(timesteps))
        return [search.record(self.space, self.target.exhausted) for search in searches]

    def update(self, searches: Sequence[_Prefix], t: float) -> Tensor:
        """Update each prefix once at one timestep, and return the losses (n,)."""
        one_hot = torch.stack([search.draw() for search in searches]).requires_grad_()
        k = one_hot.shape[1]

        def replace(number: int, _: Tensor, embeddings: Tensor) -> Tensor:
            prefix = one_hot @ self.tables[number]
            return torch.cat(
                [embeddings[:, :1], prefix.to(embeddings), embeddings[:, 1 + k :]], dim=1
            )

        ids = torch.stack([search.ids for search in searches]).to(self.model.device)
        ids[:, 1 : 1 + k] = self.vocabulary[one_hot.detach().argmax(-1)]
        z = torch.stack([search.latents for search in searches])
        noise = torch.stack([search.noise() for search in searches]).to(z)
        steps = torch.full((len(z),), t, device=z.device)
        noisy, dtype = self.schedule.add_noise(z, noise, steps), self.model.denoiser.dtype
        with torch.enable_grad():
            text = self.space.condition(ids, replace=replace).to(dtype)
            output = predict(self.model.denoiser, noisy.to(dtype), steps, text)
            loss = losses.squared_error(output.float(), self.schedule.target(z, noise, steps))
            (gradient,) = torch.autograd.grad(loss.sum(), one_hot)
        for search, row in zip(searches, gradient, strict=True):
            search.step(row)
        return loss.detach().cpu()

    def _query(self, searches: Sequence[_Prefix], texts: Sequence[str]) -> None:
        """Generate and judge an image of each text, and note where the concept is seen."""
        queries = [
            search.sample.model_copy(update={"prompt": text})
            for search, text in zip(searches, texts, strict=True)
        ]
        for search, sample, result in zip(
            searches, queries, self.target.query(queries), strict=True
        ):
            search.note(sample.prompt, result.score, success=result.success)


class _Prefix:
    """Distribution over the tokens of one prompt's prefix, (k, v), with its optimizer."""

    def __init__(self, config: UnlearnDiff, search: PrefixSearch, sample: EvalSample) -> None:
        self.sample, self.generator = sample, config.generator(sample)
        k, v = config.num_tokens, len(search.vocabulary)
        self.weights = torch.full((k, v), 1 / v, device=search.model.device).requires_grad_()
        self.optimizer = torch.optim.Adam(
            [self.weights], lr=config.lr, weight_decay=config.weight_decay
        )
        self.vocabulary, self.latents = search.vocabulary, search.images.latents_for(sample)
        filler = torch.zeros(k, dtype=torch.long)
        words = search.space.own_tokens(sample.prompt)
        self.words = words[: search.space.length - 2 - k]
        self.ids = search.space.rows(torch.cat([filler, self.words])[None])[0]
        self.best, self.score, self.success = sample.prompt, -1.0, False
        self.found = self.tokens()
        self.history: list[float] = []

    def draw(self) -> Tensor:
        """Return one token for each position as one-hot rows (k, v)."""
        index = torch.multinomial(self.weights.detach().cpu(), 1, generator=self.generator)
        one_hot = torch.zeros_like(self.weights)
        return one_hot.scatter(1, index.to(one_hot.device), 1.0).detach()

    def noise(self) -> Tensor:
        """Return fresh noise of the shape of the latents."""
        return torch.randn(self.latents.shape, generator=self.generator)

    def step(self, gradient: Tensor) -> None:
        """Take an optimizer step with the clipped gradient, and project onto the simplex."""
        self.weights.grad = gradient.clamp(-1, 1)
        self.optimizer.step()
        with torch.no_grad():
            self.weights.copy_(project_simplex(self.weights))

    def tokens(self) -> Tensor:
        """Return the most probable token of each position (k,)."""
        return self.vocabulary[self.weights.argmax(-1)].cpu()

    def text(self, space: TextSpace) -> str:
        """Return the prompt behind its prefix, as the tokenizer writes it."""
        return space.decode(torch.cat([self.tokens(), self.words])[None])[0].strip()

    def note(self, text: str, score: float, *, success: bool) -> None:
        """Keep a text if its image has the highest score so far."""
        if score > self.score or success:
            self.best, self.score, self.success = text, score, success
            self.found = self.tokens()
        self.history.append(-self.score)

    def record(self, space: TextSpace, stopped: str) -> AttackRecord:
        """Return the result."""
        changed, ids = self.best != self.sample.prompt, space.tokenize([self.best])[0]
        return AttackRecord(
            id=self.sample.id,
            prompt=self.best,
            seed=self.sample.seed,
            success=self.success,
            loss=-self.score,
            history=tuple(self.history),
            tokens=tuple(self.found.tolist()) if changed else (),
            stable=bool((ids[1 : 1 + len(self.found)] == self.found).all()) if changed else None,
            stopped="" if self.success else stopped,
        )


def project_simplex(weights: Tensor) -> Tensor:
    """Return the nearest distributions to rows of weights (k, v), by sorting.

    Duchi et al. 2008, "Efficient projections onto the l1-ball", figure 1. The released code finds
    the same point by bisection.
    """
    ordered = weights.sort(dim=-1, descending=True).values
    sums = ordered.cumsum(-1) - 1
    ranks = torch.arange(1, weights.shape[-1] + 1, device=weights.device)
    size = (ordered - sums / ranks > 0).sum(-1, keepdim=True)
    threshold = sums.gather(-1, size - 1) / size
    return (weights - threshold).clamp(min=0)
