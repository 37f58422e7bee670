"""Routes of the A1111 interface: those of `/sdapi/v1` that its clients need."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from safegen.serve.a1111.bodies import Img2ImgBody, Txt2ImgBody
from safegen.serve.a1111.requests import SCHEDULES, build_image_request
from safegen.serve.a1111.responses import (
    images_response,
    model_response,
    options_response,
    progress_response,
)
from safegen.serve.a1111.running import Running, RunningRequests
from safegen.serve.errors import RequestError, answer_error
from safegen.serve.http import Client, RequestId, Service, run_for_client
from safegen.serve.service import ImageService

router = APIRouter(prefix="/sdapi/v1", tags=["a1111"])


@router.post("/txt2img")
async def txt2img(
    body: Txt2ImgBody,
    request: Request,
    service: Service,
    client: Client,
    request_id: RequestId,
    running: Running,
) -> dict[str, Any]:
    """Return images of a prompt."""
    work = _generate(body, service, client, request_id, running)
    return await run_for_client(request, work)


@router.post("/img2img")
async def img2img(
    body: Img2ImgBody,
    request: Request,
    service: Service,
    client: Client,
    request_id: RequestId,
    running: Running,
) -> dict[str, Any]:
    """Return images of a prompt that start from an image."""
    work = _generate(body, service, client, request_id, running)
    return await run_for_client(request, work)


async def _generate(
    body: Txt2ImgBody, service: ImageService, client: str, request_id: str, running: RunningRequests
) -> dict[str, Any]:
    """Return the response with the images of a body."""
    image_request = await build_image_request(service, body, request_id)
    work = service.generate(image_request, client=client)
    answer = await running.run(image_request, client, work)
    if (error := answer_error(answer)) is not None:
        raise error
    send_images = body.send_images is not False
    async with service.record_failure(answer, client):
        return await images_response(
            answer, batch_size=body.batch_size or 1, send_images=send_images
        )


@router.post("/interrupt")
async def interrupt(client: Client, running: Running) -> dict[str, Any]:
    """Cancel the requests of the same token in this interface; without tokens, all of them."""
    running.interrupt(client)
    return {}


@router.get("/progress")
async def progress(service: Service, client: Client, running: Running) -> dict[str, Any]:
    """Return how far the requests of the same token are."""
    jobs = running.of_client(client)
    done = service.engine.progress(jobs[0].request.id) if jobs else None
    return progress_response(jobs, done)


@router.get("/options")
async def get_options(service: Service) -> dict[str, Any]:
    """Return the settings that clients read; the checkpoint is the default stack."""
    return options_response(service.stack())


@router.post("/options")
async def set_options(options: dict[str, Any], service: Service) -> dict[str, Any]:
    """Accept settings that are as they were, and refuse all others: they are the operator's."""
    current = options_response(service.stack())
    for name, value in options.items():
        if name not in current:
            raise _refuse_option(f"{name[:80]!r} must be left out, got {repr(value)[:80]}", None)
        if value != current[name]:
            rule = f"{name} must be {current[name]!r}, got {repr(value)[:80]}"
            raise _refuse_option(rule, name)
    return {}


def _refuse_option(rule: str, name: str | None) -> RequestError:
    """Return the error of an option that a client may not change."""
    message = (
        f"{rule}. Settings are the operator's; choose a stack per request by "
        "override_settings.sd_model_checkpoint."
    )
    return RequestError(400, message, code="unsupported_value", param=name)


@router.get("/sd-models")
async def get_models(service: Service) -> list[dict[str, Any]]:
    """Return the stacks, the default one first."""
    return [model_response(stack) for stack in service.stacks.values()]


@router.get("/samplers")
async def get_samplers(service: Service) -> list[dict[str, Any]]:
    """Return the samplers that a stack offers."""
    stacks = service.stacks.values()
    names = dict.fromkeys(name for stack in stacks for name in stack.samplers)
    return [{"name": name, "aliases": [], "options": {}} for name in names]


@router.get("/schedulers")
async def get_schedulers() -> list[dict[str, Any]]:
    """Return the noise schedules."""
    return [
        {
            "name": name,
            "label": name.capitalize(),
            "aliases": None,
            "default_rho": None,
            "need_inner_model": False,
        }
        for name in SCHEDULES
    ]


@router.get("/loras")
async def get_loras(service: Service) -> list[dict[str, Any]]:
    """Return the LoRAs of the stacks, which are loaded already."""
    stacks = service.stacks.values()
    names = dict.fromkeys(name for stack in stacks for name in stack.loras)
    return [{"name": name, "alias": name, "path": name, "metadata": {}} for name in names]


@router.get("/scripts")
async def get_scripts() -> dict[str, list[str]]:
    """Return the names of scripts: none."""
    return {"txt2img": [], "img2img": []}


@router.get("/upscalers")
async def get_upscalers() -> list[dict[str, Any]]:
    """Return the names of upscalers: the one that does nothing."""
    return [{"name": "None", "model_name": None, "model_path": None, "model_url": None, "scale": 1}]


@router.get("/face-restorers")
@router.get("/hypernetworks")
@router.get("/latent-upscale-modes")
@router.get("/prompt-styles")
@router.get("/realesrgan-models")
@router.get("/script-info")
@router.get("/sd-vae")
async def get_nothing() -> list[dict[str, Any]]:
    """Return an empty list, which clients need for their menus."""
    return []
