"""LoRAs active beside a model's weights: each module's answer gets theirs added, and no weight changes (arXiv:2106.09685, 2412.00357)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from safegen.core.errors import SafegenWarning
from safegen.models.model import Model
from safegen.patches.lora import LoraFactors


class AdapterWarning(SafegenWarning):
    """Something that whoever puts LoRAs beside a model should know."""


def lora_forward(module: nn.Module, given: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """Return up(down(x)), with a convolution's stride and padding where the module is one.

    Args:
        module: linear or convolutional.
        given: what it was given.
        down: (r, in[, h, w]).
        up: (out, r[, 1, 1]).
    """
    if isinstance(module, nn.Conv2d):
        return F.conv2d(
            F.conv2d(given, down, None, module.stride, module.padding, module.dilation), up
        )
    return F.linear(F.linear(given, down), up)


@contextmanager
def active_loras(model: Model, loras: Sequence[tuple[LoraFactors, float]]) -> Iterator[None]:
    """Keep LoRAs active inside the block: W x + sum of scale * up(down(x)). Weights are never touched, so nothing is to be undone.

    With one, it is what a patch of it would be (`load_lora`); several add up, in any order but for
    rounding; a patch beneath them counts as the weights do.

    Args:
        model: the model, with or without patches on it.
        loras: factors read for this model, and the scale of each.

    Warns:
        AdapterWarning: several change the same weights, or one has a part for the text encoder,
            which is left out.
    """
    warn_of_shared([factors.change for factors, _ in loras])
    for factors, _ in loras:
        if factors.left_out:
            warnings.warn(
                f"{factors.file} also has {factors.left_out} tensors for the text encoder; they are left out",
                AdapterWarning,
                stacklevel=4,
            )
    hooks = []
    try:
        for factors, scale in loras:
            for name, (down, up, strength) in factors.change.items():
                module = model.denoiser.get_submodule(name.removesuffix(".weight"))
                weight = module.get_parameter("weight")
                hooks.append(
                    module.register_forward_hook(
                        partial(_add, down.to(weight), up.to(weight), scale * strength)
                    )
                )
        yield
    finally:
        for hook in hooks:
            hook.remove()


def warn_of_shared(changes: Sequence[Mapping[str, object]]) -> None:
    """Warn where several LoRAs change the same weights: their changes add up, and one can weaken another.

    Warns:
        AdapterWarning: they do.
    """
    seen: set[str] = set()
    twice: set[str] = set()
    for change in changes:
        twice |= seen & change.keys()
        seen |= change.keys()
    if twice:
        warnings.warn(
            f"{len(twice)} weights are changed by more than one LoRA, {min(twice)} first; the changes add up, and one may weaken another: "
            "measure them together",
            AdapterWarning,
            stacklevel=5,
        )


def _add(
    down: Tensor,
    up: Tensor,
    scale: float,
    module: nn.Module,
    given: tuple[Tensor, ...],
    said: Tensor,
) -> Tensor:
    return said + scale * lora_forward(module, given[0], down, up)
