"""A training's state in a folder: tensors in a safetensors file with the rest in its header, and the log beside it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from safegen.core.errors import FileError
from safegen.edits.training.config import LogRow

FILE, LOG = "checkpoint.safetensors", "log.jsonl"


def write_checkpoint(
    folder: Path,
    tensors: Mapping[str, Tensor],
    facts: Mapping[str, Any],
    log: Sequence[LogRow],
    *,
    fingerprint: str,
) -> None:
    """Write a training's state in the place of the one before; a kill leaves one of the two whole.

    Args:
        folder: where; it is made when it is not there.
        tensors: what is to be kept exactly.
        facts: plain values.
        log: rows so far.
        fingerprint: names data and settings, to be asked for by the reader.

    Raises:
        FileError: it cannot be written.
    """
    path = folder / FILE
    tmp, rows = (
        path.with_name(f".{path.name}.tmp-{os.getpid()}"),
        folder / f".{LOG}.tmp-{os.getpid()}",
    )
    header = {"fingerprint": fingerprint, "facts": json.dumps(facts)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        rows.write_text("".join(json.dumps(row) + "\n" for row in log), encoding="utf-8")
        save_file(
            {k: v.detach().cpu().contiguous() for k, v in tensors.items()}, tmp, metadata=header
        )
        rows.replace(
            folder / LOG
        )  # the log first: a kill between the two leaves rows that resume cuts off
        tmp.replace(path)
    except (OSError, SafetensorError) as error:
        raise FileError(f"the checkpoint {path} cannot be written: {error}") from error
    finally:
        for leftover in (tmp, rows):
            with suppress(OSError):
                leftover.unlink(missing_ok=True)
        with suppress(OSError):
            folder.rmdir()  # goes only if nothing is in it: the first checkpoint failed


def read_checkpoint(
    folder: Path, *, fingerprint: str
) -> tuple[dict[str, Tensor], dict[str, Any], list[LogRow]]:
    """Return the tensors, facts and rows that `write_checkpoint` wrote.

    Raises:
        FileError: there is none, it is damaged, or of another fingerprint.
    """
    check_resumable(folder)
    try:
        with safe_open(folder / FILE, framework="pt") as file:
            header, tensors = file.metadata() or {}, {k: file.get_tensor(k) for k in file.keys()}
        rows = [
            json.loads(line) for line in (folder / LOG).read_text(encoding="utf-8").splitlines()
        ]
    except (
        SafetensorError,
        OSError,
        ValueError,
    ) as error:  # ValueError: the log is not JSON, or not UTF-8
        raise FileError(
            f"the checkpoint in {folder} is damaged ({error}); start again without resume"
        ) from error
    if header.get("fingerprint") != fingerprint:
        raise FileError(
            f"the checkpoint in {folder} is of other settings, data or weights; resume with those it was started with"
        )
    return tensors, json.loads(header["facts"]), rows


def check_resumable(folder: Path) -> None:
    """Refuse to resume where nothing is.

    Raises:
        FileError: the folder has no checkpoint.
    """
    if not (folder / FILE).is_file():
        raise FileError(f"there is nothing to resume in {folder}: it has no {FILE}")
