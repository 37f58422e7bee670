"""Memory of a training that is known without running it: weights and the state of each."""

from __future__ import annotations

from torch import nn

from safegen.edits.base import TrainedEdit
from safegen.models.model import Model
from safegen.models.selectors import select_parameters

STATE_BYTES = 16
"""Bytes of the fp32 copy of a trained weight, its gradient and its two moments."""
AVERAGE_BYTES = 4
"""Bytes of the fp32 average of a trained weight."""


def model_bytes(model: Model) -> int:
    """Return the bytes of the weights of all components of a model."""
    networks = [getattr(model.pipeline, name) for name in model.components]
    return sum(p.numel() * p.element_size() for net in networks for p in net.parameters())


def training_bytes(config: TrainedEdit, model: Model) -> int:
    """Return the bytes that a training adds to the model with any batch, without activations.

    Args:
        config: settings of the edit. With a rank, the factors are trained.
        model: the model, which may be on the meta device.

    Raises:
        ConfigError: the selector matches nothing.
    """
    network = config.network(model)
    weights = dict(network.named_parameters())
    names = select_parameters(network, config.selector)
    if config.rank is None:
        trained = sum(weights[name].numel() for name in names)
    else:
        trained = sum(_factor_count(network, name, config.rank) for name in names)
    return trained * (STATE_BYTES + (AVERAGE_BYTES if config.training.ema else 0))


def _factor_count(network: nn.Module, name: str, rank: int) -> int:
    """Return the number of values in the LoRA of a weight; 0 for one that gets none."""
    path, _, kind = name.rpartition(".")
    module = network.get_submodule(path)
    if kind != "weight" or not isinstance(module, nn.Linear | nn.Conv2d):
        return 0
    out, columns = len(module.weight), module.weight[0].numel()
    return min(rank, out, columns) * (out + columns)
