"""Stages of a guarded pipeline that need no generation: its guards of prompts and of images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from PIL import Image

from safegen.core.errors import ConfigError
from safegen.guards.core.adapter import HookPoint
from safegen.guards.core.pipeline import GuardedPipeline
from safegen.guards.core.request import check_request
from safegen.guards.core.result import GeneratedImage, GuardTrace
from safegen.guards.core.runner import GuardError, GuardRunner, build_image


def check_prompts(guarded: GuardedPipeline, prompts: Sequence[str]) -> list[GuardTrace]:
    """Return what the guards of prompts decide on each prompt; nothing is generated.

    A guard that fails gives every prompt a trace with the action `withhold`.

    Raises:
        ConfigError: the pipeline has no guard of prompts.
        UserError: a guard refuses a prompt.
    """
    request = check_request(guarded.adapter, prompts, 1, {})

    def run(runners: Sequence[GuardRunner], shown: list[Image.Image]) -> None:
        guarded._check_prompts(runners, request)

    images = [Image.new("RGB", (1, 1)) for _ in prompts]  # a trace is that of an image
    return [image.trace for image in _run(guarded, "prompt", images, run)]


def check_images(
    guarded: GuardedPipeline, images: Sequence[Image.Image], prompts: Sequence[str]
) -> list[GeneratedImage]:
    """Return images from elsewhere as the guards of images leave them; None if withheld.

    A guard that fails withholds them all.

    Args:
        guarded: the pipeline with the guards.
        images: RGB images.
        prompts: prompt of each image, for guards that compare the two.

    Raises:
        ConfigError: the pipeline has no guard of images.
    """

    def run(runners: Sequence[GuardRunner], shown: list[Image.Image]) -> None:
        guarded._check_images(runners, shown, prompts, range(len(shown)))

    return _run(guarded, "image", [image.copy() for image in images], run)


def _run(
    guarded: GuardedPipeline,
    point: HookPoint,
    images: list[Image.Image],
    run: Callable[[Sequence[GuardRunner], list[Image.Image]], None],
) -> list[GeneratedImage]:
    """Run the guards of one hook point and return each image with its trace."""
    guards = [guard for guard in guarded.guards if point in guard.hook_points]
    if not guards:
        raise ConfigError(
            f"the stack must have a guard of {point}s for this, got none. Add one to the stack."
        )
    fault = ""
    with guarded._lock:
        runners = [guarded._runner(guard, len(images)) for guard in guards]
        try:
            run(runners, images)
        except GuardError as error:
            fault = f"error: {error}"
    built = [build_image(image, runners, i, fault) for i, image in enumerate(images)]
    return [replace(image, image=None) if image.trace.withheld else image for image in built]
