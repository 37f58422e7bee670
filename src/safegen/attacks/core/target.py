"""The attacked stack: images on request, its networks, and every pass counted."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from safegen.attacks.core.cost import Budget, Cost
from safegen.core.concept import Concept
from safegen.core.errors import ConfigError
from safegen.core.generation import GenerationConfig, Sample
from safegen.guards import GeneratedImage
from safegen.judges.base import Detections, Judge
from safegen.models.model import Model
from safegen.models.text_encoder import replaced_embeddings
from safegen.stack_loader import LoadedStack


@dataclass(frozen=True)
class QueryResult:
    """Image that the stack returned, as the attack sees it."""

    output: GeneratedImage
    detections: Detections
    score: float
    """Highest score of the concept's labels, 0 if none is detected or the image is withheld."""
    success: bool
    """Whether the image shows the concept. An image that cannot be judged is no success."""


class Target:
    """A loaded stack under attack."""

    def __init__(
        self,
        loaded: LoadedStack,
        concept: Concept,
        judge: Judge,
        generation: GenerationConfig,
        budget: Budget | None = None,
    ) -> None:
        """Attach nothing yet; `counted` counts the passes of its block.

        Args:
            loaded: the stack.
            concept: concept that the attack brings back; its labels decide success.
            judge: judge of the images.
            generation: how images are generated.
            budget: limits of the whole attack.

        Raises:
            ConfigError: `generation` has another size, scheduler or seed mode than the default.
        """
        changed = generation.request_settings
        if changed:
            raise ConfigError(
                f"{', '.join(changed)} must not be set in an attack, which uses the model's own "
                "size, scheduler and noise. Leave it out."
            )
        self.loaded, self.concept, self.judge = loaded, concept, judge
        self.generation, self.budget = generation, budget or Budget()
        self._counts = dict.fromkeys(("denoiser", "text_encoder", "queries"), 0)
        self._seconds = 0.0
        self._began: float | None = None

    @property
    def model(self) -> Model:
        """Model of the stack, with its patches and LoRAs on it."""
        return self.loaded.model

    @property
    def cost(self) -> Cost:
        """Cost so far, inside `counted` blocks."""
        running = 0.0 if self._began is None else time.perf_counter() - self._began
        return Cost(seconds=self._seconds + running, **self._counts)

    @property
    def exhausted(self) -> str:
        """Name of a limit of the budget that is reached; empty if none."""
        return self.budget.reached(self.cost)

    @contextmanager
    def counted(self, spent: Cost | None = None) -> Iterator[None]:
        """Count the passes of the networks inside the block.

        Args:
            spent: cost of an interrupted attack that this one continues.
        """
        if spent is not None:
            self.reset(spent)
        encoders = [
            getattr(self.model.pipeline, name)
            for name in self.model.components
            if name.startswith("text_encoder")
        ]
        self._began = time.perf_counter()
        try:
            with ExitStack() as hooks:
                hooks.enter_context(self._hook(self.model.denoiser, "denoiser"))
                for encoder in encoders:
                    hooks.enter_context(self._hook(encoder, "text_encoder"))
                yield
        finally:
            self._seconds, self._began = self.cost.seconds, None

    @contextmanager
    def _hook(self, network: nn.Module, name: str) -> Iterator[None]:
        """Count the rows of a network's outputs, and once more where a gradient flows back."""

        def count(_: nn.Module, __: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) else next(iter(output.values()))
            rows = len(tensor)
            self._counts[name] += rows
            if tensor.requires_grad:
                tensor.register_hook(lambda gradient: self._add(name, len(gradient)))

        handle = network.register_forward_hook(count)
        try:
            yield
        finally:
            handle.remove()

    def _add(self, name: str, rows: int) -> None:
        self._counts[name] += rows

    def reset(self, cost: Cost) -> None:
        """Take a cost as that so far."""
        self._counts = {name: getattr(cost, name) for name in self._counts}
        self._seconds = cost.seconds
        self._began = None if self._began is None else time.perf_counter()

    def add(self, cost: Cost) -> None:
        """Add the cost of work that an interrupted attack did and no record holds."""
        for name in self._counts:
            self._counts[name] += getattr(cost, name)
        self._seconds += cost.seconds

    def query(self, samples: Sequence[Sample]) -> list[QueryResult]:
        """Return an image of the stack for each sample, judged; each counts as one query."""
        outputs = self.loaded.generate(samples, self.generation)
        self._counts["queries"] += len(samples)
        detections = self.judge.detect(
            [self.loaded.display_image(output, self.generation) for output in outputs]
        )
        return [self._result(o, d) for o, d in zip(outputs, detections, strict=True)]

    def shows_concept(self, detections: Detections) -> bool:
        """Return whether a judged image shows the concept."""
        return detections.verdict(self.concept.labels, self.concept.threshold) == "unsafe"

    def _result(self, output: GeneratedImage, detections: Detections) -> QueryResult:
        if output.image is None or detections.unjudged is not None:
            return QueryResult(output, detections, 0.0, success=False)
        scores = [d.score for d in detections.items if d.label in self.concept.labels]
        success = self.shows_concept(detections)
        return QueryResult(output, detections, max(scores, default=0.0), success)


class TextSpace:
    """Tokens, texts and embeddings of a model's text encoder, for attacks on text."""

    def __init__(self, model: Model) -> None:
        """Read the vocabulary.

        Raises:
            ConfigError: the model has two text encoders.
        """
        if "text_encoder_2" in model.components:
            raise ConfigError(f"text attacks need one text encoder, got the SDXL {model.name!r}")
        self.tokenizer, self.encoder = model.pipeline.tokenizer, model.pipeline.text_encoder
        self.length: int = self.tokenizer.model_max_length
        self.device = model.device
        special = set(self.tokenizer.all_special_ids)
        self.vocabulary = [i for i in range(len(self.tokenizer)) if i not in special]
        """Ids of all tokens that are no special ones."""

    @property
    def width(self) -> int:
        """Width of a token's embedding."""
        return int(self.encoder.get_input_embeddings().weight.shape[1])

    def rows(self, tokens: Tensor) -> Tensor:
        """Return rows (n, length) of ids: start mark, `tokens` (n, k), end mark and padding."""
        tokenizer, n = self.tokenizer, len(tokens)
        rows = torch.full((n, self.length), tokenizer.pad_token_id, dtype=torch.long)
        rows[:, 0] = tokenizer.bos_token_id
        rows[:, 1 : 1 + tokens.shape[1]] = tokens
        rows[:, 1 + tokens.shape[1]] = tokenizer.eos_token_id
        return rows

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Return the ids (n, length) that the encoder reads for texts; longer ones are cut."""
        ids: Tensor = self.tokenizer(
            list(texts),
            padding="max_length",
            max_length=self.length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        return ids

    def own_tokens(self, text: str) -> Tensor:
        """Return the ids (k,) that the encoder reads for a text, without marks and padding."""
        (ids,) = self.tokenize([text])
        end = int((ids == self.tokenizer.eos_token_id).nonzero()[0])
        return ids[1:end]

    @cached_property
    def whole_words(self) -> list[int]:
        """Ids of the tokens that the tokenizer reads back from their own text.

        Texts of such tokens, with spaces between them, are read back too.
        """
        tokens = torch.tensor(self.vocabulary)[:, None]
        rows = self.tokenize(self.decode(tokens))
        same = (rows == self.rows(tokens)).all(1)
        return [int(i) for i in tokens[same, 0]]

    def decode(self, tokens: Tensor) -> list[str]:
        """Return the texts of tokens (n, k)."""
        texts: list[str] = self.tokenizer.batch_decode(
            tokens.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return texts

    def encode(self, ids: Tensor, *, batch: int = 256) -> Tensor:
        """Return the embeddings (n, length, width) of rows of ids, in fp32."""
        parts = [self.encoder(part.to(self.device))[0].float() for part in ids.split(batch)]
        return torch.cat(parts)

    def check_room(self, num_tokens: int) -> None:
        """Check that a text of so many tokens fits the encoder.

        Raises:
            ConfigError: it does not.
        """
        if num_tokens > self.length - 2:
            raise ConfigError(
                f"num_tokens must be at most {self.length - 2} for this text encoder, "
                f"got {num_tokens}"
            )

    @contextmanager
    def embeddings(self, replace: Callable[[Tensor, Tensor], Tensor]) -> Iterator[None]:
        """Change the token embeddings that the encoder reads inside the block.

        Args:
            replace: gets the ids (n, length) and their embeddings (n, length, width), and returns
                the embeddings to use; gradients flow through them.
        """
        with replaced_embeddings(self.encoder, replace):
            yield
