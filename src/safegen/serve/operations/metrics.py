"""Metrics of the service for Prometheus. No label has values that a client chooses."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

if TYPE_CHECKING:
    from safegen.serve.engine.base import EngineState
    from safegen.serve.service import Answer

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
METHODS = frozenset(["GET", "HEAD", "POST", "OPTIONS", "PUT", "DELETE", "PATCH"])
REASONS = frozenset(
    ["timeout", "cancelled", "refused", "queue-full", "draining", "upstream", "engine", "audit-log"]
)
"""Reasons of faults outside of guards."""


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter(
            "safegen_requests",
            "Requests by route, method and status.",
            ("route", "method", "status"),
            registry=registry,
        )
        self.images = Counter(
            "safegen_images",
            "Images by what became of them: released, blocked or fault.",
            ("stack", "status", "stage", "guard"),
            registry=registry,
        )
        self.faults = Counter(
            "safegen_faults",
            "Images withheld because something failed.",
            ("stack", "reason"),
            registry=registry,
        )
        self.request_seconds = Histogram(
            "safegen_request_seconds",
            "Time of a request by route.",
            ("route",),
            buckets=SECONDS,
            registry=registry,
        )
        self.generation_seconds = Histogram(
            "safegen_generation_seconds",
            "Time of a request for images in the queue, the engine and the checks.",
            ("stack",),
            buckets=SECONDS,
            registry=registry,
        )
        self.batch_size = Histogram(
            "safegen_batch_size", "Images per batch.", buckets=BATCHES, registry=registry
        )
        self.batch_seconds = Histogram(
            "safegen_batch_seconds", "Time of a batch.", buckets=SECONDS, registry=registry
        )
        self._state = {
            name: Gauge(f"safegen_{name}", text, registry=registry)
            for name, text in (
                ("queued", "Requests that wait."),
                ("running", "Requests in a batch."),
                ("workers", "Workers that run."),
                ("ready", "1 if the server answers requests, else 0."),
            )
        }

    def count_request(self, route: str, method: str, status: int, seconds: float) -> None:
        """Count a request; status 0 if it has no response."""
        method = method if method in METHODS else "other"
        self.requests.labels(route, method, str(status)).inc()
        self.request_seconds.labels(route).observe(seconds)

    def count_answer(self, answer: Answer) -> None:
        """Count the images of a request by what became of them."""
        stack = answer.stack
        names = {guard.name for guard in stack.guards} | {"", "safety_checker"}
        for outcome in answer.outcomes:
            guard = outcome.guard if outcome.guard in names else "other"
            self.images.labels(stack.name, outcome.status, outcome.stage or "", guard).inc()
            if outcome.status == "fault":
                reason = outcome.reason if outcome.reason in REASONS else "check"
                self.faults.labels(stack.name, reason).inc()
        self.generation_seconds.labels(stack.name).observe(answer.seconds)

    def on_batch(self, size: int, seconds: float) -> None:
        """Count a batch of the engine; engines call it with its images and its time."""
        self.batch_size.observe(size)
        self.batch_seconds.observe(seconds)

    def render(self, state: EngineState, *, is_ready: bool) -> bytes:
        """Return all metrics in the text format of Prometheus.

        Args:
            state: state of the engine.
            is_ready: whether the server answers requests.
        """
        self._state["queued"].set(state.queued)
        self._state["running"].set(state.running)
        self._state["workers"].set(state.workers)
        self._state["ready"].set(is_ready)
        return generate_latest(self.registry)
