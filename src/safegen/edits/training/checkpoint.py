"""Training checkpoints: tensors and state in one safetensors file, with the log next to it."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from safegen.core.documents import parse_json, read_json_lines, validate
from safegen.core.errors import DivergedError, FileError
from safegen.core.files import atomic_write, claim_folder
from safegen.core.tensor_files import read_metadata, read_tensors
from safegen.edits.training.config import LogRow
from safegen.edits.training.latents import LATENTS


class CheckpointState(BaseModel):
    """Plain values of a training."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    update: int = Field(ge=0)
    seconds: float = Field(ge=0)
    best_loss: float | None
    """Lowest validation loss; None before the first."""
    validations_without_gain: int = Field(ge=0)
    skipped: int = Field(ge=0)
    """Updates in a row that were skipped."""
    processes: int = Field(default=1, ge=1)
    """Processes that shared the last updates. Others may go on, as draws do not depend on them."""
    scaler: dict[str, int | float] | None
    """State of the gradient scaler, with fp16."""


class _Row(BaseModel):
    values: dict[str, float]

    @model_validator(mode="after")
    def _check_update(self) -> Self:
        if "update" not in self.values:
            raise ValueError("update is required")
        return self


CHECKPOINT_FILE, LOG_FILE = "checkpoint.safetensors", "log.jsonl"


def write_checkpoint(
    directory: Path,
    tensors: Mapping[str, Tensor],
    state: CheckpointState,
    log: Sequence[LogRow],
    *,
    fingerprint: str,
) -> None:
    """Write a checkpoint over the previous one. A killed process leaves one of the two intact.

    Args:
        directory: where to write; it is created if it does not exist.
        tensors: weights, averages and moments.
        state: plain values of the loop.
        log: rows so far.
        fingerprint: identifies data and settings; `read_checkpoint` compares it.

    Raises:
        FileError: the checkpoint cannot be written.
    """
    header = {"fingerprint": fingerprint, "state": state.model_dump_json()}
    # fp16 has infinite gradients while the scaler adapts; JSON has no such number
    finite = [{k: v for k, v in row.items() if math.isfinite(v)} for row in log]
    contiguous = {name: v.detach().cpu().contiguous() for name, v in tensors.items()}
    path = directory / CHECKPOINT_FILE
    with atomic_write(path, replace=True) as temporary:
        try:
            save_file(contiguous, temporary, metadata=header)
        except SafetensorError as error:
            raise FileError(f"{path} cannot be written: {error}") from error
        # The log goes first: resuming drops rows that are newer than the checkpoint.
        with atomic_write(directory / LOG_FILE, replace=True) as temporary_log:
            temporary_log.write_text("".join(json.dumps(row) + "\n" for row in finite), "utf-8")


def read_checkpoint(
    directory: Path,
    *,
    fingerprint: str,
    trained: Mapping[str, Tensor],
    objective: Mapping[str, Tensor],
    ema: bool,
) -> tuple[dict[str, Tensor], CheckpointState, list[LogRow]]:
    """Return the tensors, state and log rows of a checkpoint.

    Args:
        directory: where it was written.
        fingerprint: that of this training.
        trained: parameters by name; the checkpoint must fit their shapes.
        objective: tensors of the objective by name.
        ema: whether averaged weights are needed.

    Raises:
        FileError: there is no checkpoint, it is damaged, or it has another fingerprint.
    """
    state, rows = check_resumable(directory)
    path = directory / CHECKPOINT_FILE
    tensors, header = read_tensors(path)
    if header.get("fingerprint") != fingerprint:
        raise FileError(
            f"the checkpoint in {directory} has other settings, data or weights. "
            "Resume with those of the stopped run."
        )
    _check_tensors(path, tensors, trained, objective, ema)
    return tensors, state, rows


def _check_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    trained: Mapping[str, Tensor],
    objective: Mapping[str, Tensor],
    ema: bool,
) -> None:
    """Check that a checkpoint has finite values for parameters, moments and the objective."""
    kinds = ("weight", "exp_avg", "exp_avg_sq", *(["ema"] if ema else []))
    shapes = {f"{kind}/{name}": p.shape for name, p in trained.items() for kind in kinds}
    shapes |= {f"step/{name}": torch.Size([1]) for name in trained}
    shapes |= {f"state/{name}": value.shape for name, value in objective.items()}
    for name, shape in shapes.items():
        value = tensors.get(name)
        if value is None or value.shape != shape or value.dtype != torch.float32:
            found = "none" if value is None else f"{value.dtype} of shape {tuple(value.shape)}"
            raise FileError(
                f"{name} in {str(path)!r} must be fp32 of shape {tuple(shape)}, got {found}. "
                "Start again without resume"
            )
        if not bool(value.isfinite().all()):
            raise FileError(
                f"{str(path)!r} has NaN or infinite values in {name}. Start again without resume"
            )


@contextmanager
def claim_checkpoints(directory: Path | None) -> Iterator[None]:
    """Keep other processes from writing checkpoints to a directory.

    If the training diverges, checkpoint, log and latents are removed: a resumed run would diverge
    again. They stay if updates were skipped before (`Training.max_skipped`), as a resumed run
    goes on with other draws. Latents are removed as well if the first checkpoint cannot be written.

    Raises:
        FileError: another process works there, or the directory cannot be written.
    """
    if directory is None:
        yield
        return
    with claim_folder(directory):
        try:
            yield
        except DivergedError as error:
            if error.is_resumable:
                raise
            for name in (CHECKPOINT_FILE, LOG_FILE):
                (directory / name).unlink(missing_ok=True)
            shutil.rmtree(directory / LATENTS, ignore_errors=True)
            raise
        except FileError:
            if not (directory / CHECKPOINT_FILE).exists():  # nothing to resume
                shutil.rmtree(directory / LATENTS, ignore_errors=True)
            raise


def check_resumable(directory: Path) -> tuple[CheckpointState, list[LogRow]]:
    """Check that a directory holds a checkpoint, and return its state and log rows.

    No tensor is read.

    Raises:
        FileError: it holds none, or a damaged one.
    """
    path = directory / CHECKPOINT_FILE
    if not path.is_file():
        raise FileError(f"{directory} has no {CHECKPOINT_FILE} to resume. Start without resume.")
    try:
        header = read_metadata(path)
        state = validate(
            CheckpointState, parse_json(header.get("state", ""), f"state of {path}"), str(path)
        )
        rows: list[LogRow] = []
        for number, row in read_json_lines(directory / LOG_FILE):
            validate(_Row, {"values": row}, f"{directory / LOG_FILE} line {number}")
            rows.append(row)
    except FileError as error:
        raise FileError(f"{error}. Start again without resume") from error
    return state, rows
