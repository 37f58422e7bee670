"""LoRAs of a stack: file and scale. Plain settings, read without torch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, field_validator

from safegen.core.documents import check_file
from safegen.core.errors import FileError
from safegen.core.settings import BaseSettings

MAX_SCALE = 1000.0
"""Largest scale of a LoRA, and largest ratio of its alpha to its rank, either sign."""


class LoraSpec(BaseSettings):
    """A LoRA that is active beside a model's weights. Written FILE or FILE:SCALE."""

    file: Path
    """A LoRA of the denoiser, in kohya's or diffusers' keys."""
    scale: float = Field(default=1.0, ge=-MAX_SCALE, le=MAX_SCALE, allow_inf_nan=False)
    """Strength; 1 is as trained."""

    @field_validator("scale")
    @classmethod
    def _check_scale(cls, value: float) -> float:
        if not value:
            raise ValueError("scale of a LoRA must not be 0, which has no effect. Leave it out")
        return value

    def fingerprint(self) -> dict[str, Any]:
        """Return the file name, the SHA-256 of the file, and the scale.

        Raises:
            FileError: the file cannot be read.
        """
        check_file(self.file)
        try:
            with self.file.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise FileError(f"{str(self.file)!r} cannot be read: {error.strerror}") from error
        return {"file": self.file.name, "hash": digest, "scale": self.scale}


def parse_lora_specs(value: object) -> Any:
    """Return a list with each word FILE or FILE:SCALE parsed. Other values are left to pydantic."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        return value
    return tuple(_parse(entry) if isinstance(entry, str) else entry for entry in value)


def _parse(word: str) -> dict[str, Any]:
    file, _, scale = word.rpartition(":")
    try:
        return {"file": file, "scale": float(scale)} if file else {"file": word}
    except ValueError:  # the colon belongs to the file name
        return {"file": word}


LoraSpecs = Annotated[tuple[LoraSpec, ...], BeforeValidator(parse_lora_specs)]
"""A setting that takes LoRAs as words or tables."""
