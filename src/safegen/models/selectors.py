"""Selectors: the weights of a denoiser that an edit may change, by name."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import nn

from safegen.core.errors import ConfigError, UnknownNameError

UNET, SD3, FLUX = "UNet2DConditionModel", "SD3Transformer2DModel", "FluxTransformer2DModel"
TEXT_ENCODERS = "TextEncoders"
"""Name of the class of text encoders as one network (`safegen.models.families.text_outputs`)."""
_IMAGE = r"to_(?:[qkv]|out\.0)\."
_TEXT = r"(?:add_[qkv]_proj|to_add_out)\."
_TEXT_PATH = r"_context\.|context_embedder\.|\.add_[qkv]_proj\.|\.to_add_out\.|\.norm_added_"
_TRANSFORMER = {
    "attn1": rf"\.attn2?\.{_IMAGE}",
    "joint": rf"^transformer_blocks\.\d+\.attn\.{_IMAGE}",
    "attn2": rf"\.attn\.{_TEXT}",
    "kv2": r"\.attn\.add_[kv]_proj\.",
    "context": r"^(?:context_embedder|time_text_embed\.text_embedder\.linear_1)\.weight$",
    "attention": rf"\.attn2?\.(?:{_IMAGE}|{_TEXT})",
    "noxattn": rf"^(?!norm_out\.|proj_out\.|time_text_embed\.)(?!.*(?:{_TEXT_PATH}))",
    "esd-u": rf"^(?!.*(?:\.attn\.{_TEXT}|\.norm_(?:added_)?[qk]\.))",
    "all": r"",
}
SELECTORS: Mapping[str, Mapping[str, str]] = {
    UNET: {
        "attn1": r"\.attn1\.",
        "attn2": r"\.attn2\.",
        "kv2": r"\.attn2\.to_[kv]\.",
        "attention": r"\.attn[12]\.",
        "noxattn": r"^(?!conv_norm_out\.|conv_out\.|time_embedding\.)(?!.*\.attn2\.)",
        "esd-u": r"^(?!.*(?:\.attn2\.|norm))",
        "all": r"",
    },
    SD3: _TRANSFORMER | {"dual": rf"\.attn2\.{_IMAGE}"},
    FLUX: _TRANSFORMER,
    TEXT_ENCODERS: {"all": r"", "layers": r"\.(?:layers|block)\.\d"},
}
"""Class of the network, selector: regular expression over its parameter names.

On UNets `attn1` is self-attention, `attn2` cross-attention (ESD-x), `kv2` its keys and values
(ESD-x-strict, UCE); `noxattn` is everything but cross-attention, the last layers and the time
embedding, as in the first code of ESD-u (arXiv:2303.07345); `esd-u` is every linear and
convolutional layer outside cross-attention, as in its present code.

Transformers have one attention over text and image, with projections for each (arXiv:2403.03206).
`attn1` is the projections of the image: `joint`, those of the attention with the text, and `dual`,
the attention of the image alone in some blocks of SD 3.5 medium. The single blocks of FLUX project
text and image by the same weights: `attn1` includes them, so that it changes the text too; their
output shares a matrix with the MLP and is left out. `attn2` is the projections of the text, `kv2`
its keys and values, `context` the two matrices through which all text enters. `noxattn` leaves out
the text's layers and all of the time and text embedding, `esd-u` the text's attention and norms.

`layers` of text encoders leaves out the embeddings of tokens and positions, the last norm and the
projection.
"""
_ABSENT: Mapping[str, Mapping[str, str]] = {
    UNET: {
        "joint": "text and image have separate attention. Use attn1, attn2 or attention",
        "dual": "all attention of the image alone is attn1. Use attn1",
        "context": "text enters at every cross-attention. Use kv2",
    },
    SD3: {"dual": "no block of it has attention of the image alone. Use joint"},
    FLUX: {"dual": "no block of it has attention of the image alone. Use joint"},
    TEXT_ENCODERS: {},
}
"""Class of the denoiser, selector: why it matches nothing, and what to use."""


def select_parameters(denoiser: nn.Module, selector: str) -> list[str]:
    """Return the names of the parameters that a selector matches, in the denoiser's order.

    `attn1` names 80 tensors of 49,574,080 parameters on SD 1.x, 296 of 349,403,136 on SD 3.5
    medium, and 380 of 1,793,648,640 on FLUX.1.

    Raises:
        UnknownNameError: there is no such selector.
        ConfigError: the denoiser is of an unknown class, the selector matches nothing, or the
            model's self-attention is cross-attention (`only_cross_attention` models).
    """
    if not any(selector in patterns for patterns in SELECTORS.values()):
        raise UnknownNameError("selector", selector, SELECTORS[SD3])
    kind = type(denoiser).__name__
    if kind not in SELECTORS:
        raise ConfigError(f"denoiser must be one of {', '.join(SELECTORS)}, got {kind}")
    pattern = SELECTORS[kind].get(selector)
    names = [
        name
        for name, _ in denoiser.named_parameters()
        if pattern is not None and re.search(pattern, plain_name(name))
    ]
    if not names:
        reason = _ABSENT[kind].get(selector, "it has no such layers. Choose another selector")
        raise ConfigError(f"selector must match weights of the {kind}, got {selector!r}: {reason}")
    if kind == UNET and selector == "attn1":
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
