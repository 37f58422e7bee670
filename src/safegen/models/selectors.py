"""Selectors: the weights of a denoiser that an edit may change, by name."""

from __future__ import annotations

import re

from torch import nn

from safegen.core.errors import ConfigError, UnknownNameError

SELECTORS = {
    "attn1": r"\.attn1\.",
    "attn2": r"\.attn2\.",
    "kv2": r"\.attn2\.to_[kv]\.",
    "attention": r"\.attn[12]\.",
    "noxattn": r"^(?!conv_norm_out\.|conv_out\.|time_embedding\.)(?!.*\.attn2\.)",
    "esd-u": r"^(?!.*(?:\.attn2\.|norm))",
    "all": r"",
}
"""Selector: regular expression over the denoiser's parameter names.

`attn1` is self-attention, `attn2` cross-attention (ESD-x), `kv2` its keys and values (ESD-x-strict,
UCE); `noxattn` is everything but cross-attention, the last layers and the time embedding, as in the
first code of ESD-u (arXiv:2303.07345); `esd-u` is every linear and convolutional layer outside
cross-attention, as in its present code.
"""


def select_parameters(denoiser: nn.Module, selector: str) -> list[str]:
    """Return the names of the parameters that a selector matches, in the denoiser's order.

    On SD 1.x `attn1` (every self-attention layer) names 80 tensors of 49,574,080 parameters.

    Raises:
        UnknownNameError: there is no such selector.
        ConfigError: it matches nothing, or the model's self-attention is cross-attention
            (`only_cross_attention` models).
    """
    if selector not in SELECTORS:
        raise UnknownNameError("selector", selector, SELECTORS)
    names = [n for n, _ in denoiser.named_parameters() if re.search(SELECTORS[selector], n)]
    if not names:
        raise ConfigError(
            f"selector {selector!r} must match a weight of the {type(denoiser).__name__}, got "
            "none. It needs attn1/attn2 blocks"
        )
    if selector == "attn1":
        for name, module in denoiser.named_modules():
            if name.endswith(".attn1") and getattr(module, "is_cross_attention", False):
                raise ConfigError(
                    f"selector 'attn1' must match self-attention, got cross-attention in {name} "
                    "(only_cross_attention)"
                )
    return names


def plain_name(name: str) -> str:
    """Return the name of a weight as it was before peft put a LoRA beside it."""
    return name.replace(".base_layer.", ".")


def weights_by_name(denoiser: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of a denoiser by their names without LoRAs."""
    return {plain_name(name): value for name, value in denoiser.named_parameters()}
