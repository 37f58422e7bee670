"""Edits of the OpenAI interface: uploads of OpenAI's client as a start of the engine."""

from __future__ import annotations

import io
import json
import socket
import time

import httpx2
import numpy as np
import pytest
from PIL import Image

openai = pytest.importorskip("openai")

from safegen.serve.config import RequestLimits, ServerConfig  # noqa: E402
from safegen.serve.openai.forms import add_field  # noqa: E402
from tests.serve.conftest import STACK, FakeEngine, serving  # noqa: E402


@pytest.fixture(scope="module")
def engine():
    return FakeEngine((STACK,))


@pytest.fixture(scope="module")
def address(engine):
    config = ServerConfig(stacks=("fake",), limits=RequestLimits(images=4, steps=50, side=128))
    with serving(config, engine) as found:
        yield found


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(api_key="none", base_url=f"{address}/v1", max_retries=0, timeout=20) as it:
        yield it


def upload(image=None, kind="PNG", **options):
    """Return a file as the client takes it."""
    buffer = io.BytesIO()
    (image or Image.new("RGB", (32, 24), (10, 200, 30))).save(buffer, format=kind, **options)
    return f"image.{kind.lower()}", buffer.getvalue(), f"image/{kind.lower()}"


def hole():
    """Return a mask with a transparent left half."""
    mask = Image.new("RGBA", (32, 24), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (0, 0, 16, 24))
    return mask


def read(png):
    return Image.open(io.BytesIO(png), formats=["PNG"])


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_an_upload_reaches_the_engine_as_png(client, engine, kind):
    response = client.images.edit(image=upload(kind=kind), prompt="a castle")
    start = engine.requests[-1].start
    assert read(start.image).size == (32, 24)
    near = np.abs(np.asarray(read(start.image)).astype(int) - (10, 200, 30))
    assert near.max() < 8
    assert (start.strength, start.mask) == (0.8, None)
    assert response.data[0].b64_json


def test_the_transparent_part_of_a_mask_is_redrawn(client, engine):
    client.images.edit(image=upload(), mask=upload(hole()), prompt="a castle", n=2)
    request = engine.requests[-1]
    mask = np.asarray(read(request.start.mask))
    assert (mask[:, :16] == 255).all()
    assert (mask[:, 16:] == 0).all()
    assert request.start.strength == 1.0
    assert len(request.seeds) == 2


def test_settings_come_as_fields_in_brackets_or_as_json(client, engine, address):
    client.images.edit(
        image=upload(),
        prompt="a castle",
        size="64x32",
        extra_body={"safegen": {"strength": 0.5, "seed": 7, "negative_prompt": "fog"}},
    )
    request = engine.requests[-1]
    assert (request.start.strength, request.seeds, request.negative_prompt) == (0.5, (7,), "fog")
    assert request.generation_config.width == 64
    data = {"prompt": "a castle", "safegen": json.dumps({"strength": 0.25}), "n": "2"}
    name, content, kind = upload()
    answer = httpx2.post(
        f"{address}/v1/images/edits", data=data, files={"image": (name, content, kind)}
    )
    assert answer.status_code == 200, answer.text
    assert engine.requests[-1].start.strength == 0.25


def test_an_edit_streams_its_own_event(client):
    stream = client.images.edit(image=upload(), prompt="a castle", stream=True)
    assert [event.type for event in stream] == ["image_edit.completed"]


def test_an_upload_that_the_guards_block_is_blocked_at_the_input(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.edit(
            image=upload(Image.new("RGB", (8, 8), (255, 0, 0))),
            prompt="a castle",
            n=2,
            extra_body={"safegen": {"seed": 5}},
        )
    assert caught.value.code == "moderation_blocked"
    listed = caught.value.response.json()["safegen"]["images"]
    assert [(image["index"], image["seed"]) for image in listed] == [(0, 5), (1, 6)]
    assert caught.value.body["moderation_details"]["moderation_stage"] == "input"
    with pytest.raises(openai.InternalServerError) as caught:  # the judge fails on one pixel
        client.images.edit(image=upload(Image.new("RGB", (1, 1))), prompt="a castle")
    assert (caught.value.status_code, caught.value.code) == (503, "guard_failed")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image": [upload(), upload()]}, "image must be one file, got 2 files"),
        ({"image": ("x.png", b"no image", "image/png")}, "image must be a readable PNG"),
        ({"image": upload(Image.new("RGB", (129, 8)))}, "at most 128 pixels per side, got 129x8"),
        ({"mask": upload()}, "mask must have an alpha channel"),
        ({"mask": upload(hole().resize((8, 8)))}, "mask must have the size of the image, 32x24"),
        ({"markup": upload()}, "markup must be left out"),
        ({"size": "big"}, "size must be auto or WIDTHxHEIGHT"),
        ({"extra_body": {"safegen": {"strength": 0}}}, "safegen.strength must be greater than 0"),
        ({"extra_body": {"safegen": {"strength": 0.01}}}, "strength must be at least 1 / 25 steps"),
        ({"extra_body": {"safegen": {"strenght": 1}}}, "Did you mean 'strength'?"),
        ({"extra_body": {"safegen": "seed"}}, "safegen must be a JSON object"),
        ({"extra_body": {"use_guardrails": False}}, "use_guardrails must not turn a guard off"),
        ({"extra_body": {"extra_params": {"guardrails": False}}}, "extra_params.guardrails must"),
        ({"partial_images": 1, "stream": True}, "partial_images must be 0"),
    ],
)
def test_an_edit_beyond_a_rule_is_refused_in_one_line(client, engine, settings, message):
    before = len(engine.requests)
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.edit(**{"image": upload(), "prompt": "a castle"} | settings)
    assert message in caught.value.body["message"]
    assert "\n" not in caught.value.body["message"]
    assert len(engine.requests) == before


@pytest.mark.parametrize(
    "request_settings",
    [
        {"json": {"prompt": "a castle"}},
        {"data": {"prompt": "a castle", "image": "text"}},
        {"files": {"image": upload()}},
        {"files": {"image": upload()}, "data": {"prompt": "x", "safegen[a][b": "1", "n": "two"}},
        {"files": {f"f{i}": upload() for i in range(30)}},
        {"content": b"--x\r\n", "headers": {"content-type": "multipart/form-data; boundary=x"}},
        {"content": b"x", "headers": {"content-type": "multipart/form-data"}},
    ],
)
def test_a_form_without_its_fields_is_refused(address, request_settings):
    answer = httpx2.post(f"{address}/v1/images/edits", **request_settings)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["message"]


def test_a_client_that_leaves_in_its_upload_is_no_fault_of_the_server(address, caplog):
    head = (
        "POST /v1/images/edits HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999\r\n"
        "Content-Type: multipart/form-data; boundary=x\r\n\r\n"
        '--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\nabc'
    )
    with caplog.at_level("INFO", "safegen.serve"):
        with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))) as channel:
            channel.sendall(head.encode())
            time.sleep(0.1)
        until, found = time.monotonic() + 5, []
        while not found and time.monotonic() < until:
            time.sleep(0.02)
            lines = [getattr(record, "fields", {}) for record in caplog.records]
            found = [fields for fields in lines if fields.get("request_bytes") == 9999]
    assert [fields["status"] for fields in found] == [499]
    assert {record.levelname for record in caplog.records} == {"INFO"}
    assert httpx2.get(f"{address}/health").status_code == 200


def test_brackets_make_objects():
    fields = {}
    for name in ("a", "b[c]", "b[d][e]", "f[", "g]h[i]", "safegen[seed]"):
        add_field(fields, name, "1")
    add_field(fields, "safegen", '{"steps": 2}')
    assert fields == {
        "a": "1",
        "b": {"c": "1", "d": {"e": "1"}},
        "f[": "1",
        "g]h": {"i": "1"},
        "safegen": {"seed": "1", "steps": 2},
    }
