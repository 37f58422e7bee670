"""Settings of a client's request as an `ImageRequest`, the same for every interface."""

from __future__ import annotations

import secrets

from safegen.core.errors import ConfigError
from safegen.core.generation import GenerationConfig
from safegen.core.settings import MAX_SEED
from safegen.serve.messages import ImageRequest, StackInfo, StartImage
from safegen.serve.service import ImageService

RANDOM_SEED_BITS = 31
"""Size of a random seed, which every client can store."""


def build_request(
    service: ImageService,
    *,
    id: str,
    prompt: str,
    stack: str | None = None,
    n: int = 1,
    seed: int | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    width: int | None = None,
    height: int | None = None,
    scheduler: str | None = None,
    negative_prompt: str | None = None,
    start: StartImage | None = None,
) -> ImageRequest:
    """Return the request for n images, with the server's defaults and within its limits.

    Args:
        service: the service that will answer it.
        id: request id.
        prompt: the prompt.
        stack: name of a stack. Default: the first one.
        n: number of images.
        seed: seed of the first image; image k has the seed + k. Default: random.
        steps: denoising steps.
        guidance: scale of classifier-free guidance.
        width: width of the images in pixels. Default: the stack's.
        height: height of the images in pixels. Default: the stack's.
        scheduler: name of a scheduler. Default: the model's own.
        negative_prompt: prompt that guidance pushes the images away from.
        start: image that generation starts from.

    Raises:
        UnknownNameError: there is no such stack.
        ConfigError: a setting breaks its rule or a limit.
    """
    config, info = service.config, service.stack(stack)
    for name, text in (("prompt", prompt), ("negative_prompt", negative_prompt)):
        check_text(name, text or "")
    if not 1 <= n <= config.limits.images:
        raise ConfigError(f"n must be between 1 and {config.limits.images}, got {n}")
    generation_config = GenerationConfig(
        num_inference_steps=config.num_inference_steps if steps is None else steps,
        guidance_scale=config.guidance_scale if guidance is None else guidance,
        true_cfg_scale=config.true_cfg_scale,
        batch_size=config.max_batch_size,
        width=width,
        height=height,
        scheduler=_scheduler(info, scheduler),
    )
    settings = {"num_inference_steps": steps, "guidance_scale": guidance}
    if start is not None:
        check_strength(start.strength, generation_config.num_inference_steps)
    request = ImageRequest(
        id=id,
        prompt=prompt,
        stack=info.name,
        seeds=_seeds(seed, n),
        generation_config=generation_config,
        negative_prompt=negative_prompt,
        start=start,
        unset=frozenset(name for name, value in settings.items() if value is None),
    )
    service.check_limits(request)
    return request


def check_text(name: str, text: str) -> None:
    """Check that a text can be encoded.

    Raises:
        ConfigError: it has half a surrogate pair.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{name} must be Unicode text, got half a surrogate pair at character {error.start}"
        ) from error


def check_strength(strength: float, steps: int) -> None:
    """Check that a strength leaves a denoising step.

    Raises:
        ConfigError: it is outside (0, 1], or leaves none.
    """
    if not 0 < strength <= 1:
        raise ConfigError(f"strength must be > 0 and <= 1, got {strength}")
    if int(strength * steps) < 1:
        raise ConfigError(f"strength must be at least 1 / {steps} steps, got {strength}")


def _seeds(seed: int | None, n: int) -> tuple[int, ...]:
    """Return the seeds of n images."""
    first = secrets.randbits(RANDOM_SEED_BITS) if seed is None else seed
    if not 0 <= first <= MAX_SEED - (n - 1):
        raise ConfigError(f"seed must be between 0 and {MAX_SEED - (n - 1)}, got {first}")
    return tuple(range(first, first + n))


def _scheduler(stack: StackInfo, name: str | None) -> str | None:
    """Return a scheduler's name as the stack spells it."""
    if name is None or not name.strip():
        return None
    check_text("scheduler", name)
    known = {sampler.lower(): sampler for sampler in stack.samplers}
    return known.get(name.lower(), name)
