"""Shards: parts of a job that several processes do, each without the others."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Any, Self

from pydantic import Field, ValidationError, model_serializer, model_validator

from safegen.core.errors import ConfigError
from safegen.core.settings import BaseSettings

MAX_SHARDS = 100_000
"""Largest number of shards."""


class Shard(BaseSettings):
    """One of several parts of a job, written `i/n`: the first of four is `1/4`."""

    index: int = Field(ge=1, le=MAX_SHARDS)
    """Number of the shard, from 1."""
    count: int = Field(ge=1, le=MAX_SHARDS)
    """Number of all shards."""

    @model_validator(mode="before")
    @classmethod
    def _split_text(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        if not (match := re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", value, re.ASCII)):
            raise ValueError(f"shard must be I/N, as 1/4, got {value[:40]!r}")
        return {"index": int(match[1]), "count": int(match[2])}

    @model_validator(mode="after")
    def _check_index(self) -> Self:
        if self.index > self.count:
            raise ValueError(f"shard must be I/N with I from 1 to N, got {self}")
        return self

    @model_serializer
    def _to_text(self) -> str:
        return str(self)

    def __str__(self) -> str:
        """Return `i/n`."""
        return f"{self.index}/{self.count}"

    @classmethod
    def parse(cls, value: Shard | str) -> Shard:
        """Return a shard from `i/n`, or a shard as it is.

        Raises:
            ConfigError: the text is not `i/n`, or `i` is not one of 1 to `n`.
        """
        if isinstance(value, Shard):
            return value
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            rule = str(error.errors()[0]["msg"]).removeprefix("Value error, ")
            if not rule.startswith("shard"):
                rule = f"shard must be I/N with I from 1 to N up to {MAX_SHARDS}, got {value!r}"
            raise ConfigError(f"{rule}. Number the shards 1/N to N/N.") from None

    def select(self, units: Sequence[str]) -> frozenset[int]:
        """Return the positions of the units of work that belong to this shard."""
        owners = deal_units(units, self.count)
        return frozenset(i for i, owner in enumerate(owners) if owner == self.index)


def deal_units(units: Sequence[str], count: int) -> list[int]:
    """Return the index of the shard that each unit of work belongs to, from 1.

    Units are sorted by a hash of their names and dealt in turn. So shards differ by one unit at
    most, and neighbors in a list lie in different shards as often as chance has it.

    Args:
        units: name of each unit, the same for every shard.
        count: number of shards.
    """
    digests = [hashlib.sha256(name.encode()).digest() for name in units]
    owners = [0] * len(units)
    for rank, i in enumerate(sorted(range(len(units)), key=lambda i: (digests[i], i))):
        owners[i] = rank % count + 1
    return owners
