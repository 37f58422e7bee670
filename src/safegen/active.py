"""LoRAs of a stack: which file, how strongly.

Plain data; `models/beside.py` puts them beside a model's weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from safegen.core.errors import FileError


class LoraSpec(BaseModel):
    """A LoRA that is active beside a model's weights, never fused into them.

    Written FILE or FILE:SCALE.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    file: Path
    """A LoRA of the denoiser, kohya's keys or diffusers'."""
    scale: float = Field(default=1.0, allow_inf_nan=False)
    """Its strength; 1 is as trained."""

    @field_validator("scale")
    @classmethod
    def _acts(cls, value: float) -> float:
        if not value:
            raise ValueError("a LoRA of scale 0 has no effect; leave it out")
        return value

    def fingerprint(self) -> dict[str, Any]:
        """Return its name without folders, the SHA-256 of the file, and its scale.

        Raises:
            FileError: it cannot be read.
        """
        if not self.file.is_file():
            raise FileError(f"the LoRA {str(self.file)!r} does not exist")
        with self.file.open("rb") as file:
            return {
                "file": self.file.name,
                "hash": hashlib.file_digest(file, "sha256").hexdigest(),
                "scale": self.scale,
            }


def parse_lora_specs(words: object) -> Any:
    """Return what FILE or FILE:SCALE means, for each such word of a list.

    What is no word is left for pydantic.
    """
    if not isinstance(words, Sequence) or isinstance(words, str):
        return words
    return tuple(_read(word) if isinstance(word, str) else word for word in words)


def _read(word: str) -> dict[str, Any]:
    file, _, scale = word.rpartition(":")
    try:
        return {"file": file, "scale": float(scale)} if file else {"file": word}
    except ValueError:  # the colon is one of the file's name
        return {"file": word}


LoraSpecs = Annotated[tuple[LoraSpec, ...], BeforeValidator(parse_lora_specs)]
"""A setting that takes LoRAs as words or tables."""
