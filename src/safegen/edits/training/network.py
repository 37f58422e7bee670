"""Network of a training: trained copies of some weights, and everything restored afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, cast

from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from safegen.edits.training.config import Training


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
    plain = sdpa_kernel(SDPBackend.MATH) if on_cpu and not is_unet else nullcontext()
    stack = ExitStack()
    try:
        stack.enter_context(plain)
        if processors:  # on a CPU, the backward pass of fused attention is slower
            denoiser.set_attn_processor(AttnProcessor())  # type: ignore[operator]
        for name, p in parameters.items():
            p.requires_grad_(name in original)
        for name in names:
            parameters[name].data = original[name].detach().clone().float()
        if checkpointing:
            denoiser.enable_gradient_checkpointing()  # type: ignore[operator]
        yield {name: parameters[name] for name in names}
    finally:
        stack.close()
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
        for name in names:
            parameters[name].data = original[name]
