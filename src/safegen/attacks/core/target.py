"""The attacked stack: images on request, its networks, and every pass counted."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from safegen.attacks.core.cost import Budget, Cost
from safegen.core.concept import Concept
from safegen.core.errors import ConfigError
from safegen.core.generation import GenerationConfig, Sample
from safegen.guards import GeneratedImage
from safegen.judges.base import Detections, Judge
from safegen.models.model import Model
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
        changed = sorted(generation.request_settings.keys() - {"true_cfg_scale"})
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
            values = output if isinstance(output, tuple) else tuple(output.values())
            rows = len(values[0])
            self._counts[name] += rows
            self._count_backward(values, name, rows)

        handle = network.register_forward_hook(count)
        try:
            yield
        finally:
            handle.remove()

    def _count_backward(self, values: Sequence[Any], name: str, rows: int) -> None:
        """Count rows once if a gradient flows back to any of a network's outputs."""
        passes = [rows]

        def count(_: Tensor) -> None:
            self._counts[name] += passes.pop() if passes else 0

        for value in values:
            for tensor in value if isinstance(value, tuple) else (value,):
                if isinstance(tensor, Tensor) and tensor.requires_grad:
                    tensor.register_hook(count)

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
