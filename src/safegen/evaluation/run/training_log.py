"""Training log of a patch that a workflow made: its updates, losses and figures of rollouts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, model_validator

from safegen.core.documents import parse_record, read_text
from safegen.core.errors import FileError
from safegen.core.settings import Count

MAX_FIGURE = 1e30
"""Largest loss or other figure that a chart can show."""
KINDS = ("concept", "benign")
"""Kinds of prompts in the figures of a rollout: those that ask for the concept, and others."""
ROLLOUT = re.compile(
    r"reward_\w+_(concept|benign)|(judge|held_out)_unsafe_(concept|benign)(_n)?"
    r"|diversity|alignment_benign|passes"
)
"""Figures of a training by reward that are shown."""


LOG, LOG_SUFFIX = "log.jsonl", ".log.jsonl"
"""Name of the log of a training in a folder, and what is added to a patch's name beside it."""


def is_loss(name: str) -> bool:
    """Return whether a figure of a log is a loss."""
    return name == "L" or name.startswith("L_")


class TrainingLogRow(BaseModel):
    """Update of a training. The rate and the gradient's norm of a log have no reader."""

    model_config = ConfigDict(frozen=True, extra="allow")
    __pydantic_extra__: dict[str, float]

    update: Count

    @property
    def losses(self) -> dict[str, float]:
        """Each loss by its name; none for an update that was skipped."""
        extra = self.__pydantic_extra__
        return {name: v for name, v in extra.items() if is_loss(name)}

    @property
    def rollout(self) -> dict[str, float]:
        """Figures of the rollout that the update learned from, by name."""
        return {name: v for name, v in self.__pydantic_extra__.items() if ROLLOUT.fullmatch(name)}

    @property
    def is_skipped(self) -> bool:
        """Whether the weights stayed, because a loss or the gradient was not finite."""
        return "skipped" in self.__pydantic_extra__

    @model_validator(mode="after")
    def _check_figures(self) -> Self:
        for name, value in (self.losses | self.rollout).items():
            if not abs(value) <= MAX_FIGURE:
                raise ValueError(
                    f"{name} must be a finite number up to {MAX_FIGURE:g}, got {value}"
                )
        return self


def read_training_log(path: Path) -> list[dict[str, float]]:
    """Return the update, the losses and the figures of its rollout of each row of a log.

    Updates that were skipped are left out.

    Raises:
        FileError: a line is no row of a log, or has other losses than the first.
    """
    rows, losses = list[dict[str, float]](), None
    for number, line in enumerate(read_text(path).splitlines(), 1):
        row = parse_record(TrainingLogRow, line.encode(), f"{path}:{number}")
        if row.is_skipped:
            continue
        losses = losses or row.losses.keys()
        if row.losses.keys() != losses:
            raise FileError(f"{str(path)!r}: the losses of line {number} are not those of line 1")
        rows.append({"update": row.update} | row.losses | row.rollout)
    return rows


def find_training_log(patch: Path, metadata: Mapping[str, Any]) -> list[dict[str, float]]:
    """Return the rows of the log that `safegen edit` wrote beside a patch; empty if there is none.

    A log that cannot be read, or that ends in other losses than the metadata of the patch state, is
    not of this patch.

    Args:
        patch: the patch file.
        metadata: its metadata as plain values.
    """
    log = patch.with_name(patch.name + LOG_SUFFIX)
    try:
        rows = read_training_log(log) if log.is_file() else []
    except FileError:
        return []
    losses = metadata.get("losses")
    is_own = rows and losses == {key: v for key, v in rows[-1].items() if is_loss(key)}
    return rows if is_own else []
