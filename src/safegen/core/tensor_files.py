"""Reading and writing of safetensors files, which may be of unknown origin."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from safegen.core.documents import check_file, parse_json
from safegen.core.errors import FileError, first_line
from safegen.core.files import atomic_write
from safegen.core.text import has_control

WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""Types of the tensors in a patch. fp64 is refused: no model holds its values."""
FACTOR_DTYPES = (torch.float64, *WEIGHT_DTYPES)
"""Types of the factors in a LoRA, multiplied in fp64, and of weights that are converted."""
MAX_HEADER_BYTES = 100_000_000
"""Largest header that the safetensors format allows."""
MAX_NAME_LENGTH = 500
"""Longest name of a tensor, in characters."""


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the header's metadata of a safetensors file.

    Nothing is allocated for tensors that the file does not hold: their sizes must add up to that of
    the file.

    Raises:
        FileError: it cannot be read, is damaged, or has a name twice or one that cannot be printed.
    """
    names = read_header(path).keys() - {"__metadata__"}
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in sorted(names)}, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise _damaged(path, first_line(error)) from error


def read_metadata(path: Path) -> dict[str, str]:
    """Return the header's metadata of a safetensors file, without its tensors.

    Raises:
        FileError: see `read_tensors`.
    """
    read_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise _damaged(path, first_line(error)) from error


def read_header(path: Path) -> dict[str, Any]:
    """Return the header of a safetensors file: an entry for each tensor, and `__metadata__`.

    Raises:
        FileError: see `read_tensors`. Sizes and offsets are not checked here.
    """
    size = check_file(path)
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little") if size >= 8 else 0
            if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
                raise _damaged(path, f"it has {size} bytes, its header claims {length}")
            text = file.read(length)
    except OSError as error:
        raise _damaged(path, first_line(error)) from error
    header = parse_json(text, f"header of {path}", unique_keys=True)
    if not isinstance(header, dict):
        raise _damaged(path, "its header is no JSON object")
    for name in header:
        if has_control(name) or not 0 < len(name) <= MAX_NAME_LENGTH:
            raise FileError(
                f"names of tensors in {str(path)!r} must have 1 to {MAX_NAME_LENGTH} printable "
                f"characters, got {name[:80]!r}. Do not trust this file"
            )
    return header


def check_weights(
    tensors: Mapping[str, Tensor], path: Path, dtypes: Sequence[torch.dtype] = WEIGHT_DTYPES
) -> None:
    """Check that the tensors of a patch or LoRA are finite numbers of the given types.

    Raises:
        FileError: one has another type, no values, or NaN or infinite ones.
    """
    for name, value in tensors.items():
        if value.dtype not in dtypes:
            fp64 = "fp64, " if torch.float64 in dtypes else ""
            raise FileError(
                f"tensors of {str(path)!r} must be {fp64}fp32, fp16 or bf16, got "
                f"{str(value.dtype).removeprefix('torch.')} in {name}. Make or fetch it again"
            )
        if not value.numel():
            raise FileError(f"tensors of {str(path)!r} must have values, got none in {name}")
        if not bool(value.isfinite().all()):
            raise FileError(
                f"{str(path)!r} has NaN or infinite values in {name}. Make or fetch it again"
            )


def check_pickle(path: Path) -> None:
    """Check that a pickled file of weights is a regular file that holds no compressed entries.

    torch writes none; a small file of them could ask for any amount of memory.

    Raises:
        FileError: it is another kind of file, or has compressed entries.
    """
    check_file(path)
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            kinds = {entry.compress_type for entry in archive.infolist()}
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise FileError(f"{str(path)!r} is damaged: {first_line(error)}") from error
    if kinds - {zipfile.ZIP_STORED}:
        raise FileError(f"entries of {str(path)!r} must not be compressed. Get it as safetensors")


def _damaged(path: Path, reason: str) -> FileError:
    return FileError(f"{str(path)!r} is not a readable safetensors file: {reason}")


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], header: dict[str, str], *, replace: bool = False
) -> None:
    """Write tensors and a header to a safetensors file, which is new unless `replace` is on.

    Raises:
        FileError: `path` exists and `replace` is off, or it cannot be written.
    """
    contiguous = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    with atomic_write(path, replace=replace) as tmp:
        try:
            save_file(contiguous, tmp, metadata=header)
        except SafetensorError as error:
            raise FileError(f"{path} cannot be written: {error}") from error
