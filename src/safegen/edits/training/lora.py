"""Trainable parameters of an edit: the selected weights, or a LoRA for each of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from safegen.core.errors import ConfigError
from safegen.models.model import Model
from safegen.models.selectors import select_parameters
from safegen.patches.active_lora import lora_forward

ADAPTER_NAME = "safegen_lora"
"""Name of the LoRA as a submodule of the module it adapts."""


class LoraLayer(nn.Module):
    """LoRA of a linear or convolutional module: adds scale * up(down(x)) to its output.

    Hu et al. 2021 (arXiv:2106.09685).
    """

    def __init__(
        self, module: nn.Linear | nn.Conv2d, rank: int, scale: float, generator: torch.Generator
    ) -> None:
        """Sample `down` from a normal distribution of deviation 1 / rank; `up` is zero."""
        super().__init__()
        shape, device = module.weight.shape, module.weight.device
        self.rank, self.scale = min(rank, shape[0], shape[1:].numel()), scale
        down = torch.randn(self.rank, *shape[1:], generator=generator) / rank
        up = torch.zeros(shape[0], self.rank, *(1,) * (len(shape) - 2), device=device)
        self.down, self.up = nn.Parameter(down.to(device)), nn.Parameter(up)

    def forward(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Return the output of the adapted module; the signature is that of a forward hook."""
        return output + self.scale * lora_forward(module, args[0], self.down, self.up)


@dataclass(frozen=True)
class Trainable:
    """Parameters to train, and how they become new weights of the network."""

    names: tuple[str, ...]
    """Names of the trained parameters in the network."""
    adapters: Mapping[str, tuple[str, float]]
    """Name and scale of the LoRA of each adapted weight; empty if the weights are trained."""
    base_weights: Mapping[str, Tensor]
    """Adapted weights before training."""

    def merge(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the new weights by name: `tensors`, or W + scale * up @ down for a LoRA."""
        if not self.adapters:
            return dict(tensors)
        merged = {}
        for name, (adapter, scale) in self.adapters.items():
            base = self.base_weights[name]
            down, up = tensors[f"{adapter}.down"].double(), tensors[f"{adapter}.up"].double()
            delta = scale * (up.flatten(1) @ down.flatten(1)).reshape(base.shape)
            merged[name] = (base.double().to(delta.device) + delta).float()
        return merged


@contextmanager
def trainable_parameters(
    model: Model,
    selector: str,
    *,
    rank: int | None,
    alpha: float | None,
    seed: int,
    network: nn.Module | None = None,
) -> Iterator[Trainable]:
    """Yield the parameters to train. LoRAs are attached inside the block and removed after it.

    Args:
        model: the model.
        selector: which weights.
        rank: rank of the LoRAs; None trains the weights themselves.
        alpha: the LoRAs are scaled by alpha / rank. Default: the rank, a scale of 1.
        seed: seed of the initial factors.
        network: the network that the weights are of. Default: the denoiser.

    Raises:
        ConfigError: the selector matches no linear and no convolutional weight.
    """
    _ = model.hash  # computed and cached before anything is attached
    network = model.denoiser if network is None else network
    names = select_parameters(network, selector)
    if rank is None:
        yield Trainable(tuple(names), {}, {})
        return
    generator, scale = torch.Generator("cpu").manual_seed(seed), (alpha or rank) / rank
    modules = {}
    for name in names:
        path, _, kind = name.rpartition(".")
        module = network.get_submodule(path)
        if kind == "weight" and isinstance(module, nn.Linear | nn.Conv2d):
            modules[path] = module
    if not modules:
        raise ConfigError(
            f"selector {selector!r} must match a linear or convolutional weight for a LoRA, "
            "got none. Choose another selector, or leave rank out."
        )
    hooks, adapters = [], {}
    try:
        for path, module in modules.items():
            lora = LoraLayer(module, rank, scale, generator)
            module.add_module(ADAPTER_NAME, lora)
            hooks.append(module.register_forward_hook(lora.forward))
            adapters[f"{path}.weight"] = (f"{path}.{ADAPTER_NAME}", scale)
        factors = tuple(f"{name}.{f}" for name, _ in adapters.values() for f in ("down", "up"))
        base_weights = {f"{path}.weight": m.weight.detach() for path, m in modules.items()}
        yield Trainable(factors, adapters, base_weights)
    finally:
        for hook in hooks:
            hook.remove()
        for module in modules.values():
            if hasattr(module, ADAPTER_NAME):
                delattr(module, ADAPTER_NAME)


def merged_weight(module: nn.Module) -> Tensor:
    """Return the effective weight of a module, with the LoRA attached in training merged in."""
    weight: Tensor = module.get_parameter("weight")
    lora = getattr(module, ADAPTER_NAME, None)
    if lora is None:
        return weight
    return weight + lora.scale * (lora.up.flatten(1) @ lora.down.flatten(1)).reshape(weight.shape)
