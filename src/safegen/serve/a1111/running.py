"""Requests of the A1111 interface that run, for its routes `interrupt` and `progress`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Annotated, Any

from fastapi import Depends, Request

from safegen.serve.errors import RequestError
from safegen.serve.messages import ImageRequest
from safegen.serve.service import Answer


@dataclass
class RunningRequest:
    """One request that runs."""

    request: ImageRequest
    client: str
    """Name of the client's token; empty without tokens."""
    task: asyncio.Task[Answer]
    started: float = field(default_factory=time.monotonic)
    """Monotonic time of its arrival."""


class RunningRequests:
    """Requests of the interface that run, by their ids."""

    def __init__(self) -> None:
        self._running: dict[str, RunningRequest] = {}

    def of_client(self, client: str) -> list[RunningRequest]:
        """Return the requests of a client, the oldest first."""
        return [job for job in self._running.values() if job.client == client]

    def interrupt(self, client: str) -> int:
        """Cancel the requests of a client; return how many there were."""
        jobs = self.of_client(client)
        for job in jobs:
            job.task.cancel()
        return len(jobs)

    async def run(
        self, request: ImageRequest, client: str, work: Coroutine[Any, Any, Answer]
    ) -> Answer:
        """Return the answer to a request, which can be interrupted meanwhile.

        Raises:
            RequestError: the client interrupted it.
        """
        task = asyncio.create_task(work)
        self._running[request.id] = RunningRequest(request, client, task)
        try:
            await asyncio.wait({task})
            if task.cancelled():
                raise RequestError(409, "the request was interrupted", code="interrupted")
            return task.result()
        finally:
            del self._running[request.id]
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task


def get_running(request: Request) -> RunningRequests:
    """Return the running requests of the app."""
    state = request.app.state
    if not hasattr(state, "a1111_requests"):
        state.a1111_requests = RunningRequests()
    jobs: RunningRequests = state.a1111_requests
    return jobs


Running = Annotated[RunningRequests, Depends(get_running)]
