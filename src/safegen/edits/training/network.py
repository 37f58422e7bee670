"""Network of a training: trained copies of some weights, and everything restored afterwards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from safegen.edits.training.config import Training
from safegen.edits.training.lora import ADAPTER_NAME

FUSED_SCORES = 1024 * 1024
"""Attention scores per head and sample from which on the fused kernel is always used."""
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


@contextmanager
def prepared_network(
    denoiser: nn.Module, names: Sequence[str], config: Training
) -> Iterator[dict[str, nn.Parameter]]:
    """Yield fp32 copies of some parameters, in the network; it is restored bit for bit.

    Args:
        denoiser: the network.
        names: parameters to train; no others require gradients inside the block.
        config: settings of the training.
    """
    parameters = dict(denoiser.named_parameters())
    original = {name: parameters[name].data for name in names}
    was_training = denoiser.training
    required_grad = {name: p.requires_grad for name, p in parameters.items()}
    checkpointing = config.gradient_checkpointing and not denoiser.is_gradient_checkpointing
    on_cpu = parameters[names[0]].device.type == "cpu"
    is_unet = isinstance(denoiser, UNet2DConditionModel)
    processors = dict(cast(Any, denoiser).attn_processors) if on_cpu and is_unet else {}
    frozen = {name: parameters[name].data for name in _frozen_weights(denoiser, names)}
    try:
        if processors:
            denoiser.set_attn_processor(faster_processors(processors))  # type: ignore[operator]
        if config.precision in HALF:  # autocast would do it in every forward pass
            for name, weight in frozen.items():
                parameters[name].data = weight.to(HALF[config.precision])
        for name, p in parameters.items():
            p.requires_grad_(name in original)
        for name in names:
            parameters[name].data = original[name].detach().clone().float()
        if checkpointing:
            denoiser.enable_gradient_checkpointing()  # type: ignore[operator]
        kernel = sdpa_kernel(SDPBackend.MATH) if on_cpu and not is_unet else nullcontext()
        with kernel:
            yield {name: parameters[name] for name in names}
    finally:
        vars(denoiser).pop("forward", None)  # accelerate's autocast wrapper
        vars(denoiser).pop("_original_forward", None)
        if checkpointing:
            denoiser.disable_gradient_checkpointing()  # type: ignore[operator]
        if processors:
            denoiser.set_attn_processor(processors)  # type: ignore[operator]
        denoiser.train(was_training)
        for name, p in parameters.items():
            p.requires_grad_(required_grad[name])
            p.grad = None
        for name, value in (original | frozen).items():
            parameters[name].data = value


def _frozen_weights(denoiser: nn.Module, names: Sequence[str]) -> Iterable[str]:
    """Yield the parameters that autocast rounds, without trained ones and the base of a LoRA."""
    for module, layer in denoiser.named_modules():
        # an adversary adds the LoRA to its weight
        is_base = hasattr(layer, ADAPTER_NAME) or module.endswith("base_layer")
        if isinstance(layer, nn.Linear | nn.Conv2d) and not is_base:
            own = [f"{module}.{name}".lstrip(".") for name in dict(layer.named_parameters())]
            yield from (name for name in own if name not in names)


class SizedAttention:
    """Attention of a UNet with the kernel that trains faster on a CPU.

    Measured forward and backward, one thread: in fp32 the fused kernel is faster for
    self-attention, in half precision the plain one up to 1024 tokens. Text has few tokens and no
    gradient of its keys and values, which the fused kernel computes all the same. With many scores
    the plain kernel needs far more memory.
    """

    def __init__(self) -> None:
        self.plain, self.fused = AttnProcessor(), AttnProcessor2_0()

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Return the output of the layer; see `diffusers.models.attention_processor.Attention`."""
        tokens = hidden_states.shape[1]
        keys = tokens if encoder_hidden_states is None else encoder_hidden_states.shape[1]
        is_self = encoder_hidden_states is None
        is_half = torch.is_autocast_enabled(hidden_states.device.type)
        fused = tokens * keys >= FUSED_SCORES or (is_self and not is_half)
        processor = self.fused if fused else self.plain
        return processor(attn, hidden_states, encoder_hidden_states, *args, **kwargs)


def faster_processors(processors: Mapping[str, Any]) -> dict[str, Any]:
    """Return the attention processors of a UNet, with diffusers' default ones replaced."""
    sized = SizedAttention()
    default = (AttnProcessor, AttnProcessor2_0)
    return {name: sized if type(p) in default else p for name, p in processors.items()}
