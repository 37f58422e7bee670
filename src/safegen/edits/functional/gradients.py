"""Gradients that a training step leaves out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def detach_start_token(denoiser: nn.Module, *, enabled: bool = True) -> Iterator[None]:
    """Make the start token's keys and values in cross-attention constants inside the block.

    Outputs do not change; the weights get no gradient from that token.

    Args:
        denoiser: the network in training.
        enabled: whether anything is done.
    """
    hooks = [
        module.register_forward_hook(_detach_first_row)
        for name, module in denoiser.named_modules()
        if enabled and name.endswith((".attn2.to_k", ".attn2.to_v"))
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _detach_first_row(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return torch.cat([output[:, :1].detach(), output[:, 1:]], dim=1)
