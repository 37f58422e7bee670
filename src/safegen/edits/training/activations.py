"""Fewer activations kept for the backward pass, with the same values and gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from diffusers.models.attention import FeedForward
from torch import Tensor, nn
from torch.nn.grad import conv2d_input
from torch.utils.checkpoint import checkpoint


@contextmanager
def reduce_activations(denoiser: nn.Module) -> Iterator[None]:
    """Keep fewer activations of frozen layers inside the block.

    A frozen convolution keeps no input, which only the gradient of its weight needs. A frozen
    feed-forward layer is computed again in the backward pass: it is cheap and holds half of the
    activations of a transformer block.

    Args:
        denoiser: the network; its trained parameters require gradients.
    """
    changed = []
    for layer in denoiser.modules():
        if any(p.requires_grad for p in layer.parameters()) or "forward" in vars(layer):
            continue
        if type(layer) is nn.Conv2d and _pads_with_zeros(layer):
            vars(layer)["forward"] = partial(_frozen_convolution, layer)
        elif type(layer) is FeedForward:
            options: Any = {"use_reentrant": False, "preserve_rng_state": False}
            vars(layer)["forward"] = partial(checkpoint, layer.forward, **options)
        else:
            continue
        changed.append(layer)
    try:
        yield
    finally:
        for layer in changed:
            del vars(layer)["forward"]


def _pads_with_zeros(layer: nn.Conv2d) -> bool:
    return layer.padding_mode == "zeros" and not isinstance(layer.padding, str)


def _frozen_convolution(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """Return the output of a convolution that keeps no input."""
    result: Tensor = _FrozenConvolution.apply(x, layer.weight, layer.bias, layer)  # type: ignore[no-untyped-call]
    return result


class _FrozenConvolution(torch.autograd.Function):
    """Convolution with a gradient of its input only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: nn.Conv2d) -> Any:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.dtype, ctx.layer = x.shape, x.dtype, layer
        return layer._conv_forward(x.to(weight.dtype), weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (weight,) = ctx.saved_tensors
        layer = ctx.layer
        own = conv2d_input(
            ctx.shape,
            weight,
            gradient,
            stride=layer.stride,
            padding=layer.padding,
            dilation=layer.dilation,
            groups=layer.groups,
        )
        return own.to(ctx.dtype), None, None, None
