"""Property: no response of the OpenAI interface has the pixels of an image that was withheld."""

from __future__ import annotations

import base64
import binascii
import io
import json
from itertools import count

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

pytest.importorskip("fastapi")

from starlette.testclient import TestClient

from safegen.guards.core.result import (
    ACTIONS,
    BLOCKING_ACTIONS,
    REPLACING_ACTIONS,
    GeneratedImage,
    GuardRecord,
    GuardTrace,
)
from safegen.serve.app import build_app
from safegen.serve.config import ServerConfig
from tests.serve.conftest import STACK, FakeEngine, picture

WITHHOLDING = BLOCKING_ACTIONS | REPLACING_ACTIONS
NAMES = [guard.name for guard in STACK.guards]
NUMBERS = count()
"""Seed of the next image: every image is different."""
ACTION = st.sampled_from(["none", "none", "edit", *sorted(ACTIONS)])
SCORES = st.dictionaries(st.sampled_from(["skulls", "x"]), st.floats(), max_size=2)
GOOD = tuple(GuardRecord(name, calls=1) for name in NAMES)
ACTING_RECORDS = st.tuples(
    *[st.builds(GuardRecord, st.just(n), ACTION, calls=st.just(1)) for n in NAMES]
)
ANY_RECORDS = st.lists(
    st.builds(
        GuardRecord,
        guard=st.sampled_from([*NAMES, "other"]),
        action=ACTION,
        reason=st.sampled_from(["", "unsafe"]),
        scores=SCORES,
        thresholds=SCORES,
        calls=st.integers(0, 2),
    ),
    max_size=3,
).map(tuple)
TRACE = st.builds(
    GuardTrace,
    ACTION,
    st.sampled_from(["", "judge-filter: unsafe", "prompt-filter: word", "a:", ":"]),
    st.just(GOOD) | ACTING_RECORDS | ANY_RECORDS,
)
SHAPES = ["right", "right", "right", "small", "none", "array", "bytes"]


@st.composite
def generated_images(draw):
    """Return an image as an engine may return it, and its pixels."""
    shape = draw(st.sampled_from(SHAPES))
    image = picture(next(NUMBERS), (32, 32) if shape == "small" else (64, 64))
    given_image = {"none": None, "array": np.asarray(image), "bytes": image.tobytes()}.get(
        shape, image
    )
    flag = draw(st.sampled_from([None, None, False, True]))
    return GeneratedImage(given_image, draw(TRACE), flag), shape, np.asarray(image)


class FuzzedEngine(FakeEngine):
    """Engine that returns given images."""

    def __init__(self):
        super().__init__()
        self.images = []

    async def generate(self, request):
        return self.images

    async def check_images(self, stack, images, prompts):
        return [GeneratedImage(image, GuardTrace("none", "")) for image in images]


ENGINE = FuzzedEngine()
CLIENT = TestClient(
    build_app(ServerConfig(stacks=("fake",)), ENGINE),
    base_url="http://127.0.0.1",
    raise_server_exceptions=False,
)


def may_leave(generated):
    """Return whether a trace lets its image out, by the guards' rules and not by the server's."""
    trace = generated.trace
    actions = {trace.action, *(record.action for record in trace.guards)}
    ran = [record.guard for record in trace.guards if record.calls > 0]
    return not actions & WITHHOLDING and ran == NAMES and not generated.nsfw_content_detected


def strings(value):
    """Yield every string in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from strings(entry)


def images_in(response):
    """Return the pixels of every image in a response, as base64 or behind an address."""
    if response.headers["content-type"].startswith("text/event-stream"):
        lines = [line.removeprefix("data: ") for line in response.text.splitlines()]
        values = [json.loads(line) for line in lines if line.startswith("{")]
    else:
        values = response.json()
    found = []
    for text in strings(values):
        data = text
        if text.startswith("http"):
            data = base64.b64encode(CLIENT.get(text).content).decode()
        try:
            with Image.open(io.BytesIO(base64.b64decode(data, validate=True))) as image:
                found.append(np.asarray(image.convert("RGB")))
        except (binascii.Error, ValueError, OSError):
            continue
    return found


def post(route, n, options):
    """Return the response to a request for n images."""
    if route == "generations":
        return CLIENT.post("/v1/images/generations", json={"prompt": "a", "n": n, **options})
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, format="PNG")
    data = {"prompt": "a", "n": str(n), **{k: str(v) for k, v in options.items()}}
    files = {"image": ("a.png", buffer.getvalue(), "image/png")}
    return CLIENT.post("/v1/images/edits", data=data, files=files)


@settings(max_examples=100)
@given(
    st.lists(generated_images(), max_size=4),
    st.integers(1, 3),
    st.sampled_from(["generations", "edits"]),
    st.sampled_from([{}, {"response_format": "url"}, {"stream": True}]),
)
def test_a_response_has_exactly_the_images_that_no_trace_withholds(drawn, n, route, options):
    ENGINE.images = [generated for generated, _, _ in drawn]
    response = post(route, n, options)
    expected = [
        pixels
        for generated, shape, pixels in drawn
        if may_leave(generated) and shape == "right" and len(drawn) == n
    ]
    found = images_in(response)
    assert (response.status_code == 200) == bool(expected), response.text[:500]
    assert response.status_code != 500
    assert len(found) == len(expected)
    assert all((a == b).all() for a, b in zip(found, expected, strict=True))
    if response.status_code == 400:
        assert response.json()["error"]["code"] == "moderation_blocked"


@pytest.mark.parametrize("action", sorted(WITHHOLDING))
@pytest.mark.parametrize("summary", ["none", "edit"])
def test_a_record_that_withholds_counts_more_than_the_summary(action, summary):
    trace = GuardTrace(summary, "", (GOOD[0], GuardRecord(NAMES[1], action, calls=1)))
    ENGINE.images = [GeneratedImage(picture(next(NUMBERS)), trace)]
    response = post("generations", 1, {})
    assert response.status_code == 503
    assert images_in(response) == []


def test_the_property_sees_images_that_leave():
    """The search finds what is released in every form, so that it could find a leak."""
    pixels = picture(next(NUMBERS))
    ENGINE.images = [GeneratedImage(pixels, GuardTrace("none", "", GOOD))]
    for route in ("generations", "edits"):
        for options in ({}, {"response_format": "url"}, {"stream": True}):
            (found,) = images_in(post(route, 1, options))
            assert (found == np.asarray(pixels)).all()
