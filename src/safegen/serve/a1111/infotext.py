"""Settings of an image as A1111 writes them."""

from __future__ import annotations

import json

from safegen._version import __version__
from safegen.serve.gate import Outcome
from safegen.serve.messages import ImageRequest, StackInfo
from safegen.serve.service import Answer


def requested_size(request: ImageRequest, stack: StackInfo) -> tuple[int, int]:
    """Return the width and the height of the images of a request; 0 if another server chooses."""
    config = request.generation_config
    return config.width or stack.size[0], config.height or stack.size[1]


def image_size(answer: Answer) -> tuple[int, int]:
    """Return the width and the height of the images of an answer, of which one is released."""
    image = answer.released[0].image
    assert image is not None, "a released outcome has an image"
    width, height = requested_size(answer.request, answer.stack)
    return width or image.width, height or image.height


def used_setting(answer: Answer, name: str) -> float | None:
    """Return a setting that the images were made with; None if another server chose it."""
    value: float = getattr(answer.request.generation_config, name)
    return value if answer.stack.sampler else answer.request.chosen_setting(name)


def build_infotext(answer: Answer, outcome: Outcome) -> str:
    """Return the settings of an image as A1111 writes them under `parameters` in a PNG.

    A1111 makes another image for a seed; the text says so. That of a withheld image says why.
    """
    request, stack, (width, height) = answer.request, answer.stack, image_size(answer)
    withheld = outcome.status != "released"
    values: dict[str, object] = {
        "Steps": used_setting(answer, "num_inference_steps"),
        "Sampler": request.generation_config.scheduler or stack.sampler,
        "CFG scale": used_setting(answer, "guidance_scale"),
        "Seed": outcome.seed,
        "Size": f"{width}x{height}",
        "Model hash": stack.model_hash[:10],
        "Model": stack.name,
        "Denoising strength": request.start.strength if request.start else None,
        "Seed mode": "safegen (A1111 gives another image for this seed)" if stack.sampler else "",
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
