"""Middleware around the app."""

from __future__ import annotations

from uuid import uuid4

from fastapi import FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send

from safegen.serve.config import ServerConfig


class RequestIdMiddleware:
    """Gives every request an id, which its response carries in the header `x-request-id`."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Set the id and call the app."""
        if scope["type"] == "http":
            scope.setdefault("state", {})["request_id"] = uuid4().hex
        await self.app(scope, receive, send)


def add_middleware(app: FastAPI, config: ServerConfig) -> None:
    """Add the middleware of a server to its app."""
    app.add_middleware(RequestIdMiddleware)
