"""Responses of the OpenAI Images interface."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Sequence
from typing import Any, Literal

from fastapi.responses import Response

from safegen.serve.errors import outcome_json
from safegen.serve.images import OutputFormat, encode_outcome
from safegen.serve.openai.bodies import ImageBody
from safegen.serve.service import Answer

Kind = Literal["image_generation", "image_edit"]
"""What the images came from; the first part of the name of an event."""
QUALITIES = frozenset({"low", "medium", "high", "xhigh", "max"})
"""Qualities that the client knows from a response."""


def encode_images(answer: Answer, body: ImageBody) -> list[bytes]:
    """Return the released images as files, in order. Takes a thread."""
    output_format, quality = _format(body), body.output_compression
    return [
        encode_outcome(outcome, answer, output_format, 100 if quality is None else quality)
        for outcome in answer.released
    ]


def media_type(body: ImageBody) -> str:
    """Return the media type of the images of a request."""
    return f"image/{_format(body)}"


def images_response(answer: Answer, body: ImageBody, data: Sequence[dict[str, str]]) -> Response:
    """Return the response with images. Takes a thread.

    Args:
        answer: the answer.
        body: the request.
        data: one entry per released image, with `b64_json` or `url`.
    """
    content = {"created": int(time.time()), "data": list(data), **_settings(answer, body)}
    return Response(_dump({**content, "safegen": describe_answer(answer)}), media_type=JSON)


def stream_response(
    answer: Answer, body: ImageBody, files: Sequence[bytes], kind: Kind
) -> Response:
    """Return the response with one server-sent event per released image. Takes a thread."""
    details = {"image_tokens": 0, "text_tokens": 0}
    usage = {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0}
    content = {
        "type": f"{kind}.completed",
        "created_at": int(time.time()),
        "usage": {**usage, "input_tokens_details": details},
        "quality": "auto",
        **_settings(answer, body),
        "safegen": describe_answer(answer),
    }
    events = [
        f"event: {kind}.completed\ndata: ".encode()
        + _dump({**content, "b64_json": base64.b64encode(file).decode()})
        + b"\n\n"
        for file in files
    ]
    return Response(b"".join(events), media_type="text/event-stream")


def to_base64(files: Sequence[bytes]) -> list[dict[str, str]]:
    """Return files as entries of a response. Takes a thread."""
    return [{"b64_json": base64.b64encode(file).decode()} for file in files]


def describe_answer(answer: Answer) -> dict[str, Any]:
    """Return the object `safegen` of a response: the stack, and what became of each image."""
    return {
        "request_id": answer.request.id,
        "stack": answer.stack.name,
        "stack_hash": answer.stack.hash,
        "images": [outcome_json(outcome, i) for i, outcome in enumerate(answer.outcomes)],
    }


JSON = "application/json"


def _format(body: ImageBody) -> OutputFormat:
    return body.output_format or "png"


def _settings(answer: Answer, body: ImageBody) -> dict[str, str]:
    """Return the settings that the client knows from a response."""
    image = answer.released[0].image
    assert image is not None
    quality = {"quality": body.quality} if body.quality in QUALITIES else {}
    size = f"{image.width}x{image.height}"
    return {"background": "opaque", "output_format": _format(body), "size": size, **quality}


def _dump(content: dict[str, Any]) -> bytes:
    return json.dumps(content, ensure_ascii=False, allow_nan=False).encode()
