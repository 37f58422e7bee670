"""Bodies of requests of the OpenAI Images interface."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from safegen.core.errors import UnknownNameError, check_names
from safegen.core.generation import GuidanceScale
from safegen.core.settings import MAX_SIDE, MAX_STEPS, Seed
from safegen.serve.errors import RequestError
from safegen.serve.images import OutputFormat
from safegen.serve.switches import check_switches

SIZE = re.compile(r"([1-9]\d{0,4})x([1-9]\d{0,4})")
"""Width and height in pixels."""
Body = TypeVar("Body", bound=BaseModel)


class SafegenFields(BaseModel):
    """The object `safegen`: settings that OpenAI has no names for."""

    model_config: ClassVar[ConfigDict] = ConfigDict(
        extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    seed: Seed | None = None
    """Seed of the first image; image k has the seed + k. Default: random."""
    steps: Annotated[int, Field(ge=1, le=MAX_STEPS)] | None = None
    """Denoising steps. Default: the server's."""
    guidance: GuidanceScale | None = None
    """Scale of classifier-free guidance. Default: the server's."""
    negative_prompt: str | None = None
    """Prompt that guidance pushes the image away from. It changes no guard."""
    stack: str | None = None
    """Name of a stack, as `model`."""
    scheduler: str | None = None
    """Scheduler: its class in diffusers, or its name in A1111. Default: the model's own."""
    strength: Annotated[float, Field(gt=0, le=1)] | None = None
    """Of an edit: part of the schedule that the image is noised to. Default: 1 with a mask, else
    0.8."""

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, values: Any) -> Any:
        if isinstance(values, Mapping):
            try:
                check_names("field of safegen", map(str, values), cls.model_fields)
            except UnknownNameError as error:
                raise invalid_field("safegen", str(error)) from error
        return values


class ImageBody(BaseModel):
    """Fields that generations and edits share. Other fields have no effect."""

    model_config: ClassVar[ConfigDict] = ConfigDict(
        extra="allow", use_attribute_docstrings=True, allow_inf_nan=False
    )

    prompt: str
    """The prompt."""
    model: str | None = None
    """Name of a stack. Default: the first one."""
    n: Annotated[int, Field(ge=1)] | None = None
    """Number of images. Default: 1."""
    size: str | None = None
    """`WIDTHxHEIGHT` in pixels, or `auto`: the size that the model was trained on."""
    response_format: Literal["b64_json", "url"] | None = None
    """`b64_json` has the images in the response, `url` an address that expires."""
    output_format: OutputFormat | None = None
    """Format of the images. Default: png."""
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = None
    """Quality of JPEG and WebP in percent. Default: 100."""
    stream: bool | None = None
    """Send each image as an event. All guards have checked all images before the first one."""
    partial_images: Annotated[int, Field(ge=0)] | None = None
    """Must be 0: a partial image would leave the server before a guard has checked it."""
    moderation: Literal["low", "auto"] | None = None
    """Accepted without effect: `low` lowers nothing."""
    quality: str | None = None
    """Accepted without effect."""
    style: str | None = None
    """Accepted without effect."""
    background: str | None = None
    """Accepted without effect: images are opaque."""
    user: str | None = None
    """Accepted without effect."""
    safety_identifier: str | None = None
    """Accepted without effect."""
    seed: Seed | None = None
    """`safegen.seed`, as vLLM-Omni and SGLang name it."""
    safegen: SafegenFields | None = None
    """Settings that OpenAI has no names for."""

    @model_validator(mode="before")
    @classmethod
    def _check_switches(cls, values: Any) -> Any:
        if isinstance(values, Mapping):
            check_switches(values)
        return values

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.size is not None:
            read_size(self.size)
        if self.partial_images:
            raise invalid_field(
                "partial_images",
                f"partial_images must be 0, got {self.partial_images}. A partial image would leave "
                "the server before the guards have checked it.",
            )
        if self.stream and self.response_format == "url":
            text = "response_format must be b64_json with stream, got 'url'"
            raise invalid_field("response_format", text)
        if None not in (self.seed, self.extras.seed) and self.seed != self.extras.seed:
            raise invalid_field(
                "seed",
                f"seed and safegen.seed must be the same, got {self.seed} and {self.extras.seed}. "
                "Leave one out.",
            )
        if self.model and self.extras.stack and self.model != self.extras.stack:
            raise invalid_field(
                "model",
                f"model and safegen.stack must be the same, got {self.model!r} and "
                f"{self.extras.stack!r}. Leave one out.",
            )
        return self

    @property
    def extras(self) -> SafegenFields:
        """The object `safegen`; an empty one if it is left out."""
        return self.safegen or SafegenFields()

    @property
    def first_seed(self) -> int | None:
        """Seed of the first image; None for a random one."""
        return self.seed if self.extras.seed is None else self.extras.seed

    @property
    def stack(self) -> str | None:
        """Name of the stack; None for the first one."""
        return self.model or self.extras.stack or None


class GenerateBody(ImageBody):
    """Body of `POST /v1/images/generations`."""

    @model_validator(mode="after")
    def _check_strength(self) -> Self:
        if self.extras.strength is not None:
            raise invalid_field(
                "safegen.strength",
                "safegen.strength must be left out without an image. Use /v1/images/edits.",
            )
        return self


class EditBody(ImageBody):
    """Fields of `POST /v1/images/edits` besides its files."""


def read_size(text: str) -> tuple[int | None, int | None]:
    """Return width and height in pixels; None for both of `auto`.

    Raises:
        RequestError: it is no size.
    """
    if text == "auto":
        return None, None
    found = SIZE.fullmatch(text)
    if found is None or max(map(int, found.groups())) > MAX_SIDE:
        raise invalid_field(
            "size",
            f"size must be auto or WIDTHxHEIGHT, at most {MAX_SIDE} per side, got {text[:40]!r}",
        )
    return int(found[1]), int(found[2])


def invalid_field(name: str, message: str) -> RequestError:
    """Return the error of a field that breaks its rule."""
    return RequestError(400, message, code="invalid_value", param=name)


def read_body(kind: type[Body], values: Mapping[str, Any]) -> Body:
    """Return the fields of a form, checked as those of a JSON body are.

    Raises:
        RequestValidationError: one breaks its rule.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        details = error.errors(include_url=False)
        raise RequestValidationError(
            [{**detail, "loc": ("body", *detail["loc"])} for detail in details]
        ) from error
