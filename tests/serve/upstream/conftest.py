"""Another image server on loopback, with both interfaces, and requests through a proxy."""

from __future__ import annotations

import asyncio
import base64
import functools
import io
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from PIL import Image, PngImagePlugin

from safegen.core.generation import GenerationConfig
from safegen.serve.config import ServerConfig, UpstreamConfig
from safegen.serve.errors import answer_error, to_request_error
from safegen.serve.messages import ImageRequest
from safegen.serve.operations.audit import AuditLog
from safegen.serve.service import ImageService
from safegen.serve.upstream import transport
from safegen.serve.upstream.engine import ProxyEngine

KINDS = ("openai", "a1111")


def noise(seed: int, size=(64, 64)) -> Image.Image:
    """Return the other server's image of a seed."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 200, (size[1], size[0], 3), dtype=np.uint8))


def png(image: Image.Image) -> bytes:
    """Return an image as a PNG file with the metadata that A1111 writes."""
    info, buffer = PngImagePlugin.PngInfo(), io.BytesIO()
    info.add_text("parameters", "a secret prompt")
    image.save(buffer, format="PNG", pnginfo=info, icc_profile=b"a profile")
    return buffer.getvalue()


def b64(data: bytes) -> str:
    """Return bytes in base64."""
    return base64.b64encode(data).decode()


class OtherServer:
    """App with both interfaces. It records its requests; `answer` replaces its answers."""

    def __init__(self) -> None:
        self.requests, self.gets, self.answer, self.files = [], [], None, {}
        self.url, self.is_released, self.num_left = "", False, 0
        self.app = FastAPI()
        for path in ("/v1/images/generations", "/v1/images/edits"):
            self.app.post(path)(self._openai)
        for path in ("/sdapi/v1/txt2img", "/sdapi/v1/img2img"):
            self.app.post(path)(self._a1111)
        self.app.get("/{path:path}")(self._get)

    async def _openai(self, request: Request):
        return await self._respond("openai", request)

    async def _a1111(self, request: Request):
        return await self._respond("a1111", request)

    async def _respond(self, kind: str, request: Request):
        if request.headers["content-type"].startswith("multipart/"):
            async with request.form() as form:
                fields = {k: v if isinstance(v, str) else await v.read() for k, v in form.items()}
        else:
            fields = await request.json()
        self.requests.append((request.url.path, dict(request.headers), fields))
        if self.answer is not None:
            return self.answer(kind, fields)
        if "hang" in fields["prompt"]:
            await self._hang(request)
        return self.respond(kind, [b64(png(image)) for image in self.images(kind, fields)])

    async def _hang(self, request: Request) -> None:
        """Wait until the test releases the request, or its client leaves."""
        while not self.is_released:
            if await request.is_disconnected():
                self.num_left += 1
                return
            await asyncio.sleep(0.01)

    @staticmethod
    def respond(kind: str, images: list, **options) -> JSONResponse:
        """Return the response with base64 texts in the shape of an interface."""
        if kind == "a1111":
            return JSONResponse({"images": images, "parameters": {}, "info": "{}"}, **options)
        return JSONResponse({"created": 1, "data": [{"b64_json": i} for i in images]}, **options)

    @staticmethod
    def images(kind: str, fields: dict) -> list[Image.Image]:
        """Return the images of a request; red ones, which the guard covers, for `grinning`."""
        size = int(fields.get("width") or 64), int(fields.get("height") or 64)
        if kind == "openai" and fields.get("size"):
            size = tuple(int(side) for side in fields["size"].split("x"))
        n = int(fields["n"] if kind == "openai" else fields["batch_size"])
        if "grinning" in fields["prompt"]:
            return [Image.new("RGB", size, "red")] * n
        return [noise(int(fields.get("seed", 0)) + k, size) for k in range(n)]

    async def _get(self, path: str, request: Request):
        self.gets.append((f"/{path}", dict(request.headers)))
        return self.files[path]() if path in self.files else JSONResponse({"data": []})


class FakeChecker:
    """Guards without a process: those of the shared fake engine."""

    def __init__(self, fake) -> None:
        self.fake, self.seen, self.num_workers = fake, [], 1
        (info,) = fake.stacks.values()
        self.info = replace(info, name="upstream", size=(0, 0))

    async def start(self):
        return self.info

    async def check_prompts(self, prompts):
        return await self.fake.check_prompts("", prompts)

    async def check_images(self, images, prompts):
        self.seen += images
        return await self.fake.check_images("", images, prompts)

    async def stop(self):
        self.num_workers = 0


@dataclass
class Result:
    """What a client gets: the released images, or an error."""

    status: int
    images: list = field(default_factory=list)
    error: object = None
    answer: object = None

    @property
    def message(self) -> str:
        """The text of the error."""
        return str(self.error)


def make_request(prompt="a castle", *, n=1, seed=7, start=None, negative_prompt=None, **settings):
    """Return a request; settings that are not given are left to the server."""
    names = {"num_inference_steps", "guidance_scale"}
    return ImageRequest(
        id="request-1",
        prompt=prompt,
        stack="upstream",
        seeds=tuple(range(seed, seed + n)),
        generation_config=GenerationConfig(**settings),
        negative_prompt=negative_prompt,
        start=start,
        unset=frozenset(names - settings.keys()),
    )


async def send(engine, request) -> Result:
    """Return what a client gets for a request."""
    service = ImageService(engine, engine.config, AuditLog(None, log_prompts=False))
    try:
        answer = await service.generate(request)
    except Exception as error:
        found = to_request_error(error)
        return Result(found.status, error=found)
    error = answer_error(answer)
    images = [outcome.image for outcome in answer.released]
    return Result(error.status if error else 200, images, error, answer)


@pytest.fixture(scope="module", autouse=True)
def _shared_certificates():
    """Read the certificates of the system once: that takes longer than most of these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transport, "_tls_context", functools.cache(transport._tls_context))
        yield


@pytest.fixture(scope="module")
def other_server(serving_app):
    """Return a running server, shared by the tests of a module."""
    other = OtherServer()
    with serving_app(other.app) as other.url:
        yield other


@pytest.fixture
def other(other_server):
    """Yield the running server, as new."""
    other_server.requests.clear()
    other_server.gets.clear()
    other_server.files.clear()
    other_server.answer, other_server.is_released, other_server.num_left = None, False, 0
    yield other_server
    other_server.is_released = True


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    """Return the interface of the other server."""
    return request.param


@pytest.fixture
def make_config(other, kind):
    """Return a builder of settings in front of the other server."""

    def build(**options) -> ServerConfig:
        names = ServerConfig.model_fields.keys() - UpstreamConfig.model_fields.keys()
        own = {k: options.pop(k) for k in list(options) if k in names}
        upstream = UpstreamConfig(**{"url": other.url, "kind": kind, "timeout": 5} | options)
        return ServerConfig(upstream=upstream, **{"guards": ("judge-filter",)} | own)

    return build


@pytest.fixture
def checker(engine) -> FakeChecker:
    """Return guards without a process."""
    return FakeChecker(engine)


@pytest.fixture
def generate(make_config, checker):
    """Return a function that sends a request through a proxy, and returns what a client gets."""

    def run(prompt="a castle", *, options=None, guards=None, **request) -> Result:
        async def work() -> Result:
            engine = ProxyEngine(make_config(**options or {}), guards or checker)
            await engine.start()
            try:
                return await send(engine, make_request(prompt, **request))
            finally:
                await engine.stop()

        return asyncio.run(work())

    return run


@pytest.fixture
def tools():
    """Return the helpers of this file."""
    from types import SimpleNamespace

    return SimpleNamespace(b64=b64, png=png, noise=noise, send=send, make_request=make_request)
