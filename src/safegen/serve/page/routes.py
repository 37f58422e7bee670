"""Routes of the playground: its files, and what it must know of the server."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.resources import files
from typing import Any

from fastapi import APIRouter, HTTPException, Request, Response

from safegen.serve.http import Service
from safegen.serve.messages import StackInfo
from safegen.serve.page.examples import example_prompts, read_concept
from safegen.serve.service import ImageService

router = APIRouter(tags=["page"])
TYPES = {
    "index.html": "text/html; charset=utf-8",
    "style.css": "text/css; charset=utf-8",
    "main.js": "text/javascript; charset=utf-8",
    "api.js": "text/javascript; charset=utf-8",
    "view.js": "text/javascript; charset=utf-8",
    "refusal.js": "text/javascript; charset=utf-8",
    "elements.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
"""Content types of the files of the page."""


@router.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
async def page(request: Request) -> Response:
    """Return the page."""
    return _respond(request, "index.html")


@router.get("/playground.json", include_in_schema=False)
async def playground(service: Service) -> dict[str, Any]:
    """Return what the page must know of the server. Unlike the files, it needs a token."""
    return describe_server(service)


@router.api_route("/page/{name}", methods=["GET", "HEAD"], include_in_schema=False)
async def page_file(request: Request, name: str) -> Response:
    """Return a file of the page."""
    return _respond(request, name)


def describe_server(service: ImageService) -> dict[str, Any]:
    """Return what the page must know of a server, as plain values."""
    service.stack()  # while they load, there is no answer
    config, limits = service.config, service.config.limits
    stacks = [s for s in service.stacks.values() if config.allow_base or not s.is_base]
    return {
        "concept": read_concept(config.concept).name if config.concept else None,
        "examples": example_prompts(config.concept, [stack.model for stack in stacks]),
        "defaults": None
        if config.upstream is not None  # the other server has its own
        else {"steps": config.num_inference_steps, "guidance": config.guidance_scale},
        "limits": {
            "images": limits.images,
            "steps": limits.steps,
            "side": limits.side,
            "prompt_chars": limits.prompt_chars,
        },
        "stacks": [_describe_stack(stack) for stack in stacks],
    }


def _describe_stack(stack: StackInfo) -> dict[str, Any]:
    """Return a stack as plain values."""
    return {
        "name": stack.name,
        "model": stack.model,
        "size": stack.size,
        "patches": stack.patches,
        "loras": stack.loras,
        "is_base": stack.is_base,
        "guards": [
            {
                "name": guard.name,
                "reads_prompts": guard.reads_prompts,
                "reads_images": guard.reads_images,
                "judge": guard.judge,
            }
            for guard in stack.guards
        ],
    }


@cache
def _read(name: str) -> tuple[bytes, str]:
    """Return a file of the page and its entity tag."""
    data = files("safegen.serve.page").joinpath("static", name).read_bytes()
    return data, f'"{hashlib.sha256(data).hexdigest()[:32]}"'


def _respond(request: Request, name: str) -> Response:
    if name not in TYPES:
        raise HTTPException(404, "Not Found")
    data, tag = _read(name)
    headers = {"Cache-Control": "no-cache", "ETag": tag}
    known = request.headers.get("if-none-match", "")
    if tag in (part.strip().removeprefix("W/") for part in known.split(",")):
        return Response(status_code=304, headers=headers)
    return Response(data, media_type=TYPES[name], headers=headers)
