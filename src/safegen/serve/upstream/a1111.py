"""Adapter of servers with A1111's interface: AUTOMATIC1111, Forge, SD.Next and others."""

from __future__ import annotations

import asyncio
import base64
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
            images = content.get("images")
            if not isinstance(images, list):
                raise UpstreamError("the other server answered without a list of images")
            if len(images) != n:
                raise UpstreamError(f"the other server answered with {len(images)} images for {n}")
            files += [await asyncio.to_thread(decode_base64, image) for image in images]
        return files


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
