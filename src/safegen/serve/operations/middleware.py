"""Middleware around the app, the outermost first: see `add_middleware`."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any
from uuid import uuid4

from fastapi import FastAPI
from starlette.datastructures import MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from safegen.core.text import cut_text
from safegen.serve.config import ServerConfig
from safegen.serve.engine.base import DrainingError
from safegen.serve.errors import FAILED, RequestError, to_request_error, to_response
from safegen.serve.http import ClientLeftError
from safegen.serve.operations.access import (
    PUBLIC_FOLDER,
    STORED_IMAGES,
    OriginMiddleware,
    TokenMiddleware,
    is_public,
)
from safegen.serve.operations.body import BodyMiddleware, read_length, send_error
from safegen.serve.operations.context import CONTEXT, RequestContext
from safegen.serve.service import ImageService

access_logger = logging.getLogger("safegen.serve.access")
PIECE = 256 * 2**10
"""Most bytes of a response that are written at a time."""
MAX_ID = 64
"""Most characters of a client's own request id that are logged."""
PROBES = ("/health", "/ready", "/metrics")
"""Routes that programs call all the time: their answers are logged only if they are not 200."""
HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' data: blob:; "
    "object-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
"""Headers of every response that has no such header."""


def add_middleware(app: FastAPI, config: ServerConfig, service: ImageService) -> None:
    """Add the middleware of a server to its app.

    In the order of a request: its id, log line and metrics; host and origin; CORS if origins are
    allowed; token and rate limit; start, drain and load of the server; limits of the body.
    """
    app.add_middleware(BodyMiddleware, limits=config.limits)
    app.add_middleware(LoadMiddleware, service=service, most=config.limits.connections)
    app.add_middleware(TokenMiddleware, clients=service.clients)
    if config.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.allowed_origins,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),
            expose_headers=("x-request-id", "retry-after"),
        )
    app.add_middleware(OriginMiddleware, config=config)
    app.add_middleware(RequestMiddleware, service=service)


class RequestMiddleware:
    """Gives every request an id, its headers, a line in the log and a place in the metrics.

    The id is in the header `x-request-id` of the response. Exceptions become responses here.
    """

    def __init__(self, app: ASGIApp, service: ImageService) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Call the app, and record what became of the request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        context = RequestContext(uuid4().hex)
        scope.setdefault("state", {})["request_id"] = context.id
        reset = CONTEXT.set(context)
        response, started = _Response(send, scope, context.id), time.monotonic()
        try:
            await self._run(scope, receive, response)
        finally:
            seconds = time.monotonic() - started
            route, method = name_route(scope), scope["method"]
            self.service.metrics.count_request(route, method, response.status, seconds)
            level = logging.DEBUG if route in PROBES and response.status == 200 else logging.INFO
            fields = _log(scope, context, response, seconds)
            access_logger.log(level, "request", extra={"fields": fields})
            CONTEXT.reset(reset)

    async def _run(self, scope: Scope, receive: Receive, response: _Response) -> None:
        most = self.service.config.limits.header_bytes
        try:
            if (size := count_header_bytes(scope)) > most:
                text = f"the headers must have at most {most} bytes, got {size}"
                error = RequestError(431, text, code="headers_too_large")
                await send_error(error, scope, receive, response.send)
            elif has_two_lengths(scope):
                text = "the body must have one length, got content-length and transfer-encoding"
                error = RequestError(400, text, code="invalid_http")
                await send_error(error, scope, receive, response.send)
            else:
                await self.app(scope, receive, response.send)
        except ClientLeftError:
            response.status = 499  # as nginx; nobody reads it
        except Exception as error:
            answer = to_response(to_request_error(error))
            if response.status:
                raise
            await answer(scope, receive, response.send)


class _Response:
    """Response while it is sent: with its headers, and in pieces that a slow client can take."""

    def __init__(self, send: Send, scope: Scope, request_id: str) -> None:
        self._send, self._id, self._path = send, request_id, scope["path"]
        self.status = self.size = 0

    async def send(self, message: Message) -> None:
        """Send a message."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self._id
            for name, value in HEADERS.items():
                headers.setdefault(name, value)
            is_page = self._path == "/" or self._path.startswith(PUBLIC_FOLDER)
            headers.setdefault("cache-control", "no-cache" if is_page else "no-store")
            await self._send(message)
            return
        body = message.get("body", b"")
        self.size += len(body)
        while len(body) > PIECE:
            await self._send({"type": message["type"], "body": body[:PIECE], "more_body": True})
            body = body[PIECE:]
        await self._send({**message, "body": body})


class LoadMiddleware:
    """Answers 503 before the engine is ready, during the drain, and beyond the most requests."""

    def __init__(self, app: ASGIApp, service: ImageService, most: int) -> None:
        self.app, self.service, self.most = app, service, most
        self.running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Call the app, or answer 503."""
        if scope["type"] != "http" or is_public(scope) or scope["path"] == "/metrics":
            await self.app(scope, receive, send)
            return
        if (error := self._refuse()) is not None:
            await send_error(error, scope, receive, send)
            return
        self.running += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self.running -= 1

    def _refuse(self) -> RequestError | None:
        """Return why a request is refused; None if it is not."""
        if self.service.phase == "draining":
            return to_request_error(DrainingError())
        if self.service.phase == "starting":
            text, code = "the server is being started. Try again later.", "starting"
        elif self.running >= self.most:
            text, code = f"{self.running} requests are being answered. Try again later.", "overload"
        else:
            return None
        return RequestError(503, text, code=code, type=FAILED, headers={"Retry-After": "5"})


def count_header_bytes(scope: Scope) -> int:
    """Return the bytes of a request's first line and headers."""
    line = len(scope.get("raw_path") or b"") + len(scope["query_string"])
    return line + sum(len(name) + len(value) + 4 for name, value in scope["headers"])


def has_two_lengths(scope: Scope) -> bool:
    """Return whether a proxy in front may see another end of the body (request smuggling).

    Source: RFC 9112, section 6.1.
    """
    return {b"content-length", b"transfer-encoding"} <= {name for name, _ in scope["headers"]}


def name_route(scope: Scope) -> str:
    """Return the route of a request, without the values in its path; `other` if it has none."""
    path = getattr(scope.get("route"), "path", None)
    if isinstance(path, str):
        return path
    return PUBLIC_FOLDER if scope["path"].startswith(PUBLIC_FOLDER) else "other"


def _log(
    scope: Scope, context: RequestContext, response: _Response, seconds: float
) -> Mapping[str, Any]:
    """Return the fields of a request's line in the log."""
    address = scope.get("client")
    given = next((v for n, v in scope["headers"] if n == b"x-request-id"), b"")
    return {
        "method": scope["method"],
        "path": STORED_IMAGES
        if scope["path"].startswith(STORED_IMAGES)
        else cut_text(scope["path"]),
        "status": response.status,
        "seconds": round(seconds, 4),
        "address": address[0] if address else None,
        "client": context.client.name if context.client else None,
        "request_bytes": read_length(scope),
        "response_bytes": response.size,
        **({"client_request_id": given.decode("latin-1")[:MAX_ID]} if given else {}),
        **context.fields,
    }
