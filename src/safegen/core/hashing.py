"""SHA-256 digests of weights and settings, without an import of diffusers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import torch
from torch import Tensor


def hash_tensors(tensors: Mapping[str, Tensor], *, dtype: torch.dtype | None = None) -> str:
    """Return the SHA-256 over names, shapes, types and bytes of tensors, sorted by name.

    Args:
        tensors: values by name.
        dtype: type to convert each tensor to first, so that equal values of two types agree.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().to(dtype).contiguous()
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        if value.numel():
            digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def hash_settings(settings: object) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of plain values, as sorted JSON."""
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
