"""The engine of proxy mode: guards of prompts, another server, guards of images."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from PIL import Image

from safegen.core.errors import ConfigError
from safegen.guards.core.result import PASSING_ACTIONS, GeneratedImage, GuardTrace
from safegen.serve.config import ServerConfig
from safegen.serve.engine.base import (
    DrainingError,
    EngineFaultError,
    EngineState,
    QueueFullError,
    UpstreamError,
)
from safegen.serve.messages import ImageRequest, StackInfo
from safegen.serve.upstream.a1111 import A1111Upstream
from safegen.serve.upstream.checker import GuardChecker, PoolChecker
from safegen.serve.upstream.images import decode_image
from safegen.serve.upstream.openai import OpenAIUpstream
from safegen.serve.upstream.traces import block_trace, join_image, join_stages
from safegen.serve.upstream.transport import UpstreamClient

logger = logging.getLogger(__name__)
PROBE_SECONDS = 5.0
"""Seconds between two looks whether the other server answers."""
Adapter = OpenAIUpstream | A1111Upstream
ADAPTERS: dict[str, type[Adapter]] = {"openai": OpenAIUpstream, "a1111": A1111Upstream}


@dataclass(eq=False)
class _Job:
    """A request that runs."""

    request_id: str
    task: asyncio.Task[list[GeneratedImage]]
    share: float = 0.0
    is_drained: bool = False
    """Whether the server has cancelled it."""


class ProxyEngine:
    """Guards around another image server; see `Engine`."""

    def __init__(self, config: ServerConfig, checker: GuardChecker | None = None) -> None:
        """Store the settings; `start` loads the guards.

        Args:
            config: settings of the server, with an upstream.
            checker: what runs the guards. Default: worker processes.

        Raises:
            ConfigError: there is no upstream.
        """
        if config.upstream is None:
            raise ConfigError("an upstream must be given for this, got none")
        self.config, self.upstream = config, config.upstream
        self.checker: GuardChecker = checker or PoolChecker(config)
        self._client: UpstreamClient | None = None
        self._adapter: Adapter | None = None
        self._stacks: dict[str, StackInfo] = {}
        self._jobs: list[_Job] = []
        self._probe: asyncio.Task[None] | None = None
        self._reason, self._is_draining = "the guards are being loaded", False
        self._upstream_reason = ""

    @property
    def stacks(self) -> Mapping[str, StackInfo]:
        """The guards as the only stack; empty before `start`."""
        return self._stacks

    async def start(self) -> None:
        """Load the guards; see `Engine.start`. The other server need not run yet.

        Raises:
            UserError: a guard, the address or the token cannot be used, or no guard reads images,
                so that nothing would judge what is released.
        """
        self._client = UpstreamClient(self.upstream)
        self._adapter = ADAPTERS[self.upstream.kind](self._client)
        info = await self.checker.start()
        if not info.reads_images:
            names = ", ".join(guard.name for guard in info.guards) or "none"
            raise ConfigError(
                f"guards must have one of images in front of another server, got {names}. "
                "Add judge-filter or safety-checker."
            )
        self._stacks, self._reason = {info.name: info}, ""
        self._probe = asyncio.create_task(self._watch(self._client, self._adapter.probe_path))

    async def generate(self, request: ImageRequest) -> list[GeneratedImage]:
        """Return one image per seed, with the trace of both stages; see `Engine.generate`."""
        info = self._stack(request.stack)
        if self._is_draining:
            raise DrainingError
        if len(self._jobs) >= self.config.max_queue + self.upstream.max_connections:
            raise QueueFullError(len(self._jobs), 1 + len(self._jobs) // 8)
        task = asyncio.create_task(self._generate(request, info))
        job = _Job(request.id, task)
        self._jobs.append(job)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if job.is_drained and task.cancelled():
                raise DrainingError from None
            raise
        finally:
            self._jobs.remove(job)
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task

    async def _generate(self, request: ImageRequest, info: StackInfo) -> list[GeneratedImage]:
        """Return the images of a request: guards of prompts, other server, guards of images."""
        assert self._adapter is not None
        guards, prompt = info.guards, None
        if info.reads_prompts:
            (prompt,) = await self._check_prompts([request.prompt])
            if prompt.action not in PASSING_ACTIONS:
                trace = join_stages(guards, prompt, None)
                return [GeneratedImage(None, trace)] * len(request.seeds)
        self._set_share(0.1)
        files = await self._adapter.generate(request)
        if len(files) != len(request.seeds):
            raise UpstreamError(
                f"the other server answered with {len(files)} images for {len(request.seeds)}"
            )
        self._set_share(0.8)
        images = [await self._decode(file) for file in files if isinstance(file, bytes)]
        checked: list[GeneratedImage] = []
        if images:
            checked = await self._check_images(images, [request.prompt] * len(images))
        rest = iter(checked)
        return [
            join_image(guards, prompt, next(rest))
            if isinstance(file, bytes)
            else GeneratedImage(None, block_trace(guards, prompt, file.stage))
            for file in files
        ]

    async def _decode(self, file: bytes) -> Image.Image:
        return await asyncio.to_thread(decode_image, file, self.upstream.max_side)

    async def check_prompts(self, stack: str, prompts: Sequence[str]) -> list[GuardTrace]:
        """Return what the guards of prompts decide."""
        self._stack(stack)
        if self._is_draining:
            raise DrainingError
        return await self._check_prompts(prompts)

    async def check_images(
        self, stack: str, images: Sequence[Image.Image], prompts: Sequence[str]
    ) -> list[GeneratedImage]:
        """Return what the guards of images leave of images."""
        self._stack(stack)
        if self._is_draining:
            raise DrainingError
        return await self._check_images(images, prompts)

    async def _check_prompts(self, prompts: Sequence[str]) -> list[GuardTrace]:
        traces = await self.checker.check_prompts(prompts)
        _check_number("traces", traces, prompts)
        return traces

    async def _check_images(
        self, images: Sequence[Image.Image], prompts: Sequence[str]
    ) -> list[GeneratedImage]:
        checked = await self.checker.check_images(images, prompts)
        _check_number("images", checked, images)
        return checked

    def progress(self, request_id: str) -> float | None:
        """Return the part of a request that is done; the other server counts as one step."""
        return next((job.share for job in self._jobs if job.request_id == request_id), None)

    def _set_share(self, share: float) -> None:
        for job in self._jobs:
            if job.task is asyncio.current_task():
                job.share = share

    def state(self) -> EngineState:
        """Return whether the guards run; the reason also says if the other server does not."""
        workers = self.checker.num_workers
        reason = self._reason
        if not reason and not workers:
            reason = "the guards have no worker"
        if self._is_draining:
            reason = "the server is being stopped"
        return EngineState(
            is_ready=not reason,
            reason=reason or self._upstream_reason,
            running=len(self._jobs),
            workers=workers,
        )

    async def drain(self, timeout: float) -> None:
        """Take no more requests; answer those accepted, and fail the rest after `timeout` s."""
        self._is_draining = True
        if tasks := [job.task for job in self._jobs]:
            await asyncio.wait(tasks, timeout=timeout)
        for job in self._jobs:
            job.is_drained = job.task.cancel()

    async def stop(self) -> None:
        """Stop the workers and close the connections."""
        self._reason = "the server is being stopped"
        await self.drain(0)
        if self._probe is not None:
            self._probe.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await self._probe
        await self.checker.stop()
        if self._client is not None:
            await self._client.close()

    def _stack(self, name: str) -> StackInfo:
        if name not in self._stacks:
            raise EngineFaultError(self._reason or f"there is no stack {name!r}")
        return self._stacks[name]

    async def _watch(self, client: UpstreamClient, path: str) -> None:
        """Look every few seconds whether the other server answers."""
        while True:
            reason = await client.probe(path)
            if reason and reason != self._upstream_reason:
                logger.warning("%s", reason)
            self._upstream_reason = reason
            await asyncio.sleep(PROBE_SECONDS)


def _check_number(noun: str, found: object, expected: Sequence[Any]) -> None:
    """Refuse another number of results.

    Raises:
        EngineFaultError: there is one.
    """
    if not isinstance(found, list) or len(found) != len(expected):
        n = len(found) if isinstance(found, list) else 0
        raise EngineFaultError(f"the guards returned {n} {noun} for {len(expected)}")
