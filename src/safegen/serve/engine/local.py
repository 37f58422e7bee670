"""The engine of local mode: worker processes with the stacks."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace

from PIL import Image

from safegen.core.errors import ConfigError
from safegen.guards.core.result import GeneratedImage, GuardTrace
from safegen.serve.config import ServerConfig
from safegen.serve.engine.base import DrainingError, EngineFaultError, EngineState
from safegen.serve.engine.pool import OnBatch, StackPool
from safegen.serve.engine.process import SessionOpener, open_stack
from safegen.serve.messages import ImageRequest, StackInfo


class LocalEngine:
    """Stacks in worker processes of this machine; see `Engine`."""

    def __init__(
        self,
        config: ServerConfig,
        *,
        on_batch: OnBatch | None = None,
        open_session: SessionOpener = open_stack,
    ) -> None:
        """Store the settings; `start` loads the stacks.

        Args:
            config: settings of the server.
            on_batch: called with the number of images and the seconds of each batch.
            open_session: opens the session of a stack, in a worker process.
        """
        self.config = config
        self.pools = [StackPool(config, spec, on_batch, open_session) for spec in config.stacks]
        self._by_name: dict[str, StackPool] = {}
        self._is_ready, self._reason = False, "the stacks are being loaded"

    @property
    def stacks(self) -> Mapping[str, StackInfo]:
        """Stacks by name, the default one first; empty before `start`."""
        return {name: pool.info for name, pool in self._by_name.items() if pool.info is not None}

    async def start(self) -> None:
        """Load the stacks one after the other, each tested; see `Engine.start`."""
        try:
            for pool in self.pools:
                await self._start_pool(pool)
        except BaseException:
            await self.stop()
            raise
        self._is_ready, self._reason = True, ""

    async def _start_pool(self, pool: StackPool) -> None:
        info = await pool.start()
        if info.name in self._by_name:
            raise ConfigError(
                f"stacks must have different names, got two named {info.name!r}. "
                "Rename one in its recipe, or give NAME=MODEL+PATCH."
            )
        self._by_name[info.name] = pool

    async def generate(self, request: ImageRequest) -> list[GeneratedImage]:
        """Return one image per seed, with its trace; see `Engine.generate`."""
        size = {"batch_size": self.config.max_batch_size}
        config = request.generation_config.model_copy(update=size)
        sized = replace(request, generation_config=config)
        images: list[GeneratedImage] = await self._pool(request.stack).submit("generate", sized)
        return images

    async def check_prompts(self, stack: str, prompts: Sequence[str]) -> list[GuardTrace]:
        """Return what the stack's guards of prompts decide."""
        traces: list[GuardTrace] = await self._pool(stack).submit("check_prompts", list(prompts))
        return traces

    async def check_images(
        self, stack: str, images: Sequence[Image.Image], prompts: Sequence[str]
    ) -> list[GeneratedImage]:
        """Return what the stack's guards of images leave of images."""
        checked: list[GeneratedImage] = await self._pool(stack).submit(
            "check_images", list(images), list(prompts)
        )
        return checked

    def progress(self, request_id: str) -> float | None:
        """Return the part of a request that is done."""
        found = next((e for p in self.pools if (e := p.find(request_id))), None)
        return None if found is None else found.share

    def state(self) -> EngineState:
        """Return whether every stack has a worker, and how much there is to do."""
        ready = [sum(worker.is_ready for worker in pool.workers) for pool in self.pools]
        reason = self._reason
        if self._is_ready and not all(ready):
            reason = next((pool.fault for pool in self.pools if pool.fault), "a worker is replaced")
        if any(pool.is_draining for pool in self.pools):
            reason = "the server is being stopped"
        return EngineState(
            is_ready=not reason,
            reason=reason,
            queued=sum(len(pool.waiting) for pool in self.pools),
            running=sum(len(pool.running) for pool in self.pools),
            workers=sum(ready),
        )

    async def drain(self, timeout: float) -> None:
        """Take no more requests; answer those accepted, and fail the rest after `timeout` s."""
        loop = asyncio.get_running_loop()
        until = loop.time() + timeout
        for pool in self.pools:
            pool.is_draining = True
        while self._is_busy() and loop.time() < until:
            await asyncio.sleep(0.02)
        for pool in self.pools:
            pool.fail_all(DrainingError())

    async def stop(self) -> None:
        """Stop the workers."""
        self._is_ready, self._reason = False, "the server is being stopped"
        await asyncio.gather(*(pool.stop() for pool in self.pools))

    def _is_busy(self) -> bool:
        return any(pool.waiting or pool.running for pool in self.pools)

    def _pool(self, stack: str) -> StackPool:
        if stack not in self._by_name:
            raise EngineFaultError(self._reason or f"there is no stack {stack!r}")
        return self._by_name[stack]
