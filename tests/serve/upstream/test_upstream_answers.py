"""Fuzz: any JSON and any bytes of another server are an image, or an error of ours."""

from __future__ import annotations

import asyncio
import io
import json
from contextlib import suppress
from types import SimpleNamespace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from safegen.core.generation import GenerationConfig
from safegen.serve.config import UpstreamConfig, is_loopback
from safegen.serve.engine.base import UpstreamError
from safegen.serve.messages import ImageRequest
from safegen.serve.upstream.a1111 import A1111Upstream, read_answer, read_blocks, split_seeds
from safegen.serve.upstream.images import decode_image
from safegen.serve.upstream.openai import OpenAIUpstream
from safegen.serve.upstream.transport import UpstreamClient, _parse

TEXTS = st.text(max_size=12) | st.sampled_from(["iVBORw0KGgo=", "data:image/png;base64,AAAA", "AA"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["b64_json", "url", "x"]), inner, max_size=3)
    ),
    max_leaves=8,
)
ANSWERS = st.dictionaries(st.sampled_from(["data", "images", "info"]), VALUES, max_size=3)
REQUEST = ImageRequest("1", "a castle", "upstream", (3, 4), GenerationConfig())
PNG = io.BytesIO()
Image.effect_noise((24, 24), 60).convert("RGB").save(PNG, format="PNG")


@given(answer=ANSWERS)
def test_any_json_gives_one_file_per_seed_or_an_error(answer):
    config = UpstreamConfig(url="http://127.0.0.1:9")

    async def post(path, **options):
        return answer

    async def fetch(url):
        UpstreamClient.check_url(client, url)
        return b"a file"

    client = SimpleNamespace(config=config, post=post, fetch=fetch, url=SHARED.url)
    for adapter in (OpenAIUpstream, A1111Upstream):
        with suppress(UpstreamError):
            files = asyncio.run(adapter(client).generate(REQUEST))
            assert len(files) == 2
            assert all(isinstance(file, bytes) for file in files)


def released_and(status, **more):
    """Return the `info` of a safegen that releases the first of two images."""
    entries = [{"status": "released", "stage": None}, {"status": status, **more}]
    return {"safegen": {"images": entries}}


@pytest.mark.parametrize(
    ("info", "stages"),
    [
        (released_and("blocked", stage="output"), [None, "output"]),
        (released_and("blocked", stage="input"), [None, "input"]),
        (released_and("released"), [None, None]),
        ({"extra_generation_params": {"nsfw": [True, False]}}, ["output", None]),
        ({"extra_generation_params": {"NSFW": True}}, ["output", "output"]),
        ({"extra_generation_params": {"NSFW": False}}, [None, None]),
        ({"extra_generation_params": {"nsfw": [True]}}, ["output", "output"]),
        ({"seed": 1}, [None, None]),
    ],
)
def test_images_that_another_server_has_replaced_are_blocks(info, stages):
    files = read_answer({"images": ["AAAA", "AAAA"], "info": json.dumps(info)}, 2)
    assert [getattr(file, "stage", None) for file in files] == stages
    assert all(file == b"\0\0\0" for file, stage in zip(files, stages, strict=True) if not stage)


@pytest.mark.parametrize(
    "info",
    [
        released_and("fault"),
        released_and("something new"),
        {"safegen": {"images": []}},
        {"safegen": None},
        {"safegen": {"images": [None, None]}},
    ],
)
def test_an_image_of_another_safegen_without_a_state_is_an_error(info):
    with pytest.raises(UpstreamError, match="the other server"):
        read_blocks(json.dumps(info), 2)


SHARED = UpstreamClient(UpstreamConfig(url="http://127.0.0.1:9"))


@given(data=st.binary(max_size=40) | st.recursive(st.just(b"1"), lambda x: x.map(b"[%b]".__mod__)))
def test_any_bytes_are_an_object_or_an_error(data):
    with suppress(UpstreamError):
        assert isinstance(_parse(data), dict)


@given(
    position=st.integers(0, len(PNG.getvalue()) - 1),
    more=st.binary(max_size=6),
    cut=st.integers(0, 40),
)
def test_any_damage_to_a_file_gives_pixels_or_an_error(position, more, cut):
    data = bytearray(PNG.getvalue())
    data[position : position + cut] = more
    with suppress(UpstreamError):
        image = decode_image(bytes(data), 64)
        assert (image.mode, image.info) == ("RGB", {})
        assert max(image.size) <= 64
        assert len(image.tobytes()) == 3 * image.width * image.height


@given(st.lists(st.integers(0, 30), min_size=1, max_size=12))
def test_runs_of_seeds_are_the_seeds_in_order(seeds):
    runs = split_seeds(tuple(seeds))
    assert [first + k for first, n in runs for k in range(n)] == seeds


PARTS = [
    *("http:", "https:", "ftp:", "//", "/", "\\", "@", ":", "#", "?", "%2f", "\t", ".", "80"),
    *("127.0.0.1", "localhost", "[::1]", "evil.example", "10.0.0.1", "0", "user", "\u3002"),
]


@example("http://127.0.0.1:99999/x.png")
@given(st.lists(st.sampled_from(PARTS) | st.text(max_size=3), max_size=8).map("".join))
def test_any_address_of_an_image_is_on_loopback_or_an_error(text):
    with suppress(UpstreamError):
        url = SHARED.check_url(text)
        assert is_loopback(url.host)
        assert url.scheme in ("http", "https")
        assert not url.userinfo
        assert (url.port or 1) <= 65_535


def test_json_of_many_values_is_refused_before_it_is_parsed(monkeypatch):
    monkeypatch.setattr(json, "loads", lambda data: pytest.fail("it was parsed"))
    with pytest.raises(UpstreamError, match="more than 200000 values"):
        _parse(b'{"more": [' + b"[]," * 200_000 + b"0]}")
