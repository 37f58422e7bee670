"""Responses of the A1111 interface."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from typing import Any

from PIL import Image

from safegen._version import __version__
from safegen.core.png import encode_image
from safegen.serve.a1111.infotext import build_infotext, image_size, used_setting
from safegen.serve.a1111.running import RunningRequest
from safegen.serve.errors import outcome_json
from safegen.serve.gate import Outcome
from safegen.serve.images import encode_outcome
from safegen.serve.messages import StackInfo
from safegen.serve.service import Answer


async def images_response(
    answer: Answer, *, batch_size: int, send_images: bool = True
) -> dict[str, Any]:
    """Return the response with the images of a request, of which at least one is released.

    In the place of every other one is a black image that was made here; `info` says why.

    Args:
        answer: what became of the images.
        batch_size: the number of the same name in the request.
        send_images: whether the response has the images.
    """
    texts = [build_infotext(answer, outcome) for outcome in answer.outcomes]
    images = []
    for outcome, text in zip(answer.outcomes, texts, strict=True) if send_images else ():
        images.append(await asyncio.to_thread(_encode, answer, outcome, text))
    info = build_info(answer, texts, batch_size)
    names = ("prompt", "negative_prompt", "seed", "steps", "cfg_scale", "width", "height")
    parameters = {name: info[name] for name in (*names, "sampler_name", "batch_size")}
    parameters["n_iter"] = len(texts) // batch_size
    return {"images": images, "parameters": parameters, "info": json.dumps(info)}


def build_info(answer: Answer, infotexts: list[str], batch_size: int) -> dict[str, Any]:
    """Return the settings of all images of a request, under the names of A1111."""
    request, stack, n = answer.request, answer.stack, len(answer.outcomes)
    config, (width, height) = request.generation_config, image_size(answer)
    negative, seeds = request.negative_prompt or "", list(request.seeds)
    return {
        "prompt": request.prompt,
        "all_prompts": [request.prompt] * n,
        "negative_prompt": negative,
        "all_negative_prompts": [negative] * n,
        "seed": seeds[0],
        "all_seeds": seeds,
        "subseed": seeds[0],
        "all_subseeds": seeds,
        "subseed_strength": 0,
        "width": width,
        "height": height,
        "sampler_name": config.scheduler or stack.sampler,
        "cfg_scale": used_setting(answer, "guidance_scale"),
        "steps": used_setting(answer, "num_inference_steps"),
        "batch_size": batch_size,
        "restore_faces": False,
        "face_restoration_model": None,
        "sd_model_name": stack.name,
        "sd_model_hash": stack.model_hash[:10],
        "sd_vae_name": None,
        "sd_vae_hash": None,
        "seed_resize_from_w": 0,
        "seed_resize_from_h": 0,
        "denoising_strength": request.start.strength if request.start else None,
        "extra_generation_params": {},
        "index_of_first_image": 0,
        "infotexts": infotexts,
        "styles": [],
        "job_timestamp": _timestamp(),
        "clip_skip": 1,
        "is_using_inpainting_conditioning": False,
        "version": f"safegen {__version__}",
        "safegen": {
            "request_id": request.id,
            "images": [outcome_json(o, index) for index, o in enumerate(answer.outcomes)],
        },
    }


def progress_response(jobs: list[RunningRequest], progress: float | None) -> dict[str, Any]:
    """Return how far the requests of a client are. There is never a preview of an image.

    Args:
        jobs: the requests that run, the oldest first.
        progress: part of the oldest one that is done; None if it is unknown.
    """
    done, elapsed = 0.0, 0.0
    steps = jobs[0].request.generation_config.num_inference_steps if jobs else 0
    if jobs:
        done, elapsed = min(max(progress or 0.0, 0.0), 1.0), time.monotonic() - jobs[0].started
    return {
        "progress": done,
        "eta_relative": elapsed / done - elapsed if done else 0.0,
        "state": {
            "skipped": False,
            "interrupted": False,
            "stopping_generation": False,
            "job": jobs[0].request.id if jobs else "",
            "job_count": len(jobs),
            "job_timestamp": _timestamp(),
            "job_no": 0,
            "sampling_step": int(done * steps),
            "sampling_steps": steps,
        },
        "current_image": None,
        "textinfo": None,
    }


def options_response(stack: StackInfo) -> dict[str, Any]:
    """Return the settings of the server that clients of A1111 read."""
    return {
        "sd_model_checkpoint": stack.name,
        "sd_checkpoint_hash": stack.model_hash,
        "sd_vae": "Automatic",
        "CLIP_stop_at_last_layers": 1,
        "samples_format": "png",
    }


def model_response(stack: StackInfo) -> dict[str, Any]:
    """Return a stack as A1111 describes a checkpoint."""
    return {
        "title": stack.name,
        "model_name": stack.name,
        "hash": stack.model_hash[:10] or None,
        "sha256": stack.model_hash or None,
        "filename": stack.name,
        "config": None,
    }


def _encode(answer: Answer, outcome: Outcome, infotext: str) -> str:
    """Return a released image as a PNG in Base64; a new black image in place of another one."""
    if outcome.status == "released":
        data = encode_outcome(outcome, answer, parameters=infotext)
    else:
        black = Image.new("RGB", image_size(answer))
        data = encode_image(black, {"status": outcome.status}, infotext)
    return base64.b64encode(data).decode()


def _timestamp() -> str:
    return time.strftime("%Y%m%d%H%M%S", time.gmtime())
