"""Routes of the playground: its files, and what it must know of the server."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.resources import files
from typing import Any

from fastapi import APIRouter, HTTPException, Request, Response

from safegen.serve.http import Service
from safegen.serve.page.examples import example_prompts
from safegen.serve.service import ImageService

router = APIRouter(tags=["page"])
TYPES = {
    "index.html": "text/html; charset=utf-8",
    "style.css": "text/css; charset=utf-8",
    "main.js": "text/javascript; charset=utf-8",
    "api.js": "text/javascript; charset=utf-8",
    "view.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
"""Content types of the files of the page."""
PUBLIC_PATHS = frozenset({"/", *(f"/page/{name}" for name in TYPES)})
"""Paths that need no token: the files of the page. They say nothing about the server."""
POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; object-src 'none'; base-uri 'none'; "
    "form-action 'self'; frame-ancestors 'none'"
)
"""Content security policy: no script, style or request from elsewhere, and none in the HTML."""
HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": POLICY,
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
OPENAI_IMAGES = 10
"""Most images of a request in the OpenAI interface, which the page uses."""


@router.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
async def page(request: Request) -> Response:
    """Return the page."""
    return _respond(request, "index.html")


@router.get("/page/config.json", include_in_schema=False)
async def page_config(service: Service) -> Response:
    """Return the stacks, limits, defaults and examples of the server."""
    from fastapi.responses import JSONResponse

    return JSONResponse(describe_server(service), headers={"Cache-Control": "no-store"})


@router.api_route("/page/{name}", methods=["GET", "HEAD"], include_in_schema=False)
async def page_file(request: Request, name: str) -> Response:
    """Return a file of the page."""
    return _respond(request, name)


def describe_server(service: ImageService) -> dict[str, Any]:
    """Return what the page must know of a server, as plain values."""
    config, state, stacks = service.config, service.engine.state(), service.engine.stacks
    shown = [stack for stack in stacks.values() if config.allow_base or not stack.is_base]
    limits = config.limits
    return {
        "ready": state.is_ready,
        "reason": state.reason,
        "token_required": config.token_file is not None,
        "concept": config.concept,
        "examples": example_prompts(config.concept, [stack.model for stack in shown]),
        "defaults": {"steps": config.num_inference_steps, "guidance": config.guidance_scale},
        "limits": {
            "images": min(limits.images, OPENAI_IMAGES),
            "steps": limits.steps,
            "side": limits.side,
            "prompt_chars": limits.prompt_chars,
        },
        "stacks": [
            {
                "name": stack.name,
                "model": stack.model,
                "size": stack.size,
                "patches": stack.patches,
                "loras": stack.loras,
                "is_base": stack.is_base,
                "base": _base_name(stack.model, stack.is_base, service),
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
            for stack in shown
        ],
    }


def _base_name(model: str, is_base: bool, service: ImageService) -> str | None:
    """Return the stack to compare with, None if there is none."""
    if is_base or not service.config.allow_base:
        return None
    stacks = service.engine.stacks.values()
    return next((s.name for s in stacks if s.is_base and s.model == model), None)


@cache
def _read(name: str) -> tuple[bytes, str]:
    """Return a file of the page and its entity tag."""
    data = files("safegen.serve.page").joinpath("static", name).read_bytes()
    return data, f'"{hashlib.sha256(data).hexdigest()[:32]}"'


def _respond(request: Request, name: str) -> Response:
    if name not in TYPES:
        raise HTTPException(404, "Not Found")
    data, tag = _read(name)
    headers = {**HEADERS, "ETag": tag}
    known = request.headers.get("if-none-match", "")
    if tag in (part.strip().removeprefix("W/") for part in known.split(",")):
        return Response(status_code=304, headers=headers)
    return Response(data, media_type=TYPES[name], headers=headers)
