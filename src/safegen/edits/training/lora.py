"""What an edit trains: chosen weights themselves, or a LoRA beside each.

Either way a patch comes out.
"""

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
"""What the two factors hang under in their module while they are trained."""


class LoraLayer(nn.Module):
    """Two thin factors beside a linear or convolutional module: scale * up(down(x)) is added to what it says (arXiv:2106.09685)."""

    def __init__(
        self, module: nn.Linear | nn.Conv2d, rank: int, scale: float, generator: torch.Generator
    ) -> None:
        """Draw `down` from a normal of deviation 1 / rank and set `up` to zero, so that nothing changes at first."""
        super().__init__()
        shape, device = module.weight.shape, module.weight.device
        self.rank, self.scale = min(rank, shape[0], shape[1:].numel()), scale
        self.down = nn.Parameter(
            (torch.randn(self.rank, *shape[1:], generator=generator) / rank).to(device)
        )
        self.up = nn.Parameter(
            torch.zeros(shape[0], self.rank, *(1,) * (len(shape) - 2), device=device)
        )

    def forward(self, module: nn.Module, given: tuple[Tensor, ...], said: Tensor) -> Tensor:
        """Return the module's answer with the factors' added: a forward hook."""
        return said + self.scale * lora_forward(module, given[0], self.down, self.up)


@dataclass(frozen=True)
class Trainable:
    """What the loop trains, and how that becomes new weights."""

    names: tuple[str, ...]
    """Parameters of the denoiser that the loop trains."""
    adapters: Mapping[str, tuple[str, float]]
    """By weight: its factors' place and scale; empty when the weights themselves are trained."""
    old: Mapping[str, Tensor]
    """Weights with factors beside them, before."""

    def weights(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the new weights that trained values stand for: W + scale * up @ down where there are factors."""
        if not self.adapters:
            return dict(tensors)
        out = {}
        for name, (place, scale) in self.adapters.items():
            down, up = tensors[f"{place}.down"].double(), tensors[f"{place}.up"].double()
            delta = scale * (up.flatten(1) @ down.flatten(1)).reshape(self.old[name].shape)
            out[name] = (self.old[name].double().to(delta.device) + delta).float()
        return out


@contextmanager
def trainable_parameters(
    model: Model, selector: str, *, rank: int | None, alpha: float | None, seed: int
) -> Iterator[Trainable]:
    """Yield what an edit trains; factors hang in the denoiser inside the block and are gone after it, whatever happens.

    Args:
        model: the model.
        selector: which weights.
        rank: of the factors; None trains the weights themselves.
        alpha: the factors' strength is alpha / rank; the rank when None, so that the strength is 1.
        seed: decides the factors' start.

    Raises:
        ConfigError: the selector picks no matrix and no convolution.
    """
    _ = model.hash  # taken before adapters are added
    names = select_parameters(model.denoiser, selector)
    if rank is None:
        yield Trainable(tuple(names), {}, {})
        return
    generator, scale = torch.Generator("cpu").manual_seed(seed), (alpha or rank) / rank
    modules = {
        n: model.denoiser.get_submodule(n.removesuffix(".weight"))
        for n in names
        if n.endswith(".weight")
    }
    modules = {n: m for n, m in modules.items() if isinstance(m, nn.Linear | nn.Conv2d)}
    if not modules:
        raise ConfigError(
            f"the selector {selector!r} picks no matrix and no convolution, so a LoRA has nothing to stand beside"
        )
    hooks, adapters = [], {}
    try:
        for name, module in modules.items():
            factors = LoraLayer(module, rank, scale, generator)
            module.add_module(ADAPTER_NAME, factors)
            hooks.append(
                module.register_forward_hook(
                    lambda m, given, said: getattr(m, ADAPTER_NAME)(m, given, said)
                )
            )
            adapters[name] = (f"{name.removesuffix('.weight')}.{ADAPTER_NAME}", scale)
        own = tuple(f"{place}.{part}" for place, _ in adapters.values() for part in ("down", "up"))
        yield Trainable(own, adapters, {n: m.weight.detach() for n, m in modules.items()})
    finally:
        for hook in hooks:
            hook.remove()
        for module in modules.values():
            if hasattr(module, ADAPTER_NAME):
                delattr(module, ADAPTER_NAME)


def weight_of(module: nn.Module) -> Tensor:
    """Return the weight that a module computes with: its own, with the change of its factors where some hang beside it."""
    weight: Tensor = module.get_parameter("weight")
    factors = getattr(module, ADAPTER_NAME, None)
    if factors is None:
        return weight
    return weight + factors.scale * (factors.up.flatten(1) @ factors.down.flatten(1)).reshape(
        weight.shape
    )


def check_alpha(rank: int | None, alpha: float | None) -> None:
    """Refuse a strength of factors that there are not.

    Raises:
        ValueError: alpha without rank.
    """
    if alpha is not None and rank is None:
        raise ValueError(
            "alpha has no effect without rank, which makes a LoRA; give both or neither"
        )
