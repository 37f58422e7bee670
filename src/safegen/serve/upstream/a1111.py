"""Adapter of servers with A1111's interface: AUTOMATIC1111, Forge, SD.Next and others."""

from __future__ import annotations

import asyncio
import base64
import json
from typing import Any

from safegen.serve.engine.base import UpstreamError
from safegen.serve.messages import ImageRequest
from safegen.serve.upstream.images import decode_base64
from safegen.serve.upstream.transport import UpstreamBlockError, UpstreamClient

TXT2IMG, IMG2IMG = "/sdapi/v1/txt2img", "/sdapi/v1/img2img"


class A1111Upstream:
    """Requests in A1111's interface: one per run of consecutive seeds, which it counts itself."""

    probe_path = "/sdapi/v1/samplers"

    def __init__(self, client: UpstreamClient) -> None:
        """Store the connection."""
        self.client = client

    async def generate(self, request: ImageRequest) -> list[bytes | UpstreamBlockError]:
        """Return one image file, or the block of the other server, per seed.

        Raises:
            UserError: the other server refuses the request.
            EngineFaultError, QueueFullError: there is no image; see `UpstreamClient`.
        """
        files: list[bytes | UpstreamBlockError] = []
        for seed, n in split_seeds(request.seeds):
            body = await asyncio.to_thread(build_body, request, seed, n, self.client.config.model)
            path = TXT2IMG if request.start is None else IMG2IMG
            try:
                content = await self.client.post(path, body=body)
            except UpstreamBlockError as block:
                files += [block] * n
                continue
            files += await asyncio.to_thread(read_answer, content, n)
        return files


def read_answer(content: dict[str, Any], n: int) -> list[bytes | UpstreamBlockError]:
    """Return one image file, or the block of the other server, per image. Takes a thread.

    Raises:
        UpstreamError: it has another number of images, or a check there could not run.
    """
    images = content.get("images")
    if not isinstance(images, list):
        raise UpstreamError("the other server answered without a list of images")
    if len(images) != n:
        raise UpstreamError(f"the other server answered with {len(images)} images for {n}")
    blocks = read_blocks(content.get("info"), n)
    return [b or decode_base64(image) for b, image in zip(blocks, images, strict=True)]


def read_blocks(info: object, n: int) -> list[UpstreamBlockError | None]:
    """Return the block of each image that the other server has replaced; None for the others.

    A server that covers an image answers with 200, and says so in `info` at most: safegen under
    `safegen`, filters of A1111 and SD.Next as `nsfw` among `extra_generation_params`.

    Raises:
        UpstreamError: a check of the other server could not run, or it does not list each image.
    """
    try:
        values = json.loads(info) if isinstance(info, str) else info
    except (ValueError, RecursionError):
        return [None] * n
    if not isinstance(values, dict):
        return [None] * n
    extra = values.get("extra_generation_params")
    found = [v for k, v in extra.items() if k.lower() == "nsfw"] if isinstance(extra, dict) else []
    flags: list[object] = [False] * n
    for value in found:
        flags = value if isinstance(value, list) and len(value) == n else [value] * n
    blocks = [UpstreamBlockError("output") if flag else None for flag in flags]
    if "safegen" not in values:
        return blocks
    own = values["safegen"]
    entries = own.get("images") if isinstance(own, dict) else None
    if not isinstance(entries, list) or len(entries) != n:
        raise UpstreamError("the other server answered without the state of each image")
    return [_read_block(entry) or block for entry, block in zip(entries, blocks, strict=True)]


def _read_block(entry: object) -> UpstreamBlockError | None:
    """Return the block of an image that another safegen lists; None if it is released."""
    values = entry if isinstance(entry, dict) else {}
    if values.get("status") == "released":
        return None
    if values.get("status") != "blocked":
        raise UpstreamError("the other server withheld an image, since a check could not run")
    return UpstreamBlockError("input" if values.get("stage") == "input" else "output")


def split_seeds(seeds: tuple[int, ...]) -> list[tuple[int, int]]:
    """Return the runs of consecutive seeds: the first one and their number."""
    runs: list[tuple[int, int]] = []
    for seed in seeds:
        if runs and seed == sum(runs[-1]):
            runs[-1] = runs[-1][0], runs[-1][1] + 1
        else:
            runs.append((seed, 1))
    return runs


def build_body(request: ImageRequest, seed: int, n: int, model: str | None) -> dict[str, Any]:
    """Return the fields of a request. No field of the client passes by itself.

    Args:
        request: the request.
        seed: seed of the first image.
        n: number of images.
        model: checkpoint of the other server.
    """
    config, start = request.generation_config, request.start
    body: dict[str, Any] = {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt or None,
        "seed": seed,
        "batch_size": n,
        "n_iter": 1,
        "steps": request.chosen_setting("num_inference_steps"),
        "cfg_scale": request.chosen_setting("guidance_scale"),
        "width": config.width,
        "height": config.height,
        "sampler_name": config.scheduler,
        "send_images": True,
        "save_images": False,
        "do_not_save_grid": True,  # a grid would be one image more
        "override_settings": {"sd_model_checkpoint": model} if model else None,
    }
    if start is not None:
        body |= {"init_images": [_encode(start.image)], "denoising_strength": start.strength}
        if start.mask is not None:  # white is redrawn, from the image itself, at its own size
            body |= {
                "mask": _encode(start.mask),
                "inpainting_mask_invert": 0,
                "inpainting_fill": 1,
                "inpaint_full_res": False,
            }
    return {name: value for name, value in body.items() if value is not None}


def _encode(data: bytes) -> str:
    return base64.b64encode(data).decode()
