"""Active LoRAs: their output is added to each module's, and no weight changes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from safegen.core.errors import SafegenWarning
from safegen.models.model import Model
from safegen.patches.lora_reader import LoraFactors
from safegen.patches.patch import warn_large_change


class AdapterWarning(SafegenWarning):
    """Active LoRAs interact, or a part of one is left out."""


def lora_forward(module: nn.Module, inputs: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """Return up(down(x)), with the module's stride, padding and dilation if it is a convolution.

    Args:
        module: linear or convolutional.
        inputs: input of the module.
        down: (r, in[, h, w]).
        up: (out, r[, 1, 1]).
    """
    if isinstance(module, nn.Conv2d):
        hidden = F.conv2d(inputs, down, None, module.stride, module.padding, module.dilation)
        return F.conv2d(hidden, up)
    return F.linear(F.linear(inputs, down), up)


@contextmanager
def active_loras(model: Model, loras: Sequence[tuple[LoraFactors, float]]) -> Iterator[None]:
    """Keep LoRAs active inside the block: W x + sum of scale * up(down(x)) (arXiv:2106.09685).

    The weights stay as they are, patches on them included. The order of the LoRAs matters for
    rounding only.

    Args:
        model: the model, with or without patches on it.
        loras: factors that were read for this model, and the scale of each.

    Warns:
        AdapterWarning: several change the same weights, or one has a part for the text encoder,
            which is left out.
        LargeChangeWarning: a LoRA adds more than `LARGE_CHANGE` times the size of the weights.
    """
    for lora, scale in loras:
        warn_large_change("LoRA", lora.relative_change(model, scale))
    _warn_of_interactions([lora for lora, _ in loras])
    hooks = []
    try:
        for lora, scale in loras:
            for name, (down, up, strength) in lora.factors.items():
                module = model.denoiser.get_submodule(name.removesuffix(".weight"))
                weight = module.get_parameter("weight")
                factors = down.to(weight), up.to(weight)
                hook = partial(_add_output, model, *factors, scale * strength)
                hooks.append(module.register_forward_hook(hook))
        yield
    finally:
        for handle in hooks:
            handle.remove()


@contextmanager
def disabled_loras(model: Model) -> Iterator[None]:
    """Turn off the active LoRAs of a model inside the block."""
    model.has_disabled_loras, before = True, model.has_disabled_loras
    try:
        yield
    finally:
        model.has_disabled_loras = before


def _warn_of_interactions(loras: Sequence[LoraFactors]) -> None:
    """Warn of LoRAs that change the same weights, and of parts that are left out."""
    seen: set[str] = set()
    shared: set[str] = set()
    for lora in loras:
        shared |= seen & lora.factors.keys()
        seen |= lora.factors.keys()
        if lora.text_encoder_tensors:
            warnings.warn(
                f"{lora.file} also has {lora.text_encoder_tensors} tensors for the text encoder; "
                "they are left out",
                AdapterWarning,
                stacklevel=5,
            )
    if shared:
        warnings.warn(
            f"{len(shared)} weights are changed by more than one LoRA, first {min(shared)}. The "
            "changes add up, and one may weaken another: "
            "measure them together",
            AdapterWarning,
            stacklevel=5,
        )


def _add_output(
    model: Model,
    down: Tensor,
    up: Tensor,
    scale: float,
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    output: Tensor,
) -> Tensor:
    if model.has_disabled_loras:
        return output
    return output + scale * lora_forward(module, inputs[0], down, up)
