"""Gradients that a training step leaves out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn


@contextmanager
def detach_start_token(denoiser: nn.Module, *, enabled: bool = True) -> Iterator[None]:
    """Make the keys and values of the start token of text constants inside the block.

    Outputs do not change; the weights get no gradient from that token.

    Args:
        denoiser: the network in training.
        enabled: whether anything is done.
    """
    hooks = [
        module.register_forward_hook(_detach_first_row)
        for name, module in denoiser.named_modules()
        if enabled and name.endswith(_text_layers(denoiser))
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _text_layers(denoiser: nn.Module) -> tuple[str, ...]:
    """Return the endings of the keys and values of a text that has a start token.

    Of SD 3 it is that of CLIP. FLUX reads the tokens of T5, which has none.
    """
    if isinstance(denoiser, UNet2DConditionModel):
        return (".attn2.to_k", ".attn2.to_v")
    return (".add_k_proj", ".add_v_proj") if isinstance(denoiser, SD3Transformer2DModel) else ()


def _detach_first_row(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return torch.cat([output[:, :1].detach(), output[:, 1:]], dim=1)
