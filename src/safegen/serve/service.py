"""The service: every request of every interface goes through it, from limits to the audit log."""

from __future__ import annotations

import asyncio
import io
import logging
import time
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

from PIL import Image

from safegen.core.errors import ConfigError, UnknownNameError, UserError
from safegen.guards.core.result import PASSING_ACTIONS, GeneratedImage, GuardTrace
from safegen.serve.config import ServerConfig
from safegen.serve.engine.base import (
    DrainingError,
    Engine,
    EngineFaultError,
    QueueFullError,
    UpstreamError,
)
from safegen.serve.gate import Outcome, block, check_release, fault
from safegen.serve.messages import ImageRequest, StackInfo
from safegen.serve.operations.audit import AuditLog, AuditLogError, hash_text
from safegen.serve.operations.context import add_log_fields, select_stacks, take_images
from safegen.serve.operations.metrics import Metrics
from safegen.serve.operations.tokens import Clients
from safegen.serve.provenance import ManifestSigner

T = TypeVar("T")
logger = logging.getLogger(__name__)
EMPTY_TRACE = GuardTrace("withhold", "", ())
"""Trace of an image that was never made."""


@dataclass(frozen=True)
class Answer:
    """Outcomes of one request, one per seed, in order."""

    request: ImageRequest
    outcomes: tuple[Outcome, ...]
    stack: StackInfo
    seconds: float = 0.0
    signer: ManifestSigner | None = None
    """What signs the released images; None leaves them as they are."""

    @property
    def released(self) -> list[Outcome]:
        """Outcomes with an image."""
        return [outcome for outcome in self.outcomes if outcome.status == "released"]


@dataclass
class ImageService:
    """Limits, engine, release check, audit log and metrics of one server."""

    engine: Engine
    config: ServerConfig
    audit: AuditLog
    metrics: Metrics = field(default_factory=Metrics)
    clients: Clients | None = None
    """Clients with tokens; None if every program may call."""
    signer: ManifestSigner | None = None
    """What signs released images; None without a certificate."""
    phase: Literal["starting", "serving", "draining"] = "serving"
    """Requests are answered while it is `serving`."""

    async def start(self) -> None:
        """Start the engine, check that the clients' stacks exist, and serve.

        Raises:
            UserError: a stack cannot be loaded, does not exist, or fails its self-test.
            EngineFaultError: a worker died.
        """
        self.phase = "starting"
        await self.engine.start()
        if self.clients is not None:
            self.clients.check_stacks(self.engine.stacks)
        self.phase = "serving"

    async def stop(self) -> None:
        """Stop the engine and close the audit log."""
        self.phase = "draining"
        await self.engine.stop()
        await asyncio.to_thread(self.audit.close)

    def unready_reason(self) -> str:
        """Return why requests are not answered; empty if they are."""
        if self.phase == "draining":
            return "the server is being stopped"
        state = self.engine.state()
        if self.phase == "starting":
            return state.reason or "the server is being started"
        return "" if state.is_ready else state.reason or "the engine is not ready"

    @property
    def stacks(self) -> Mapping[str, StackInfo]:
        """Stacks that the current client may use, its default one first."""
        return select_stacks(self.engine.stacks)

    def stack(self, name: str | None = None) -> StackInfo:
        """Return a stack by its name; the first one if None.

        Raises:
            UnknownNameError: there is no such stack.
            EngineFaultError: the stacks are not loaded yet.
        """
        stacks = self.stacks
        if not stacks:
            raise EngineFaultError(self.engine.state().reason or "there is no stack")
        name = next(iter(stacks)) if name is None else name
        if name not in stacks:
            raise UnknownNameError("stack", name, stacks)
        return stacks[name]

    async def generate(self, request: ImageRequest, *, client: str = "") -> Answer:
        """Return what becomes of each image of a request. The audit log has it before the caller.

        Args:
            request: the request.
            client: name of the client's token.

        Raises:
            UserError: the request breaks a limit, or the stack cannot make it.
            QueueFullError: too many requests wait.
            RateLimitError: the client has reached its limit of images.
            DrainingError: the server is being stopped.
            EngineFaultError: something failed, and there are no traces to tell.
            AuditLogError: the audit log could not be written.
        """
        started, stack = time.monotonic(), self.stack(request.stack)
        self._log(request)
        self.check_limits(request)
        take_images(len(request.seeds))
        try:
            async with asyncio.timeout(self.config.request_timeout):
                outcomes = await self._outcomes(request, stack)
        except TimeoutError as error:
            await self._record_fault(request, client, "timeout", started)
            raise EngineFaultError(
                f"no answer within {self.config.request_timeout:g} seconds"
            ) from error
        except asyncio.CancelledError:
            await self._record_fault(request, client, "cancelled", started)
            raise
        except Exception as error:
            await self._record_fault(request, client, _reason(error), started)
            raise
        seconds = time.monotonic() - started
        answer = Answer(request, tuple(outcomes), stack, seconds, self.signer)
        await self._record(answer, client)
        return answer

    @asynccontextmanager
    async def record_failure(self, answer: Answer, client: str) -> AsyncIterator[None]:
        """Record that images did not leave after all, if the block cannot encode or sign them.

        The audit log then has a second record of the request, which is the one that holds.
        """
        try:
            yield
        except Exception:
            started = time.monotonic() - answer.seconds
            await self._record_fault(answer.request, client, "encoding", started)
            raise

    async def _outcomes(self, request: ImageRequest, stack: StackInfo) -> list[Outcome]:
        """Return the outcomes of a request."""
        concept = self.config.concept
        if request.start is not None and stack.reads_images:
            image = await asyncio.to_thread(_open_png, request.start.image)
            checked = await self.engine.check_images(stack.name, [image], [request.prompt])
            if (found := input_outcome(checked[0], request, stack, concept)) is not None:
                return [replace(found, seed=seed) for seed in request.seeds]
        generated = await self.engine.generate(request)
        if len(generated) != len(request.seeds):
            reason = f"images: {len(generated)} for {len(request.seeds)} seeds"
            return [fault(EMPTY_TRACE, seed, reason) for seed in request.seeds]
        return [
            check_release(image, request, seed, stack, concept)
            for image, seed in zip(generated, request.seeds, strict=True)
        ]

    async def _record_fault(
        self, request: ImageRequest, client: str, reason: str, started: float
    ) -> None:
        """Record a request without outcomes; its own error counts more than one of the log."""
        outcomes = tuple(fault(EMPTY_TRACE, seed, reason) for seed in request.seeds)
        stack = self.stack(request.stack)
        with suppress(AuditLogError):
            await self._record(Answer(request, outcomes, stack, time.monotonic() - started), client)

    async def _record(self, answer: Answer, client: str) -> None:
        """Write what became of a request to the audit log, the metrics and the log.

        Raises:
            AuditLogError: the audit log could not be written, and no image may leave.
        """
        try:
            await self.audit.write_answer(answer, client)
        except AuditLogError:
            outcomes = [fault(o.trace, o.seed, "audit-log") for o in answer.outcomes]
            answer = replace(answer, outcomes=tuple(outcomes))
            raise
        finally:
            self.metrics.count_answer(answer)
            found = [outcome.status for outcome in answer.outcomes]
            add_log_fields(**{name: found.count(name) for name in dict.fromkeys(found)})

    def _log(self, request: ImageRequest) -> None:
        """Add what a request asks for to its line in the log."""
        prompt = (
            {"prompt": request.prompt}
            if self.config.log_prompts
            else {"prompt_sha256": hash_text(request.prompt)}
        )
        add_log_fields(stack=request.stack, images=len(request.seeds), **prompt)

    def check_limits(self, request: ImageRequest) -> None:
        """Refuse a request beyond the limits of the server.

        Raises:
            ConfigError: it is.
        """
        limits, config = self.config.limits, request.generation_config
        stack = self.stack(request.stack)
        _check("n", len(request.seeds), limits.images)
        _check("steps", config.num_inference_steps, limits.steps)
        _check("width", config.width or stack.size[0], limits.side)
        _check("height", config.height or stack.size[1], limits.side)
        for name in ("prompt", "negative_prompt"):
            text = getattr(request, name) or ""
            _check(f"the number of characters of {name}", len(text), limits.prompt_chars)

    async def check_prompts(self, stack: str, prompts: Sequence[str]) -> list[GuardTrace]:
        """Return what a stack's guards of prompts decide; errors as `generate`."""
        return await self._in_time(self.engine.check_prompts(self.stack(stack).name, prompts))

    async def check_images(self, stack: str, images: Sequence[Image.Image]) -> list[GeneratedImage]:
        """Return what a stack's guards of images leave of images; errors as `generate`."""
        name, prompts = self.stack(stack).name, [""] * len(images)
        return await self._in_time(self.engine.check_images(name, images, prompts))

    async def _in_time(self, work: Coroutine[Any, Any, T]) -> T:
        """Return the result of work, or give it up after the time of a request."""
        try:
            async with asyncio.timeout(self.config.request_timeout):
                return await work
        except TimeoutError as error:
            raise EngineFaultError(
                f"no answer within {self.config.request_timeout:g} seconds"
            ) from error


def input_outcome(
    checked: GeneratedImage, request: ImageRequest, stack: StackInfo, concept: str | None
) -> Outcome | None:
    """Return the outcome of a request by its own image; None if the guards let it pass."""
    trace, seed = checked.trace, request.seeds[0]
    if trace.action == "withhold":
        return fault(trace, seed, trace.reason)
    if trace.action not in PASSING_ACTIONS:
        return block(trace, seed, stack, "input", concept)
    return None


def _check(name: str, value: int, limit: int) -> None:
    if value > limit:
        raise ConfigError(f"{name} must be <= {limit} on this server, got {value}")


def _open_png(data: bytes) -> Image.Image:
    with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
        return image.convert("RGB")


def _reason(error: Exception) -> str:
    """Return a countable reason that quotes no prompt."""
    kinds: dict[type[Exception], str] = {
        UserError: "refused",
        QueueFullError: "queue-full",
        DrainingError: "draining",
        UpstreamError: "upstream",
    }
    return next((text for kind, text in kinds.items() if isinstance(error, kind)), "engine")
