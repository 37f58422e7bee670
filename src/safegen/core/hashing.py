"""The identity of weights.

Apart from the models, so that a judge need not load diffusers for it.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def hash_tensors(tensors: dict[str, Tensor], *, dtype: torch.dtype | None = None) -> str:
    """Return a SHA-256 over names, shapes, types and bytes, whatever the order.

    With `dtype`, as if all were of that type.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().to(dtype).contiguous()
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        digest.update(
            value.reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
        )
    return digest.hexdigest()
