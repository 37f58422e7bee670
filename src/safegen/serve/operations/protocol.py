"""HTTP connections with time limits: uvicorn's h11 protocol, which has none for slow clients."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol

from safegen.serve.config import RequestLimits

KEEP_ALIVE = 5.0
"""Most seconds between two requests of a connection."""
GRACE = 0.5
"""Seconds in which a connection without a request may still send one when the server stops."""


def build_protocol(limits: RequestLimits) -> type[H11Protocol]:
    """Return the protocol class of a server with these limits, for `uvicorn.Config(http=...)`."""

    class Protocol(LimitedProtocol):
        """Protocol of one server."""

    Protocol.limits = limits
    return Protocol


class LimitedProtocol(H11Protocol):
    """Connection that is closed if its client sends or reads too slowly.

    The headers of a request must arrive within `read_seconds`, as must the rest of a body after
    its answer. The buffer of a response must be read within `write_seconds`. The time of a body
    is limited by `BodyMiddleware`.
    """

    limits = RequestLimits()

    def __init__(self, config: Config, *arguments: Any, **options: Any) -> None:
        super().__init__(config, *arguments, **options)
        self._reading: asyncio.TimerHandle | None = None
        self._writing: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the clock for the first headers; close a connection beyond the most."""
        super().connection_made(transport)
        if len(self.connections) > 2 * self.limits.connections:
            transport.abort()
        self._watch_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clocks."""
        super().connection_lost(exc)
        for timer in (self._reading, self._writing):
            if timer is not None:
                timer.cancel()

    def data_received(self, data: bytes) -> None:
        """Pass data on."""
        super().data_received(data)
        self._watch_reading()

    def on_response_complete(self) -> None:
        """Start the clock for the next headers, or for the rest of the body."""
        super().on_response_complete()
        self._watch_reading()
        if self.transport.is_closing():
            self._limit_writing()

    def _watch_reading(self) -> None:
        """Run the clock while the client owes headers, or the rest of a body that is answered."""
        state, own = self.conn.their_state, self.conn.our_state
        owes = state is h11.IDLE or (state is h11.SEND_BODY and own is h11.DONE)
        if owes and self._reading is None:
            self._reading = self.loop.call_later(self.limits.read_seconds, self._abort)
        elif not owes and self._reading is not None:
            self._reading.cancel()
            self._reading = None

    def pause_writing(self) -> None:
        """Start the clock for the client that reads too slowly."""
        super().pause_writing()
        self._limit_writing()

    def resume_writing(self) -> None:
        """Stop the clock."""
        super().resume_writing()
        if self._writing is not None and not self.transport.is_closing():
            self._writing.cancel()
            self._writing = None

    def _limit_writing(self) -> None:
        if self._writing is None:
            self._writing = self.loop.call_later(self.limits.write_seconds, self._abort)

    def _abort(self) -> None:
        self.transport.abort()

    def timeout_keep_alive_handler(self) -> None:
        """Close an unused connection, whether or not its client has read the last response."""
        super().timeout_keep_alive_handler()
        self._limit_writing()

    def shutdown(self) -> None:
        """Close the connection after its answer, or if it sends no request soon."""
        if self.cycle is None or self.cycle.response_complete:
            self.loop.call_later(GRACE, self._close_unused)
        else:
            self.cycle.keep_alive = False

    def _close_unused(self) -> None:
        if not self.transport.is_closing():
            super().shutdown()

    def send_400_response(self, msg: str) -> None:
        """Answer a request that is not HTTP, or has too long headers, and close the connection."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.abort()
            return
        text = f"the request must be HTTP with at most {self.limits.header_bytes} bytes of headers"
        error = {"message": text, "type": "invalid_request_error", "param": None}
        body = json.dumps({"error": error | {"code": "invalid_http"}, "detail": text}).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        events = (
            h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
            h11.Data(data=body),
            h11.EndOfMessage(),
        )
        for event in events:
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
        self._limit_writing()
