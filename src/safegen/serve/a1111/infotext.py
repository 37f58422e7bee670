"""Settings of an image as A1111 writes them."""

from __future__ import annotations

import json

from safegen._version import __version__
from safegen.serve.gate import Outcome
from safegen.serve.messages import ImageRequest, StackInfo

DEFAULT_SIDE = 512
"""Width and height of A1111 unless a request says otherwise."""


def image_size(request: ImageRequest, stack: StackInfo) -> tuple[int, int]:
    """Return the width and the height of the images of a request; A1111's if they are unknown."""
    config = request.generation_config
    width, height = config.width or stack.size[0], config.height or stack.size[1]
    return width or DEFAULT_SIDE, height or DEFAULT_SIDE


def used_setting(request: ImageRequest, stack: StackInfo, name: str) -> float | None:
    """Return a setting of the images; None where another server used its own."""
    value: float = getattr(request.generation_config, name)
    return request.chosen_setting(name) if stack.is_remote else value


def build_infotext(request: ImageRequest, stack: StackInfo, outcome: Outcome) -> str:
    """Return the settings of an image as A1111 writes them under `parameters` in a PNG.

    A1111 makes another image for a seed; the text says so. That of a withheld image says why.
    """
    config, image = request.generation_config, outcome.image
    width, height = image_size(request, stack) if image is None else image.size
    withheld = outcome.status != "released"
    values: dict[str, object] = {
        "Steps": used_setting(request, stack, "num_inference_steps"),
        "Sampler": config.scheduler or stack.sampler,
        "CFG scale": used_setting(request, stack, "guidance_scale"),
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
