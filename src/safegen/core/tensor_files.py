"""Reading and writing of safetensors files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from safegen.core.errors import FileError
from safegen.core.files import atomic_write


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the header of a safetensors file.

    Raises:
        FileError: it cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise FileError(f"{path} is not a readable safetensors file: {error}") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: dict[str, str]) -> None:
    """Write tensors and a header to a new safetensors file.

    Raises:
        FileError: `path` exists or cannot be written.
    """
    contiguous = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    with atomic_write(path) as tmp:
        try:
            save_file(contiguous, tmp, metadata=header)
        except SafetensorError as error:
            raise FileError(f"{path} cannot be written: {error}") from error
