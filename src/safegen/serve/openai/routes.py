"""Routes of the OpenAI Images interface."""

from __future__ import annotations

import asyncio
import base64
import io
import secrets
import time
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from safegen.core.generation import GenerationConfig
from safegen.serve.errors import answer_error, outcome_json
from safegen.serve.gate import Outcome
from safegen.serve.http import Client, RequestId, Service, run_for_client
from safegen.serve.messages import ImageRequest

router = APIRouter(prefix="/v1", tags=["openai"])


class GenerateBody(BaseModel):
    """Body of `POST /v1/images/generations`."""

    model_config = ConfigDict(extra="ignore")

    prompt: str
    n: int = Field(default=1, ge=1, le=10)
    model: str | None = None


@router.post("/images/generations")
async def generate(
    body: GenerateBody, request: Request, service: Service, client: Client, request_id: RequestId
) -> dict[str, Any]:
    """Return the images of a prompt."""
    config, first = service.config, secrets.randbits(31)
    image_request = ImageRequest(
        id=request_id,
        prompt=body.prompt,
        stack=service.stack(body.model).name,
        seeds=tuple(first + k for k in range(body.n)),
        generation_config=GenerationConfig(
            num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale,
            batch_size=config.max_batch_size,
        ),
    )
    answer = await run_for_client(request, service.generate(image_request, client=client))
    if (error := answer_error(answer)) is not None:
        raise error
    data = [await asyncio.to_thread(_encode, outcome) for outcome in answer.released]
    return {
        "created": int(time.time()),
        "data": data,
        "safegen": {
            "request_id": request_id,
            "images": [outcome_json(o, i) for i, o in enumerate(answer.outcomes)],
        },
    }


def _encode(outcome: Outcome) -> dict[str, str]:
    buffer = io.BytesIO()
    assert outcome.image is not None
    outcome.image.save(buffer, format="PNG")
    return {"b64_json": base64.b64encode(buffer.getvalue()).decode()}
