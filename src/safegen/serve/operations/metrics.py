"""Metrics of the service for Prometheus."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

if TYPE_CHECKING:
    from safegen.serve.service import Answer


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        labels = ("stack", "status", "stage", "guard")
        self.images = Counter(
            "safegen_images", "Images by what became of them.", labels, registry=self.registry
        )
        self.seconds = Histogram(
            "safegen_request_seconds", "Time of a request.", ("stack",), registry=self.registry
        )

    def count_answer(self, answer: Answer) -> None:
        """Count the images of a request by what became of them."""
        for outcome in answer.outcomes:
            self.images.labels(
                answer.stack.name, outcome.status, outcome.stage or "", outcome.guard
            ).inc()
        self.seconds.labels(answer.stack.name).observe(answer.seconds)

    def render(self) -> bytes:
        """Return all metrics in the text format of Prometheus."""
        return generate_latest(self.registry)
