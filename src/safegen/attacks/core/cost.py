"""Budget that ends an attack."""

from __future__ import annotations

import re
from typing import Self

from pydantic import Field

from safegen.core.errors import ConfigError
from safegen.core.settings import BaseSettings
from safegen.evaluation.run.attack_records import Cost

__all__ = ["UNITS", "Budget", "Cost"]


UNITS = {"nfe": "denoiser", "text": "text_encoder", "queries": "queries", "minutes": "seconds"}
"""Field of `Cost` by the name of its limit."""


class Budget(BaseSettings):
    """Limits of an attack on one stack; it stops at the first that is reached."""

    nfe: int | None = Field(default=None, ge=1)
    """Passes through the denoiser (number of function evaluations)."""
    text: int | None = Field(default=None, ge=1)
    """Passes through the text encoders."""
    queries: int | None = Field(default=None, ge=1)
    """Images."""
    minutes: float | None = Field(default=None, gt=0)
    """Wall-clock minutes."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the budget in a text such as `nfe=20000,minutes=5`.

        Raises:
            ConfigError: a name is unknown, repeated, or its value is not a number.
        """
        limits: dict[str, float] = {}
        for part in filter(None, text.split(",")):
            match = re.fullmatch(r"\s*(\w+)\s*=\s*([0-9_]*\.?[0-9]+)\s*", part)
            if not match or match[1] not in UNITS or match[1] in limits:
                raise ConfigError(
                    f"budget must be NAME=NUMBER, each of {', '.join(UNITS)} at most once, "
                    f"got {part!r}"
                )
            number = float(match[2].replace("_", ""))
            if not number > 0 or (match[1] != "minutes" and number % 1):
                raise ConfigError(f"budget {match[1]} must be a positive number, got {match[2]}")
            limits[match[1]] = number
        return cls.model_validate(limits)

    def reached(self, cost: Cost) -> str:
        """Return the name of a limit that a cost reaches; empty if none."""
        for name, field in UNITS.items():
            limit, spent = getattr(self, name), getattr(cost, field)
            if limit is not None and spent >= limit * (60 if name == "minutes" else 1):
                return name
        return ""
