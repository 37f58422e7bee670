"""Adapter of servers with the OpenAI Images interface: vLLM-Omni, SGLang and others."""

from __future__ import annotations

import asyncio
import io
from typing import Any

from PIL import Image

from safegen.core.errors import ConfigError
from safegen.serve.engine.base import UpstreamError
from safegen.serve.messages import ImageRequest, StartImage
from safegen.serve.upstream.images import decode_base64
from safegen.serve.upstream.transport import UpstreamBlockError, UpstreamClient

GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"
HALF = 128
"""Level from which on a mask is redrawn."""


class OpenAIUpstream:
    """Requests in the OpenAI Images interface, one per image.

    Servers make the further images of one request from another seed each in their own way, so
    each image is a request with its own seed.
    """

    probe_path = "/v1/models"

    def __init__(self, client: UpstreamClient) -> None:
        """Store the connection."""
        self.client = client

    async def generate(self, request: ImageRequest) -> list[bytes | UpstreamBlockError]:
        """Return one image file, or the block of the other server, per seed.

        Raises:
            UserError: the request cannot be sent, or the other server refuses it.
            EngineFaultError, QueueFullError: there is no image; see `UpstreamClient`.
        """
        files = await asyncio.to_thread(build_files, request.start) if request.start else None
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._generate_one(request, seed, files))
                    for seed in request.seeds
                ]
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from errors
        return [task.result() for task in tasks]

    async def _generate_one(
        self, request: ImageRequest, seed: int, files: dict[str, tuple[str, bytes, str]] | None
    ) -> bytes | UpstreamBlockError:
        """Return the image file of one seed."""
        body = build_body(request, seed, self.client.config.model, self.client.config.omit)
        try:
            if files is None:
                content = await self.client.post(GENERATIONS, body=body)
            else:
                form = {name: str(value) for name, value in body.items()}
                content = await self.client.post(EDITS, form=form, files=files)
        except UpstreamBlockError as block:
            return block
        data = content.get("data")
        if not isinstance(data, list) or not all(isinstance(entry, dict) for entry in data):
            raise UpstreamError("the other server answered without a list of images")
        if len(data) != 1:
            raise UpstreamError(f"the other server answered with {len(data)} images for 1")
        encoded, url = data[0].get("b64_json"), data[0].get("url")
        if encoded is None and isinstance(url, str):
            return await self._read_url(url)
        return await asyncio.to_thread(decode_base64, encoded)

    async def _read_url(self, url: str) -> bytes:
        """Return the bytes of a `data:` address, or what is fetched from another one."""
        if url.startswith("data:"):
            return await asyncio.to_thread(decode_base64, url)
        return await self.client.fetch(url)


def build_body(
    request: ImageRequest, seed: int, model: str | None, omit: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Return the fields of a request for one image. No field of the client passes by itself.

    Args:
        request: the request.
        seed: seed of the image.
        model: model of the other server.
        omit: fields to leave out.

    Raises:
        ConfigError: it has a width or a height alone.
    """
    config = request.generation_config
    if (config.width is None) != (config.height is None):
        raise ConfigError("width and height must be given together for this server")
    body: dict[str, Any] = {
        "prompt": request.prompt,
        "model": model,
        "n": 1,
        "size": f"{config.width}x{config.height}" if config.width else None,
        "response_format": "b64_json",
        "seed": seed,
        "num_inference_steps": request.chosen_setting("num_inference_steps"),
        "guidance_scale": request.chosen_setting("guidance_scale"),
        "negative_prompt": request.negative_prompt or None,
    }
    return {name: v for name, v in body.items() if v is not None and name not in omit}


def build_files(start: StartImage) -> dict[str, tuple[str, bytes, str]]:
    """Return the files of an edit. A mask is transparent where the image is redrawn."""
    files = {"image": ("image.png", start.image, "image/png")}
    if start.mask is not None:
        with Image.open(io.BytesIO(start.mask), formats=["PNG"]) as image:
            opaque = image.convert("L").point(lambda value: 0 if value >= HALF else 255)
        mask, buffer = Image.new("RGBA", opaque.size, "white"), io.BytesIO()
        mask.putalpha(opaque)
        mask.save(buffer, format="PNG")
        files["mask"] = ("mask.png", buffer.getvalue(), "image/png")
    return files
