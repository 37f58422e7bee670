"""Guards around another server, in worker processes that load no model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from PIL import Image

from safegen.guards.core.result import GeneratedImage, GuardTrace
from safegen.serve.config import ServerConfig
from safegen.serve.engine.pool import StackPool
from safegen.serve.messages import StackInfo


class GuardChecker(Protocol):
    """Guards in processes of their own."""

    async def start(self) -> StackInfo:
        """Load the guards and return them as a stack without a model."""
        ...

    async def check_prompts(self, prompts: Sequence[str]) -> list[GuardTrace]:
        """Return what the guards of prompts decide on each prompt."""
        ...

    async def check_images(
        self, images: Sequence[Image.Image], prompts: Sequence[str]
    ) -> list[GeneratedImage]:
        """Return images as the guards of images leave them."""
        ...

    @property
    def num_workers(self) -> int:
        """Number of processes that run."""
        ...

    async def stop(self) -> None:
        """End the processes."""
        ...


class PoolChecker:
    """Guards in the worker processes of a pool."""

    def __init__(self, config: ServerConfig) -> None:
        """Store the settings; `start` loads the guards."""
        self.pool = StackPool(config, None)

    async def start(self) -> StackInfo:
        """Load the guards in every worker, and test them."""
        return await self.pool.start()

    async def check_prompts(self, prompts: Sequence[str]) -> list[GuardTrace]:
        """Return what the guards of prompts decide on each prompt."""
        traces: list[GuardTrace] = await self.pool.submit("check_prompts", list(prompts))
        return traces

    async def check_images(
        self, images: Sequence[Image.Image], prompts: Sequence[str]
    ) -> list[GeneratedImage]:
        """Return images as the guards of images leave them."""
        checked: list[GeneratedImage] = await self.pool.submit(
            "check_images", list(images), list(prompts)
        )
        return checked

    @property
    def num_workers(self) -> int:
        """Number of processes that run."""
        return sum(worker.is_ready for worker in self.pool.workers)

    async def stop(self) -> None:
        """End the processes."""
        await self.pool.stop()
