"""Cost of an attack in network passes, queries and seconds, and the budget that ends it."""

from __future__ import annotations

import re
from typing import Self

from pydantic import Field

from safegen.core.errors import ConfigError
from safegen.core.settings import BaseSettings, Count, Seconds


class Cost(BaseSettings):
    """Work that an attack has done. A pass is one row of a batch, forward or backward."""

    denoiser: Count = 0
    """Passes through the denoiser, those of generation included."""
    text_encoder: Count = 0
    """Passes through the text encoders, those of generation included."""
    queries: Count = 0
    """Images requested from the stack."""
    seconds: Seconds = 0.0
    """Wall-clock time."""

    def __add__(self, other: Cost) -> Cost:
        """Return the sum of two costs."""
        return Cost(**{name: getattr(self, name) + getattr(other, name) for name in FIELDS})

    def __sub__(self, other: Cost) -> Cost:
        """Return the cost since an earlier one."""
        return Cost(**{name: getattr(self, name) - getattr(other, name) for name in FIELDS})

    def split(self, n: int) -> list[Cost]:
        """Return `n` costs that add up to this one, as equal as integers allow."""
        shares = [
            {
                name: getattr(self, name) // n + (i < getattr(self, name) % n)
                for name in FIELDS
                if name != "seconds"
            }
            for i in range(n)
        ]
        return [Cost(seconds=self.seconds / n, **share) for share in shares]


FIELDS = tuple(Cost.model_fields)
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
