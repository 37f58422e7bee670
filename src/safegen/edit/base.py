"""What every edit is: frozen settings and one verb."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from safegen.concept import Concept
from safegen.data.triplets import Triplets
from safegen.edit.loop import Report
from safegen.models.model import Model
from safegen.models.patch import Patch


class Edit(BaseModel, ABC):
    """Settings of one edit. Build it, apply it, write it to JSON; never change it."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @classmethod
    @abstractmethod
    def preset(cls, name: str, *, concept: Concept | None = None, **changes: Any) -> Edit:  # noqa: ANN401 - any setting
        """Return the named settings, with what a concept says of itself, and with some of them changed."""

    @abstractmethod
    def apply(
        self,
        model: Model,
        triplets: Triplets,
        *,
        folder: Path | None = None,
        resume: bool = False,
        report: Report | None = None,
    ) -> Patch:
        """Return new values for some weights of `model`; `model` itself is not touched."""
