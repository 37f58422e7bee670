"""Training checkpoints: tensors and state in one safetensors file, with the log next to it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from safegen.core.errors import DivergedError, FileError
from safegen.core.files import atomic_write, claim_folder
from safegen.edits.training.config import LogRow

CHECKPOINT_FILE, LOG_FILE = "checkpoint.safetensors", "log.jsonl"


def write_checkpoint(
    directory: Path,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    log: Sequence[LogRow],
    *,
    fingerprint: str,
) -> None:
    """Write a checkpoint over the previous one. A killed process leaves one of the two intact.

    Args:
        directory: where to write; it is created if it does not exist.
        tensors: weights, averages and moments.
        state: plain values.
        log: rows so far.
        fingerprint: identifies data and settings; `read_checkpoint` compares it.

    Raises:
        FileError: the checkpoint cannot be written.
    """
    header = {"fingerprint": fingerprint, "state": json.dumps(state)}
    contiguous = {name: v.detach().cpu().contiguous() for name, v in tensors.items()}
    path = directory / CHECKPOINT_FILE
    with atomic_write(path, replace=True) as temporary:
        try:
            save_file(contiguous, temporary, metadata=header)
        except SafetensorError as error:
            raise FileError(f"{path} cannot be written: {error}") from error
        # The log goes first: resuming drops rows that are newer than the checkpoint.
        with atomic_write(directory / LOG_FILE, replace=True) as temporary_log:
            temporary_log.write_text("".join(json.dumps(row) + "\n" for row in log), "utf-8")


def read_checkpoint(
    directory: Path, *, fingerprint: str
) -> tuple[dict[str, Tensor], dict[str, Any], list[LogRow]]:
    """Return the tensors, state and log rows of a checkpoint.

    Raises:
        FileError: there is no checkpoint, it is damaged, or it has another fingerprint.
    """
    check_resumable(directory)
    try:
        with safe_open(directory / CHECKPOINT_FILE, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        lines = (directory / LOG_FILE).read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
    except (SafetensorError, OSError, ValueError) as error:  # ValueError: the log is no JSON
        raise FileError(
            f"the checkpoint in {directory} is damaged ({error}). Start again without resume."
        ) from error
    if header.get("fingerprint") != fingerprint:
        raise FileError(
            f"the checkpoint in {directory} has other settings, data or weights. "
            "Resume with those of the stopped run."
        )
    return tensors, json.loads(header["state"]), rows


@contextmanager
def claim_checkpoints(directory: Path | None) -> Iterator[None]:
    """Keep other processes from writing checkpoints to a directory.

    If the training diverges, the checkpoint and the log are removed: a resumed run would diverge
    again.

    Raises:
        FileError: another process works there, or the directory cannot be written.
    """
    if directory is None:
        yield
        return
    with claim_folder(directory):
        try:
            yield
        except DivergedError:
            for name in (CHECKPOINT_FILE, LOG_FILE):
                (directory / name).unlink(missing_ok=True)
            raise


def check_resumable(directory: Path) -> None:
    """Check that a directory holds a checkpoint.

    Raises:
        FileError: it holds none.
    """
    if not (directory / CHECKPOINT_FILE).is_file():
        raise FileError(f"{directory} has no {CHECKPOINT_FILE} to resume. Start without resume.")
