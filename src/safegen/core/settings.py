"""Base class of all settings, and the bounds that several of them share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

MAX_SEED = 2**63 - 1
"""Largest seed, and largest integer of any setting."""
MAX_SEEDS = 10_000
"""Largest number of seeds for each prompt."""
MAX_STEPS = 1000
"""Largest number of denoising steps."""
MAX_BATCH = 4096
"""Largest number of images in a batch."""
MAX_RANK = 4096
"""Largest rank of a LoRA; no layer of the supported models is wider."""
MAX_THREADS = 1024
"""Largest number of CPU threads."""
MAX_COUNT = 1_000_000
"""Largest number of updates, images, prompts or draws."""
MAX_NUMBER = 1e9
"""Largest absolute value of a setting that is not an integer."""

Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
Seeds = Annotated[tuple[Seed, ...], Field(max_length=MAX_SEEDS)]


class BaseSettings(BaseModel):
    """Frozen settings without unknown names, NaN, infinities or numbers beyond any use."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    @field_validator("*")
    @classmethod
    def _check_numbers(cls, value: Any) -> Any:
        for number in _numbers(value):
            limit = MAX_SEED if isinstance(number, int) else MAX_NUMBER
            if not abs(number) <= limit:  # NaN too
                raise ValueError(f"must be between -{limit:g} and {limit:g}, got {number:g}")
        return value


def _numbers(value: object) -> Iterator[float]:
    """Yield the numbers in a value, those of its entries too."""
    if isinstance(value, int | float):
        yield value
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from _numbers(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _numbers(entry)
