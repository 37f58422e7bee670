"""Settings of image generation; importing them loads no model library."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from safegen.core.device import AUTO, resolve_device
from safegen.core.documents import read_bytes
from safegen.core.errors import FileError
from safegen.core.settings import (
    MAX_BATCH,
    MAX_COUNT,
    MAX_SIDE,
    MAX_STEPS,
    BaseSettings,
    Digest,
    Name,
    Seed,
    changed_repr,
    raises_config_error,
)

MAX_START_FILE = 2**26
"""Most bytes of a file that generation starts from."""

NativePrecision = Literal["fp32", "bf16"]
SeedMode = Literal["safegen", "torch"]
"""How a sample's seed becomes noise; see `GenerationConfig.seed_mode`."""
ImageSide = Annotated[int, Field(ge=8, le=MAX_SIDE)]
"""Width or height of a generated image in pixels."""
GuidanceScale = Annotated[float, Field(ge=1.0, le=50.0, allow_inf_nan=False)]
"""Scale of classifier-free guidance; 1 turns it off."""


def preferred_precision(device: str = AUTO) -> NativePrecision:
    """Return bf16 if the device is known to compute in it natively, else fp32.

    A CPU without bf16 instructions emulates them: with AVX2 alone, generation takes 17 times as
    long as in fp32.

    Args:
        device: `auto`, `cpu`, `cuda`, `cuda:1`, ...
    """
    import torch

    device = resolve_device(device)
    if device.startswith("cuda"):
        with torch.cuda.device(device):
            return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    query = getattr(torch.cpu, "get_capabilities", None)  # missing in torch 2.6
    capabilities: dict[str, object] = query() if query and device == "cpu" else {}
    return "bf16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "fp32"


REQUEST_SETTINGS = frozenset({"width", "height", "scheduler", "seed_mode", "true_cfg_scale"})
"""Settings of a configuration that are left out of what is hashed and written where unset."""


@raises_config_error
class GenerationConfig(BaseSettings):
    """Settings of image generation.

    Example:
        >>> safegen.GenerationConfig(num_inference_steps=10)
        GenerationConfig(num_inference_steps=10)
    """

    num_inference_steps: int = Field(default=25, ge=1, le=MAX_STEPS)
    """Denoising steps."""
    guidance_scale: GuidanceScale = 5.0
    """Scale of classifier-free guidance; 1 turns it off. FLUX's network reads it as an input."""
    true_cfg_scale: GuidanceScale = 1.0
    """Scale of classifier-free guidance on FLUX, at twice the time; 1 turns it off."""
    batch_size: int = Field(default=32, ge=1, le=MAX_BATCH)
    """Images per batch; it changes an image only by rounding."""
    precision: NativePrecision = "fp32"
    """Arithmetic of the denoiser; bf16 is faster on some devices and rounds more."""
    width: ImageSide | None = None
    """Width of the images in pixels. Default: the size that the model was trained on."""
    height: ImageSide | None = None
    """Height of the images in pixels. Default: the size that the model was trained on."""
    scheduler: Name | None = None
    """Scheduler: its class in diffusers, or its name in A1111. Default: the model's own."""
    seed_mode: SeedMode = "safegen"
    """`safegen`: noise from (seed, index), one generator per image. `torch`: the images that
    diffusers gives for `torch.Generator("cpu").manual_seed(seed)`; the index has no effect."""

    @model_serializer(mode="wrap")
    def _leave_out_unset(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Return the plain values; what a request may leave unset is left out, and not hashed."""
        values: dict[str, Any] = handler(self)
        unset = REQUEST_SETTINGS - self.request_settings.keys()
        return {name: value for name, value in values.items() if name not in unset}

    @property
    def request_settings(self) -> dict[str, object]:
        """Size, scheduler, seed mode and `true_cfg_scale`, those that are not the default."""
        fields = type(self).model_fields
        values = {name: getattr(self, name) for name in sorted(REQUEST_SETTINGS)}
        return {name: v for name, v in values.items() if v != fields[name].default}


class Start(BaseModel):
    """What generation starts from in place of noise alone: an image, or initial latents.

    An image with `strength` is image-to-image; with a mask it is inpainting.
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True
    )

    image: str | None = None
    """PNG file of an image, relative to the file that names it."""
    mask: str | None = None
    """PNG file of a mask: white is redrawn."""
    strength: float | None = Field(default=None, gt=0, le=1)
    """Part of the schedule that the image is noised to: 1 redraws everything."""
    latents: str | None = None
    """Safetensors file with one tensor (c, h, w) `latents`: initial latents of unit variance."""
    sha256: Digest
    """SHA-256 over the SHA-256 of each file, in the order image, mask, latents."""
    folder: Path | None = Field(default=None, exclude=True, repr=False)
    """Folder of the files; None where they are not at hand."""

    @model_validator(mode="after")
    def _check_files(self) -> Self:
        if (self.image is None) == (self.latents is None):
            raise ValueError("a start must have either an image or latents")
        if (self.image is None) != (self.strength is None):
            raise ValueError("a start must have a strength with an image, and none with latents")
        if self.mask is not None and self.image is None:
            raise ValueError("a start must have an image with its mask")
        return self

    @property
    def kind(self) -> Literal["image", "inpaint", "latents"]:
        """Kind of generation."""
        if self.latents is not None:
            return "latents"
        return "image" if self.mask is None else "inpaint"

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the files."""
        return tuple(name for name in (self.image, self.mask, self.latents) if name is not None)

    @classmethod
    def of(
        cls,
        folder: Path,
        *,
        image: str | None = None,
        mask: str | None = None,
        strength: float | None = None,
        latents: str | None = None,
    ) -> Self:
        """Return the start with files of a folder, hashed.

        Raises:
            FileError: a file is missing or is not in the folder.
        """
        names = [name for name in (image, mask, latents) if name is not None]
        digest = hashlib.sha256("".join(_file_digest(folder, n) for n in names).encode())
        return cls(
            image=image,
            mask=mask,
            strength=strength,
            latents=latents,
            sha256=digest.hexdigest(),
            folder=folder,
        )

    def located(self, folder: Path) -> Self:
        """Return this start with its files in a folder, checked against the hash.

        Raises:
            FileError: a file is missing, is not in the folder, or has changed.
        """
        digests = "".join(_file_digest(folder, name) for name in self.files)
        if hashlib.sha256(digests.encode()).hexdigest() != self.sha256:
            raise FileError(
                f"{folder / self.files[0]} has changed since its prompt file was written. "
                "Use the original files."
            )
        return self.model_copy(update={"folder": folder})

    def path(self, name: str) -> Path:
        """Return the path of a file."""
        assert self.folder is not None, "the files of a start are not at hand"
        return self.folder / name


def _file_digest(folder: Path, name: str) -> str:
    """Return the SHA-256 of a file in a folder."""
    path = folder / name
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise FileError(f"{name!r} must lie in {folder}. Copy the file there.")
    return hashlib.sha256(read_bytes(path, limit=MAX_START_FILE)).hexdigest()


@raises_config_error
class Sample(BaseModel):
    """Request for an image: a prompt, a seed and an index.

    Example:
        >>> safegen.Sample(prompt="a castle", seed=1)
        Sample(prompt='a castle', seed=1)
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True
    )

    prompt: str
    seed: Seed
    index: int = Field(default=0, ge=0, le=MAX_COUNT)
    """Index of the image for that seed; (seed, index) determine the noise."""
    start: Start | None = None
    """What generation starts from besides noise."""
    guidance_scale: GuidanceScale | None = None
    """Scale of classifier-free guidance. Default: that of the configuration."""
    negative_prompt: str | None = None
    """Prompt that guidance pushes the image away from, after the stack's negative prompt."""
    num_images_per_prompt: int = Field(default=1, ge=1, le=MAX_BATCH)
    """Number of images. With the seed mode `safegen`, image k has the noise of (seed, index + k);
    with `torch`, one generator makes all of them in one call, as in diffusers."""

    def __repr__(self) -> str:
        """Return the fields that differ from their defaults in one line."""
        return changed_repr(self)

    def __str__(self) -> str:
        """Return the `repr`."""
        return repr(self)
