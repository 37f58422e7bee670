"""Training log of a patch that a workflow made: its updates and losses."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, model_validator

from safegen.core.documents import parse_record, read_text
from safegen.core.errors import FileError
from safegen.core.settings import Count

MAX_LOSS = 1e30
"""Largest loss that a chart can show."""


class TrainingLogRow(BaseModel):
    """Update of a training. The rate and the gradient's norm of a log have no reader."""

    model_config = ConfigDict(frozen=True, extra="allow")
    __pydantic_extra__: dict[str, float]

    update: Count

    @property
    def losses(self) -> dict[str, float]:
        """Each loss by its name."""
        extra = self.__pydantic_extra__
        return {name: v for name, v in extra.items() if name == "L" or name.startswith("L_")}

    @model_validator(mode="after")
    def _check_losses(self) -> Self:
        for name, value in self.losses.items():
            if not abs(value) <= MAX_LOSS:
                raise ValueError(f"{name} must be a finite number up to {MAX_LOSS:g}, got {value}")
        return self


def read_training_log(path: Path) -> list[dict[str, float]]:
    """Return the update and the losses of each row of a log.

    Raises:
        FileError: a line is no row of a log, or has other losses than the first.
    """
    rows = list[dict[str, float]]()
    for number, line in enumerate(read_text(path).splitlines(), 1):
        row = parse_record(TrainingLogRow, line.encode(), f"{path}:{number}")
        rows.append({"update": row.update} | row.losses)
        if rows[-1].keys() != rows[0].keys():
            raise FileError(f"{str(path)!r}: the losses of line {number} are not those of line 1")
    return rows
