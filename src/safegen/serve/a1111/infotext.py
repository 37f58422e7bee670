"""Settings of an image as A1111 writes them."""

from __future__ import annotations

import json

from safegen._version import __version__
from safegen.serve.gate import Outcome
from safegen.serve.messages import ImageRequest, StackInfo


def image_size(request: ImageRequest, stack: StackInfo) -> tuple[int, int]:
    """Return the width and the height of the images of a request."""
    config = request.generation_config
    return config.width or stack.size[0], config.height or stack.size[1]


def build_infotext(request: ImageRequest, stack: StackInfo, outcome: Outcome) -> str:
    """Return the settings of an image as A1111 writes them under `parameters` in a PNG.

    A1111 makes another image for a seed; the text says so. That of a withheld image says why.
    """
    config, (width, height) = request.generation_config, image_size(request, stack)
    withheld = outcome.status != "released"
    values: dict[str, object] = {
        "Steps": config.num_inference_steps,
        "Sampler": config.scheduler or stack.sampler,
        "CFG scale": config.guidance_scale,
        "Seed": outcome.seed,
        "Size": f"{width}x{height}",
        "Model hash": stack.model_hash[:10],
        "Model": stack.name,
        "Denoising strength": request.start.strength if request.start else None,
        "RNG": "CPU",
        "Seed mode": "safegen (A1111 gives another image for this seed)",
        "Withheld": f"{outcome.status} by {outcome.guard or 'the server'}" if withheld else None,
        "Version": f"safegen {__version__}",
    }
    negative = request.negative_prompt
    lines = [request.prompt, *([f"Negative prompt: {negative}"] if negative else [])]
    pairs = [f"{key}: {_quote(value)}" for key, value in values.items() if value not in (None, "")]
    return "\n".join([*lines, ", ".join(pairs)])


def _quote(value: object) -> str:
    """Return a value of the last line: quoted as JSON if it has a comma, colon or line break."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if set(text) & set(",:\n") else text
