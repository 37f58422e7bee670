"""SHA-256 digests of weights and settings, without an import of diffusers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import torch
from torch import Tensor

from safegen.core.tensor_files import Tensors, tensor_bytes, values_of

CHECKSUM_BYTES = 256
"""Bytes of a weight of which `HashMemory` compares the sum."""


def hash_tensors(tensors: Tensors, *, dtype: torch.dtype | None = None) -> str:
    """Return the SHA-256 over names, shapes, types and bytes of tensors, sorted by name.

    Args:
        tensors: values by name.
        dtype: type to convert each tensor to first, so that equal values of two types agree.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = values_of(tensors[name]).detach().cpu().to(dtype)
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        digest.update(tensor_bytes(value))
    return digest.hexdigest()


class HashMemory:
    """SHA-256 of weights that is taken once for equal values.

    Whether values are equal is never assumed: each call reads all of them. A value counts as equal
    if its name, shape and type, torch's count of its changes, the sum of every 256 bytes, and that
    of every place in them are. Code that writes past torch's count (`weight.data`) is seen by sums.

    Example:
        >>> memory = HashMemory()
        >>> memory.hash(state) == memory.hash(state) == hash_tensors(state)
        True
    """

    def __init__(self) -> None:
        """Start with no hash."""
        self._hashes: dict[str, str] = {}

    def hash(self, tensors: Mapping[str, Tensor], *, dtype: torch.dtype | None = None) -> str:
        """Return `hash_tensors` of values, remembered if they are equal to earlier ones."""
        digest = hashlib.sha256(f"{dtype}\n".encode())
        for name in sorted(tensors):
            value = tensors[name].detach()
            version = 0 if value.is_inference() else value._version
            digest.update(f"{name} {tuple(value.shape)} {value.dtype} {version}\n".encode())
            for sums in _checksums(value):
                digest.update(tensor_bytes(sums))
        key = digest.hexdigest()
        if key not in self._hashes:
            self._hashes[key] = hash_tensors(tensors, dtype=dtype)
        return self._hashes[key]


def _checksums(value: Tensor) -> tuple[Tensor, ...]:
    """Return sums of 64-bit integers, and the bytes that are left over.

    They are those of every 256 bytes, and over these blocks that of each place in them, which
    shows exchanged values.
    """
    flat = value.contiguous().reshape(-1)
    if not len(flat):
        return (flat,)
    if flat.storage_offset() * flat.itemsize % 8:  # as mapped from a file
        flat = flat.clone()
    data = flat.view(torch.uint8)
    whole = len(data) // CHECKSUM_BYTES * CHECKSUM_BYTES
    blocks = data[:whole].view(torch.int64).view(-1, CHECKSUM_BYTES // 8)
    return blocks.sum(1), blocks.sum(0), data[whole:]


def hash_settings(settings: object) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of plain values, as sorted JSON."""
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
