"""Interface of engines, and the errors by which they say that there is no image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from PIL import Image

from safegen.core.errors import SafegenError
from safegen.guards.core.result import GeneratedImage, GuardTrace
from safegen.serve.messages import ImageRequest, StackInfo


class QueueFullError(SafegenError):
    """The queue has no place. The client may try again later."""

    def __init__(self, queued: int, retry_after: int) -> None:
        """Build the message.

        Args:
            queued: number of waiting requests.
            retry_after: seconds after which a place is likely.
        """
        super().__init__(f"the queue is full: {queued} requests wait. Try again later.")
        self.retry_after = retry_after


class EngineFaultError(SafegenError):
    """A worker, a guard, a judge or the other server failed, and there is no image."""


class UpstreamError(EngineFaultError):
    """The other server answered with something else than images, or did not answer in time."""

    def __init__(self, message: str, *, is_timeout: bool = False) -> None:
        """Store whether the other server took too long."""
        super().__init__(message)
        self.is_timeout = is_timeout


class DrainingError(SafegenError):
    """The server is being stopped and takes no more requests."""

    def __init__(self) -> None:
        """Build the message."""
        super().__init__("the server is being stopped. Try again later.")


@dataclass(frozen=True)
class EngineState:
    """State of an engine, for readiness and metrics."""

    is_ready: bool
    reason: str = ""
    """Why it is not ready, or that the other server cannot be used now; else empty."""
    queued: int = 0
    """Requests that wait."""
    running: int = 0
    """Requests in a batch."""
    workers: int = 0
    """Workers that run."""


class Engine(Protocol):
    """What makes and checks the images of a service.

    Every method but `progress` and `state` runs in the event loop's thread. Cancelling the task
    that waits for `generate` removes the request from the queue, or stops it after the next step.
    """

    @property
    def stacks(self) -> Mapping[str, StackInfo]:
        """Stacks by name, the default one first; empty before `start`."""
        ...

    async def start(self) -> None:
        """Load everything and run the self-test; the engine is ready afterwards.

        Raises:
            UserError: a stack cannot be loaded, or the self-test fails.
            EngineFaultError: a worker died.
        """
        ...

    async def generate(self, request: ImageRequest) -> list[GeneratedImage]:
        """Return one image per seed, with its trace.

        Raises:
            UserError: the stack cannot make images of these settings.
            QueueFullError: too many requests wait.
            EngineFaultError: something failed.
            DrainingError: the engine is being stopped.
        """
        ...

    async def check_prompts(self, stack: str, prompts: Sequence[str]) -> list[GuardTrace]:
        """Return what the stack's guards of prompts decide; errors as `generate`."""
        ...

    async def check_images(
        self, stack: str, images: Sequence[Image.Image], prompts: Sequence[str]
    ) -> list[GeneratedImage]:
        """Return what the stack's guards of images leave of images; errors as `generate`."""
        ...

    def progress(self, request_id: str) -> float | None:
        """Return the part of a request that is done, in [0, 1]; None if it is unknown."""
        ...

    def state(self) -> EngineState:
        """Return whether it is ready, and how much it has to do."""
        ...

    async def drain(self, timeout: float) -> None:
        """Take no more requests; answer those accepted, and fail the rest after `timeout` seconds.

        The rest get `DrainingError`.
        """
        ...

    async def stop(self) -> None:
        """Stop the workers. `drain` comes first."""
        ...
