"""Reading and writing of safetensors files, which may be of unknown origin."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
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
DTYPE_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}
"""Names of types in a safetensors header, in the order in which the library sorts them."""
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()} | {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "C64": torch.complex64,
}
"""Type of torch by its name in a safetensors header."""


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is computed when it is written or hashed, so that one is in memory at a time.

    Example:
        >>> half = LazyTensor.of([weight], lambda values: values[0].half())
        >>> write_tensors(Path("half.safetensors"), {"weight": half}, {})
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]
    """Return the values."""

    @classmethod
    def of(
        cls, sources: Sequence[Tensor | LazyTensor], function: Callable[[list[Tensor]], Tensor]
    ) -> LazyTensor:
        """Return the lazy result of a function of others. Its shape and type are known now."""
        empty = [torch.empty(s.shape, dtype=s.dtype, device="meta") for s in sources]
        result = function(empty)
        return cls(
            tuple(result.shape), result.dtype, lambda: function([values_of(s) for s in sources])
        )


Tensors: TypeAlias = Mapping[str, Tensor | LazyTensor]
"""Tensors by name, some of which may be lazy."""


def values_of(tensor: Tensor | LazyTensor) -> Tensor:
    """Return the values of a tensor that may be lazy."""
    return tensor.load() if isinstance(tensor, LazyTensor) else tensor


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


def open_tensors(path: Path) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    """Return the tensors of a safetensors file, each to be read when it is used, and the metadata.

    A tensor is read into memory of its own. Those of `read_tensors` are mapped: all pages that were
    ever used stay with the process as long as one tensor does.

    Raises:
        FileError: see `read_tensors`.
    """
    header = read_header(path)
    try:
        with safe_open(path, framework="pt") as file:  # checks sizes and offsets
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise _damaged(path, first_line(error)) from error
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
    tensors = {}
    for name in sorted(header.keys() - {"__metadata__"}):
        entry = header[name]
        if (dtype := _DTYPES.get(entry["dtype"])) is None:
            raise _damaged(path, f"torch has no type {entry['dtype']}, that of {name}")
        shape, offset = tuple(entry["shape"]), start + entry["data_offsets"][0]
        read = partial(_read_tensor, path, offset, shape, dtype)
        tensors[name] = LazyTensor(shape, dtype, read)
    return tensors, metadata


def _read_tensor(path: Path, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return the tensor at a place of a file."""
    value = torch.empty(shape, dtype=dtype)
    rest = tensor_bytes(value)
    try:
        with path.open("rb") as file:
            file.seek(offset)
            while len(rest) and (count := file.readinto(rest)):
                rest = rest[count:]
    except OSError as error:
        raise _damaged(path, first_line(error)) from error
    if len(rest):
        raise _damaged(path, "it became shorter while it was read")
    return value


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
    path: Path, tensors: Tensors, header: Mapping[str, str], *, replace: bool = False
) -> None:
    """Write tensors and a header to a safetensors file, which is new unless `replace` is on.

    Raises:
        FileError: `path` exists and `replace` is off, or it cannot be written.
    """
    with atomic_write(path, replace=replace) as temporary:
        stream_tensors(temporary, tensors, header)


def stream_tensors(path: Path, tensors: Tensors, header: Mapping[str, str]) -> None:
    """Write a safetensors file in place, one tensor after the other.

    The order is that of the safetensors library: the widest type first, then by name. Equal tensors
    and headers give equal bytes.

    Raises:
        OSError: it cannot be written. What is there then is no complete file.
        FileError: the format has no name for a type.
    """
    kinds, offset = list(DTYPE_NAMES), 0
    for name, value in tensors.items():
        if value.dtype not in kinds:
            raise FileError(f"{path} cannot be written: {name} has the type {value.dtype}")
    names = sorted(tensors, key=lambda name: (-kinds.index(tensors[name].dtype), name))
    entries: dict[str, object] = {"__metadata__": dict(header)} if header else {}
    for name in names:
        value = tensors[name]
        end = offset + torch.Size(value.shape).numel() * value.dtype.itemsize
        entries[name] = {
            "dtype": DTYPE_NAMES[value.dtype],
            "shape": list(value.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            file.write(tensor_bytes(values_of(tensors[name])))


def tensor_bytes(value: Tensor) -> memoryview:
    """Return the bytes of a tensor, without a copy of one that is dense and on the CPU."""
    flat = value.detach().cpu().contiguous().reshape(-1)
    # numpy has no bfloat16, and an empty tensor no view
    return flat.view(torch.uint8).numpy().data if len(flat) else memoryview(b"")
