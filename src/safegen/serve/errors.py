"""Errors of the service as HTTP responses, in the words of the command line."""

from __future__ import annotations

import logging
import math
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from safegen.core.errors import UnknownNameError, UserError
from safegen.serve.engine.base import DrainingError, EngineFaultError, QueueFullError, UpstreamError
from safegen.serve.gate import Outcome
from safegen.serve.operations.limits import RateLimitError
from safegen.serve.service import Answer

logger = logging.getLogger(__name__)
INVALID, BLOCKED, FAILED = "invalid_request_error", "image_generation_user_error", "server_error"
"""Types of errors in the OpenAI interface."""
ROUTES = "The OpenAI interface is below /v1, that of A1111 below /sdapi/v1. See /openapi.json."
"""What a client of a route that does not exist is told."""


class RequestError(Exception):
    """Request that is answered with an error."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        type: str = INVALID,
        param: str | None = None,
        headers: dict[str, str] | None = None,
        more: dict[str, Any] | None = None,
    ) -> None:
        """Store the status, the body and the headers.

        Args:
            status: HTTP status.
            message: one line for people.
            code: one word for programs.
            type: type of the error in the OpenAI interface.
            param: name of the field that is wrong.
            headers: further headers.
            more: further entries of the error, such as `moderation_details`.
        """
        super().__init__(message)
        self.status, self.code, self.type, self.param = status, code, type, param
        self.headers, self.more = headers or {}, more or {}
        self.extension: dict[str, Any] = {}
        """Entries of the object `safegen` beside the error."""


def answer_error(answer: Answer) -> RequestError | None:
    """Return the error of a request of which no image is released; None if one is.

    A fault counts more than a block: 503 if an image was withheld because something failed, else
    400 with the code `moderation_blocked`.
    """
    if answer.released:
        return None
    failed = [o for o in answer.outcomes if o.status == "fault"]
    outcome, request = (failed or list(answer.outcomes))[0], answer.request
    if failed:
        error = RequestError(
            503,
            f"no image, since a check could not run: {outcome.reason} (request {request.id})",
            code="guard_failed",
            type=FAILED,
        )
    else:
        given = "prompt" if request.start is None else "prompt or start image"
        source = given if outcome.stage == "input" else "generated image"
        names = ", ".join(outcome.categories)
        error = RequestError(
            400,
            f"the {source} was blocked: {names} (request {request.id})",
            code="moderation_blocked",
            type=BLOCKED,
            param="prompt",
            more={
                "moderation_details": {
                    "moderation_stage": outcome.stage,
                    "categories": list(outcome.categories),
                }
            },
        )
    error.extension = {"request_id": request.id, **outcome_json(outcome)}
    error.extension["images"] = [outcome_json(o, i) for i, o in enumerate(answer.outcomes)]
    return error


def outcome_json(outcome: Outcome, index: int | None = None) -> dict[str, Any]:
    """Return what a client may know of an outcome as plain values, without the image."""
    return {
        **({} if index is None else {"index": index}),
        "seed": outcome.seed,
        "status": outcome.status,
        "action": outcome.trace.action,
        "stage": outcome.stage,
        "guard": outcome.guard or None,
        "reason": outcome.reason or None,
        "judge": outcome.judge,
        "score": _finite(outcome.score),
        "threshold": _finite(outcome.threshold),
        "categories": list(outcome.categories),
        "guards": [{"guard": r.guard, "action": r.action} for r in outcome.trace.guards],
    }


def _finite(number: float | None) -> float | None:
    """Return a number that JSON has; None otherwise."""
    return number if number is not None and math.isfinite(number) else None


def to_request_error(error: Exception) -> RequestError:
    """Return an exception of the service as an error of a request."""
    if isinstance(error, RequestError):
        return error
    text, headers = str(error), dict[str, str]()
    status, code, kind = 500, "internal_error", FAILED
    if isinstance(error, UserError):
        unknown = isinstance(error, UnknownNameError)
        status, code = (404, "not_found") if unknown else (400, "invalid_value")
        kind = INVALID
    elif isinstance(error, QueueFullError):
        status, code, kind = 429, "queue_full", "rate_limit_error"
        headers = {"Retry-After": str(error.retry_after)}
    elif isinstance(error, RateLimitError):
        status, code, kind = 429, "rate_limit_exceeded", "rate_limit_error"
        headers = {"Retry-After": str(error.retry_after)}
    elif isinstance(error, DrainingError):
        status, code = 503, "draining"
        headers = {"Retry-After": "5", "Connection": "close"}
    elif isinstance(error, UpstreamError):
        status, code = 504 if error.is_timeout else 502, "upstream_error"
    elif isinstance(error, EngineFaultError):
        status, code = 503, "engine_failed"
    else:
        logger.error("a request failed", exc_info=error)
        text = "internal error"
    return RequestError(status, text, code=code, type=kind, headers=headers)


def to_response(error: RequestError) -> JSONResponse:
    """Return an error as a response: OpenAI's `error`, A1111's `detail`, and `safegen`."""
    text, param = _encodable(str(error)), error.param and _encodable(error.param)
    body = {"message": text, "type": error.type, "param": param, "code": error.code}
    content: dict[str, Any] = {"error": body | error.more, "detail": text}
    if error.extension:
        content["safegen"] = error.extension
    return JSONResponse(content, error.status, headers=error.headers)


def _encodable(text: str) -> str:
    """Return a text with escapes for halves of surrogate pairs, which a client's names may have."""
    return text.encode(errors="backslashreplace").decode()


def explain_validation(error: RequestValidationError) -> RequestError:
    """Return the first error of a request's fields in one line."""
    detail = error.errors()[0]
    path = ".".join(str(part) for part in detail["loc"][1:])
    message = str(detail["msg"]).removeprefix("Value error, ")
    message = message.replace("Input should ", "must ", 1)
    value = repr(detail.get("input"))[:80]
    text = f"{path or 'the body'} {message}" if message.startswith("must ") else message
    got = f", got {value}" if detail["type"] not in ("missing", "json_invalid") else ""
    return RequestError(400, f"{text}{got}", code="invalid_value", param=path or None)


def add_handlers(app: FastAPI) -> None:
    """Make an app answer every exception with an error of this module."""

    async def handle(request: Request, error: Exception) -> JSONResponse:
        return to_response(to_request_error(error))

    async def handle_validation(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return to_response(explain_validation(error))

    async def handle_http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
        text, headers = str(error.detail), dict(error.headers or {})
        if text == "Not Found":
            text = f"no route {request.url.path[:100]!r}. {ROUTES}"
        return to_response(RequestError(error.status_code, text, code=code, headers=headers))

    known = (RequestError, UserError, QueueFullError, RateLimitError, DrainingError)
    for kind in (*known, EngineFaultError, Exception):
        app.add_exception_handler(kind, handle)
    app.add_exception_handler(RequestValidationError, handle_validation)
    app.add_exception_handler(HTTPException, handle_http)
