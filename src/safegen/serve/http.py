"""What the routes of every interface share: the service, the client, and a client that leaves."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import suppress
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request

from safegen.serve.service import ImageService

T = TypeVar("T")


def get_service(request: Request) -> ImageService:
    """Return the service of the app."""
    service: ImageService = request.app.state.service
    return service


def get_client(request: Request) -> str:
    """Return the name of the client's token; empty without tokens."""
    return str(getattr(request.state, "client", ""))


def get_request_id(request: Request) -> str:
    """Return the id of the request."""
    return str(request.state.request_id)


Service = Annotated[ImageService, Depends(get_service)]
Client = Annotated[str, Depends(get_client)]
RequestId = Annotated[str, Depends(get_request_id)]


class ClientLeftError(Exception):
    """The client closed the connection before its answer."""


async def run_for_client(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Return the result of work for a client; cancel it if the client leaves.

    The body of the request must have been read.

    Raises:
        ClientLeftError: the client left.
    """
    task = asyncio.create_task(work)
    watch = asyncio.create_task(_wait_for_disconnect(request))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientLeftError
    finally:
        for each in (task, watch):
            each.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await each


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
