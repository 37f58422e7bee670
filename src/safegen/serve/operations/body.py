"""Limits of the bodies of requests: bytes, time, and bytes of all requests together."""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from safegen.serve.config import RequestLimits
from safegen.serve.errors import FAILED, RequestError, to_response

SEPARATORS = (b",", b"[", b"{")
"""What stands before each value of a JSON document but the first one."""
LINGER = 1.0
"""Most seconds for which the rest of a refused body is read, so that its client sees the answer."""


class BodyMiddleware:
    """Answers a body that is too large, or of too many values, with 413; a slow one with 408."""

    def __init__(self, app: ASGIApp, limits: RequestLimits) -> None:
        self.app, self.limits = app, limits
        self.total = 0
        """Bytes of the bodies of all requests that are being answered."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Call the app with a limited body; what it answers to a refused body is replaced."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        body = _Body(self, receive, send, has_files=is_multipart(scope))
        if (length := read_length(scope)) > self.limits.body_bytes:
            body.error = refuse_size(self.limits, length)
        else:
            try:
                await self.app(scope, body.receive, body.send)
            except Exception:
                if body.error is None:
                    raise
            finally:
                self.total -= body.size
        if body.error is not None and not body.has_response:
            await send_error(body.error, scope, receive, send)


class _Body:
    """Body of one request while it is read."""

    def __init__(
        self, owner: BodyMiddleware, receive: Receive, send: Send, *, has_files: bool = False
    ) -> None:
        self.owner, self._receive, self._send, self._has_files = owner, receive, send, has_files
        self.size = self.num_values = 0
        self.error: RequestError | None = None
        self.has_response = self._is_complete = False
        self._deadline = asyncio.get_running_loop().time() + owner.limits.read_seconds

    async def receive(self) -> Message:
        """Return the next part, or a disconnect once the body is refused."""
        if self._is_complete:
            return await self._receive()
        if self.error is not None:
            return {"type": "http.disconnect"}
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError:
            seconds = self.owner.limits.read_seconds
            self.error = RequestError(
                408, f"the body must arrive within {seconds:g} seconds", code="request_timeout"
            )
            return {"type": "http.disconnect"}
        self._count(message.get("body", b""))
        if self.error is not None:
            return {"type": "http.disconnect"}
        self._is_complete = not message.get("more_body", False)
        return message

    def _count(self, part: bytes) -> None:
        """Count a part of the body, and refuse the body if it is too much."""
        limits = self.owner.limits
        self.size += len(part)
        self.owner.total += len(part)
        if not self._has_files:
            self.num_values += count_values(part)
        if self.size > limits.body_bytes:
            self.error = refuse_size(limits)
        elif self.num_values > limits.json_values:
            text = f"the body must have at most {limits.json_values} commas and brackets"
            self.error = RequestError(413, text, code="body_too_large")
        elif self.owner.total > limits.total_body_bytes:
            self.error = RequestError(
                503,
                "the server holds too many request bodies. Try again later.",
                code="overloaded",
                type=FAILED,
                headers={"Retry-After": "5"},
            )

    async def send(self, message: Message) -> None:
        """Send a message of the app unless the body is refused."""
        if self.error is None or self.has_response:
            self.has_response = True
            await self._send(message)


def count_values(part: bytes) -> int:
    """Return how many values start in a part of a JSON document, at most: commas and brackets."""
    return sum(map(part.count, SEPARATORS))


def refuse_size(limits: RequestLimits, length: int | None = None) -> RequestError:
    """Return the error of a body that is too large."""
    got = f", got {length}" if length else ""
    return RequestError(
        413, f"the body must have at most {limits.body_bytes} bytes{got}", code="body_too_large"
    )


def read_length(scope: Scope) -> int:
    """Return the length of a body by its header; 0 if it has none, or none that is a number."""
    value = next((v for name, v in scope["headers"] if name == b"content-length"), b"")
    return int(value[:20]) if value.isdigit() else 0


def is_multipart(scope: Scope) -> bool:
    """Return whether a body is a form with files."""
    kinds = [value for name, value in scope["headers"] if name == b"content-type"]
    return len(kinds) == 1 and kinds[0].strip().lower().startswith(b"multipart/form-data")


async def send_error(error: RequestError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer a request with an error before its body is read, and close its connection.

    The rest of the body is read and thrown away for at most a second.
    """
    has_body = read_length(scope) > 0 or any(n == b"transfer-encoding" for n, _ in scope["headers"])
    if not has_body:
        await to_response(error)(scope, receive, send)
        return
    error.headers["Connection"] = "close"

    async def send_open(message: Message) -> None:
        """Send the answer, and leave the connection open until the rest has been read."""
        if message["type"] == "http.response.body":
            await send({**message, "more_body": True})
        else:
            await send(message)

    await to_response(error)(scope, receive, send_open)
    try:
        async with asyncio.timeout(LINGER):
            while (message := await receive())["type"] == "http.request":
                if not message.get("more_body", False):
                    break
    except TimeoutError:
        pass
    await send({"type": "http.response.body", "body": b"", "more_body": False})
