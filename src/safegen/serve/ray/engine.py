"""The engine of `--engine ray`: stacks in replicas of a Ray cluster."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from PIL import Image

from safegen.core.errors import ConfigError, MissingExtraError
from safegen.guards.core.result import GeneratedImage, GuardTrace
from safegen.serve.config import ServerConfig
from safegen.serve.engine.base import DrainingError, EngineFaultError, EngineState, QueueFullError
from safegen.serve.engine.process import JobFailure
from safegen.serve.engine.worker import to_exception
from safegen.serve.messages import ImageRequest, StackInfo
from safegen.serve.ray.replica import Reply

try:
    from ray.exceptions import TaskCancelledError
    from ray.serve.exceptions import BackPressureError
    from ray.serve.handle import DeploymentHandle
except ImportError as error:
    raise MissingExtraError("engine ray", "ray", "ray") from error

logger = logging.getLogger(__name__)
CountReplicas = Callable[[], Mapping[str, int]]
CANCEL_SECONDS = 0.5
"""Seconds within which the cancellation of a request follows that of its calls."""
STATUS_SECONDS = 1.0
"""Seconds between two looks at the state of the replicas."""


@dataclass(eq=False)
class ReplicaCall:
    """Call of a replica that is not answered yet."""

    task: asyncio.Task[Any]
    is_drained: bool = False
    """Whether the server has cancelled it."""


class RayEngine:
    """Stacks in replicas of a Ray cluster; see `Engine`. It must run inside the cluster."""

    def __init__(
        self, config: ServerConfig, handles: Sequence[DeploymentHandle[Any]], count: CountReplicas
    ) -> None:
        """Store the settings; `start` waits for the replicas.

        Args:
            config: settings of the server.
            handles: one per stack of the settings.
            count: returns the number of replicas that run, by deployment. It is called in a thread.
        """
        self.config, self.handles, self._count = config, tuple(handles), count
        self._stacks: dict[str, tuple[DeploymentHandle[Any], StackInfo]] = {}
        self._calls: list[ReplicaCall] = []
        self._reason = "the stacks are being loaded"
        self._workers, self._is_draining = 0, False
        self._watch: asyncio.Task[None] | None = None

    @property
    def stacks(self) -> Mapping[str, StackInfo]:
        """Stacks by name, the default one first; empty before `start`."""
        return {name: info for name, (_, info) in self._stacks.items()}

    async def start(self) -> None:
        """Wait until a replica of each stack is loaded; a second call does nothing."""
        if self._watch is not None:
            return
        for handle in self.handles:
            info: StackInfo = await self._await(handle.describe.remote())
            if info.name in self._stacks:
                raise ConfigError(f"stacks must have different names, got two named {info.name!r}")
            self._stacks[info.name] = handle, info
        self._reason = ""
        self._watch = asyncio.create_task(self._watch_replicas())

    async def generate(self, request: ImageRequest) -> list[GeneratedImage]:
        """Return one image per seed, with its trace; see `Engine.generate`."""
        images: list[GeneratedImage] = await self._call(request.stack, "generate", request)
        return images

    async def check_prompts(self, stack: str, prompts: Sequence[str]) -> list[GuardTrace]:
        """Return what the stack's guards of prompts decide."""
        traces: list[GuardTrace] = await self._call(stack, "check_prompts", list(prompts))
        return traces

    async def check_images(
        self, stack: str, images: Sequence[Image.Image], prompts: Sequence[str]
    ) -> list[GeneratedImage]:
        """Return what the stack's guards of images leave of images."""
        checked: list[GeneratedImage] = await self._call(
            stack, "check_images", list(images), list(prompts)
        )
        return checked

    def progress(self, request_id: str) -> float | None:
        """Return None: a replica tells nothing before its answer."""
        return None

    def state(self) -> EngineState:
        """Return whether every stack has a replica, and how many requests the replicas have."""
        return EngineState(
            is_ready=not self._reason,
            reason=self._reason,
            running=len(self._calls),
            workers=self._workers,
        )

    async def drain(self, timeout: float) -> None:
        """Take no more requests; answer those accepted, and fail the rest after `timeout` s."""
        self._is_draining, self._reason = True, "the server is being stopped"
        tasks = {call.task for call in self._calls}
        if tasks:
            await asyncio.wait(tasks, timeout=timeout)
        for call in list(self._calls):
            call.is_drained = True
            call.task.cancel()

    async def stop(self) -> None:
        """Stop looking at the replicas. Ray ends them with the application."""
        self._is_draining, self._reason = True, "the server is being stopped"
        if self._watch is not None:
            self._watch.cancel()
            with suppress(asyncio.CancelledError):
                await self._watch

    async def _call(self, stack: str, method: str, *arguments: Any) -> Any:
        """Return the value of a replica's method; if this is cancelled, so is the call."""
        if self._is_draining:
            raise DrainingError
        if stack not in self._stacks:
            raise EngineFaultError(self._reason or f"there is no stack {stack!r}")
        handle, info = self._stacks[stack]
        response = getattr(handle, method).remote(*arguments)
        call = ReplicaCall(asyncio.create_task(self._await(response)))
        self._calls.append(call)
        try:
            reply: Reply = await call.task
        except asyncio.CancelledError:
            if call.is_drained:
                raise DrainingError from None
            raise
        finally:
            call.task.cancel()
            self._calls.remove(call)
        if reply.stack != info:
            raise EngineFaultError("the stack has changed on the disk; the replica is not used")
        if isinstance(reply.value, JobFailure):
            raise to_exception(reply.value)
        return reply.value

    async def _await(self, response: Any) -> Any:
        """Return the value of a response; every failure of Ray is a fault.

        Raises:
            QueueFullError: too many requests wait for a replica.
            EngineFaultError: the replica died, or Ray failed.
        """
        try:
            return await response
        except (asyncio.CancelledError, TaskCancelledError) as error:
            response.cancel()
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            # If the client left, Ray cancels its calls first, and the request itself after them.
            await asyncio.sleep(CANCEL_SECONDS)
            raise EngineFaultError("Ray has cancelled the request") from error
        except BackPressureError as error:
            raise QueueFullError(self.config.max_queue, self._retry_after()) from error
        except Exception as error:
            logger.warning("a replica failed: %s", type(error).__name__)
            raise EngineFaultError(f"the replica failed: {type(error).__name__}") from error

    def _retry_after(self) -> int:
        """Return the seconds until a place is likely: a second per waiting batch."""
        return 1 + self.config.max_queue // (self.config.max_batch_size * max(1, self._workers))

    async def _watch_replicas(self) -> None:
        """Look again and again whether every stack has a replica that runs."""
        names = {handle.deployment_name for handle in self.handles}
        while True:
            try:
                found = await asyncio.to_thread(self._count)
                alive = [found.get(name, 0) for name in names]
                self._workers, reason = sum(alive), "" if all(alive) else "a stack has no replica"
            except Exception as error:
                self._workers, reason = 0, f"Ray does not answer: {type(error).__name__}"
            if not self._is_draining:
                self._reason = reason
            await asyncio.sleep(STATUS_SECONDS)
