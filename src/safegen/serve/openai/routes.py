"""Routes of the OpenAI Images interface."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from safegen.core.errors import UnknownNameError
from safegen.serve.errors import RequestError, answer_error
from safegen.serve.http import Client, RequestId, Service, get_service, run_for_client
from safegen.serve.messages import ImageRequest, StackInfo, StartImage
from safegen.serve.openai.bodies import EditBody, GenerateBody, ImageBody, read_body, read_size
from safegen.serve.openai.forms import EDIT_FORM, read_form, read_start
from safegen.serve.openai.moderations import ModerationBody, moderate
from safegen.serve.openai.responses import (
    Kind,
    encode_images,
    images_response,
    media_type,
    stream_response,
    to_base64,
)
from safegen.serve.openai.store import ImageStore
from safegen.serve.requests import build_request
from safegen.serve.service import Answer, ImageService

router = APIRouter(prefix="/v1", tags=["openai"])
STARTED = int(time.time())
"""Time at which every model was created, for clients that sort by it."""


def get_store(request: Request) -> ImageStore:
    """Return the images that the app stores for `response_format: url`."""
    store: ImageStore = request.app.state.image_store
    return store


Store = Annotated[ImageStore, Depends(get_store)]


@router.post("/images/generations")
async def generate(
    body: GenerateBody,
    request: Request,
    service: Service,
    client: Client,
    request_id: RequestId,
    store: Store,
) -> Response:
    """Return the images of a prompt."""
    find_stack(service, body.stack)
    image_request = build_image_request(service, body, request_id)
    answer = await _answer(request, service, image_request, client)
    async with service.record_failure(answer, client):
        return await _respond(request, answer, body, store, "image_generation")


@router.post("/images/edits", openapi_extra={"requestBody": EDIT_FORM})
async def edit(
    request: Request, service: Service, client: Client, request_id: RequestId, store: Store
) -> Response:
    """Return images that start from an uploaded one, or from its part under a mask."""
    form = await read_form(request)
    body = read_body(EditBody, form.fields)
    find_stack(service, body.stack)
    side = service.config.limits.side
    start = await asyncio.to_thread(read_start, form, body.extras.strength, side)
    image_request = build_image_request(service, body, request_id, start)
    answer = await _answer(request, service, image_request, client)
    async with service.record_failure(answer, client):
        return await _respond(request, answer, body, store, "image_edit")


@router.get("/images/files/{name}", name="stored_image")
async def stored_image(name: str, store: Store) -> Response:
    """Return an image of a response with `url`, until it expires."""
    found = store.get(name)
    if found is None:
        raise RequestError(404, "the image does not exist, or no longer", code="not_found")
    headers = {"Cross-Origin-Resource-Policy": "cross-origin"}  # pages of clients show it
    return Response(found.data, media_type=found.media_type, headers=headers)


@router.get("/models")
async def models(service: Service) -> dict[str, Any]:
    """Return the stacks as models."""
    service.stack()  # while they load, there is no answer
    return {"object": "list", "data": [_model(stack) for stack in service.stacks.values()]}


@router.get("/models/{name:path}")
async def model(name: str, service: Service) -> dict[str, Any]:
    """Return a stack as a model."""
    return _model(find_stack(service, name))


@router.post("/moderations")
async def moderations(
    body: ModerationBody, request: Request, service: Service, request_id: RequestId
) -> dict[str, Any]:
    """Return what the guards of a stack decide on texts and images of the client."""
    stack = find_stack(service, body.model or None)
    return await run_for_client(request, moderate(service, stack, body, request_id))


def find_stack(service: ImageService, name: str | None) -> StackInfo:
    """Return a stack by its name; the first one if None.

    Raises:
        RequestError: there is none.
    """
    try:
        return service.stack(name)
    except UnknownNameError as error:
        text = str(error)
        raise RequestError(404, text, code="model_not_found", param="model") from error


def build_image_request(
    service: ImageService, body: ImageBody, request_id: str, start: StartImage | None = None
) -> ImageRequest:
    """Return the request of a body; errors as `build_request`."""
    width, height = read_size(body.size or "auto")
    extras = body.extras
    return build_request(
        service,
        id=request_id,
        prompt=body.prompt,
        stack=body.stack,
        n=1 if body.n is None else body.n,
        seed=body.first_seed,
        steps=extras.steps,
        guidance=extras.guidance,
        width=width,
        height=height,
        scheduler=extras.scheduler,
        negative_prompt=extras.negative_prompt,
        start=start,
    )


async def _answer(
    request: Request, service: ImageService, image_request: ImageRequest, client: str
) -> Answer:
    """Return the answer to a request of which an image is released.

    Raises:
        RequestError: none is.
        SafegenError: see `ImageService.generate`.
    """
    try:
        answer = await run_for_client(request, service.generate(image_request, client=client))
    except UnknownNameError as error:  # the stack is known, and the scheduler is not
        raise RequestError(
            400, str(error), code="invalid_value", param="safegen.scheduler"
        ) from error
    if (blocked := answer_error(answer)) is not None:
        raise blocked
    return answer


async def _respond(
    request: Request, answer: Answer, body: ImageBody, store: ImageStore, kind: Kind
) -> Response:
    """Return the response with the released images of an answer."""
    files = await asyncio.to_thread(encode_images, answer, body)
    if body.stream:
        return await asyncio.to_thread(stream_response, answer, body, files, kind)
    if body.response_format == "url":
        names = [store.add(file, media_type(body)) for file in files]
        root = get_service(request).config.public_url or request.base_url
        paths = [request.app.url_path_for("stored_image", name=name) for name in names]
        data = [{"url": str(path.make_absolute_url(root))} for path in paths]
    else:
        data = await asyncio.to_thread(to_base64, files)
    return await asyncio.to_thread(images_response, answer, body, data)


def _model(stack: StackInfo) -> dict[str, Any]:
    """Return a stack as OpenAI describes a model."""
    return {"id": stack.name, "object": "model", "created": STARTED, "owned_by": "safegen"}
