"""Bodies of requests in the A1111 interface, and the fields that must have their neutral value."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field

from safegen.core.settings import MAX_NAME
from safegen.serve.errors import RequestError
from safegen.serve.switches import check_switches

NEUTRAL: Mapping[str, tuple[object, ...]] = MappingProxyType(
    {
        "enable_hr": (False,),
        "firstphase_width": (0,),
        "firstphase_height": (0,),
        "subseed_strength": (0,),
        "seed_resize_from_w": (0, -1),
        "seed_resize_from_h": (0, -1),
        "restore_faces": (False,),
        "tiling": (False,),
        "styles": ([],),
        "script_name": ("", "None"),
        "alwayson_scripts": ({},),
        "refiner_checkpoint": ("", "None"),
        "eta": (1, 0),
        "s_churn": (0,),
        "s_noise": (1,),
        "s_min_uncond": (0,),
        "clip_skip": (1, 0),
        "infotext": ("",),
        "initial_noise_multiplier": (1,),
        "inpainting_fill": (0, 1),
    }
)
"""Fields that would change an image in a way that the service does not offer: neutral values.

Absent and null are neutral too. Every other unknown field has no effect.
"""
NEUTRAL_SETTINGS: Mapping[str, tuple[object, ...]] = MappingProxyType(
    {
        "CLIP_stop_at_last_layers": (1, 0),
        "sd_vae": ("Automatic", "None", ""),
        "eta_noise_seed_delta": (0,),
        "forge_additional_modules": ([],),
    }
)
"""The same for entries of `override_settings`."""
EXTRA_NETWORK = re.compile(r"<(?:lora|lyco|hypernet):[^<>]*>", re.IGNORECASE)
"""Call of a LoRA or a hypernetwork in a prompt, as A1111 reads it."""


class Txt2ImgBody(BaseModel):
    """Body of `POST /sdapi/v1/txt2img`."""

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)

    prompt: str = ""
    """What the images show."""
    negative_prompt: str | None = None
    """What they must not show."""
    seed: int | None = -1
    """Seed of the first image; image k has this seed + k. A negative number chooses one."""
    steps: int | None = None
    """Denoising steps. Default: those of the server."""
    cfg_scale: float | None = Field(default=None, allow_inf_nan=False)
    """Scale of classifier-free guidance. Default: that of the server."""
    width: int | None = None
    """Width in pixels. Default: that of the stack."""
    height: int | None = None
    """Height in pixels. Default: that of the stack."""
    batch_size: int | None = Field(default=1, ge=1)
    """Number of images, times `n_iter`."""
    n_iter: int | None = Field(default=1, ge=1)
    """Number of images, times `batch_size`."""
    sampler_name: str | None = None
    """Sampler, as in `/sdapi/v1/samplers`. Default: that of the model."""
    sampler_index: str | None = None
    """Older name of `sampler_name`, which comes first."""
    scheduler: str | None = None
    """Noise schedule, as in `/sdapi/v1/schedulers`."""
    override_settings: dict[str, Any] | None = None
    """Of these, `sd_model_checkpoint` chooses the stack."""
    send_images: bool | None = True
    """Whether the response has the images."""

    @property
    def count(self) -> int:
        """Number of images."""
        return (self.batch_size or 1) * (self.n_iter or 1)

    @property
    def checkpoint(self) -> str | None:
        """Name of the stack; None for the default."""
        name = (self.override_settings or {}).get("sd_model_checkpoint")
        return None if name in (None, "") else str(name)[:MAX_NAME]

    def refuse_unsupported(self) -> Self:
        """Return the body, or refuse what would give another image than was requested.

        Raises:
            RequestError: a field of `NEUTRAL` has another value, or a prompt calls a LoRA.
            ConfigError: a field would turn a guard off.
        """
        check_switches((self.model_extra or {}) | {"override_settings": self.override_settings})
        _check_neutral(self.model_extra or {}, NEUTRAL, "")
        _check_neutral(self.override_settings or {}, NEUTRAL_SETTINGS, "override_settings.")
        for name in ("prompt", "negative_prompt"):
            if found := EXTRA_NETWORK.search(getattr(self, name) or ""):
                raise _refusal(
                    f"{name} must call no LoRA, got {found[0][:80]!r}. "
                    "The operator's stacks have theirs loaded.",
                    name,
                )
        return self


class Img2ImgBody(Txt2ImgBody):
    """Body of `POST /sdapi/v1/img2img`."""

    init_images: list[str] | None = None
    """The image to start from, in Base64: exactly one."""
    denoising_strength: float | None = Field(default=0.75, gt=0, le=1, allow_inf_nan=False)
    """Part of the schedule that the image is noised to: 1 redraws everything."""
    mask: str | None = None
    """Mask in Base64: white is redrawn."""
    inpainting_mask_invert: int | None = Field(default=0, ge=0, le=1)
    """1: black is redrawn."""
    resize_mode: int | None = Field(default=0, ge=0, le=1)
    """0 stretches the image to the requested size, 1 crops it."""


def _check_neutral(
    values: Mapping[str, object], neutral: Mapping[str, tuple[object, ...]], prefix: str
) -> None:
    for name, allowed in neutral.items():
        value = values.get(name)
        if isinstance(value, str) and value.lower() in ("false", "0"):
            value = False  # as A1111 reads it
        if value is not None and value not in allowed:
            raise _refusal(
                f"{prefix}{name} must be {json.dumps(allowed[0])}, got {repr(value)[:80]}. "
                "This server does not offer it; leave it out.",
                f"{prefix}{name}",
            )


def _refusal(message: str, param: str) -> RequestError:
    return RequestError(400, message, code="unsupported_value", param=param)
