"""Bodies of the A1111 interface as requests of the service."""

from __future__ import annotations

import asyncio
import base64
from dataclasses import replace

from PIL import Image, ImageOps

from safegen.core.errors import ConfigError, UnknownNameError
from safegen.core.settings import MAX_NAME
from safegen.serve.a1111.bodies import Img2ImgBody, Txt2ImgBody
from safegen.serve.a1111.infotext import requested_size
from safegen.serve.errors import RequestError
from safegen.serve.images import flatten, read_upload, to_png
from safegen.serve.messages import ImageRequest, StackInfo, StartImage
from safegen.serve.requests import build_request, check_strength
from safegen.serve.service import ImageService

SCHEDULES = {"automatic": "", "uniform": "", "normal": "", "karras": " Karras"}
"""Noise schedules, with what each adds to the name of a sampler: the model's own, or Karras'."""
CROP = 1
"""Value of `resize_mode` that crops the image; 0 stretches it."""
OPAQUE = 128
"""Alpha above which a pixel of a mask with an alpha channel is redrawn, as in A1111."""


async def build_image_request(
    service: ImageService, body: Txt2ImgBody, request_id: str
) -> ImageRequest:
    """Return the request of a body.

    Raises:
        RequestError: a field has a value that the service does not offer.
        UserError: a field breaks its rule or a limit.
    """
    body.refuse_unsupported()
    stack = service.stack(body.checkpoint)
    request = build_request(
        service,
        id=request_id,
        prompt=body.prompt,
        stack=stack.name,
        n=body.count,
        seed=None if body.seed is None or body.seed < 0 else body.seed,
        steps=body.steps,
        guidance=body.cfg_scale,
        width=body.width,
        height=body.height,
        scheduler=find_sampler(body, stack),
        negative_prompt=body.negative_prompt or None,
    )
    if not isinstance(body, Img2ImgBody):
        return request
    size, side = requested_size(request, stack), service.config.limits.side
    start = await asyncio.to_thread(read_start, body, size, side)
    check_strength(start.strength, request.generation_config.num_inference_steps)
    return replace(request, start=start)


def find_sampler(body: Txt2ImgBody, stack: StackInfo) -> str | None:
    """Return the name of the scheduler that a body names in two fields; None for the model's own.

    Raises:
        RequestError: the stack has no such sampler or schedule.
    """
    schedule = (body.scheduler or "automatic")[:MAX_NAME]
    if schedule.lower() not in SCHEDULES:
        error = UnknownNameError("schedule", schedule, SCHEDULES)
        raise RequestError(400, str(error), code="invalid_value", param="scheduler")
    end = SCHEDULES[schedule.lower()]
    default = stack.sampler if end else ""
    name = (body.sampler_name or body.sampler_index or default)[:MAX_NAME]
    if end and not name.endswith(end):
        name += end
    known = {sampler.lower() for sampler in stack.samplers}
    if name and known and name.lower() not in known:
        error = UnknownNameError("sampler", name, stack.samplers)
        raise RequestError(400, str(error), code="invalid_value", param="sampler_name")
    return name or None


def read_start(body: Img2ImgBody, size: tuple[int, int], side: int) -> StartImage:
    """Return the image and the mask that a body has.

    Args:
        body: the body.
        size: width and height of the images that are requested; 0 if another server chooses.
        side: most pixels of a side of the image and of the mask.

    Raises:
        ConfigError: they are missing, damaged or too large.
    """
    images = body.init_images or []
    if len(images) != 1:
        raise ConfigError(f"init_images must have one image, got {len(images)}")
    image = flatten(read_upload(_decode("init_images", images[0]), side=side, name="init_images"))
    mask = None
    if body.mask:
        mask = read_mask(read_upload(_decode("mask", body.mask), side=side, name="mask"))
        mask = ImageOps.invert(mask) if body.inpainting_mask_invert else mask
    if body.resize_mode == CROP and all(size):
        mask = ImageOps.fit(mask.resize(image.size), size) if mask else None
        image = ImageOps.fit(image, size)
    strength = Img2ImgBody.model_fields["denoising_strength"].default
    return StartImage(
        image=to_png(image),
        strength=strength if body.denoising_strength is None else body.denoising_strength,
        mask=to_png(mask) if mask else None,
    )


def read_mask(mask: Image.Image) -> Image.Image:
    """Return a mask as A1111 reads it: white, or opaque in a mask with transparent parts."""
    if not mask.has_transparency_data:
        return mask.convert("L")
    alpha = mask.convert("RGBA").getchannel("A")
    if alpha.getextrema() == (255, 255):
        return mask.convert("L")
    return alpha.point(lambda value: 255 if value > OPAQUE else 0)


def _decode(name: str, text: str) -> bytes:
    """Return the bytes of a field in Base64, with or without the head of a data URL."""
    head, comma, tail = text.partition(",")
    try:
        return base64.b64decode("".join((tail if comma else head).split()), validate=True)
    except ValueError as error:
        raise ConfigError(
            f"{name} must be a file in Base64, got {text[:20]!r}. Addresses are not fetched."
        ) from error
