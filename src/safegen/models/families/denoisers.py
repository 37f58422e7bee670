"""Calls of the denoisers of all families: the only module that knows what each one reads."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from safegen.core.errors import ConfigError
from safegen.models.families.conditioning import Conditioning

Inputs = dict[str, Any]
UNSCALED_TIMESTEPS = 1000.0
"""Timesteps by which FLUX's pipeline divides, as its transformer multiplies by them."""


def _unet_inputs(x: Tensor, t: Tensor, text: Conditioning) -> Inputs:
    added = {} if text.pooled is None else {"text_embeds": text.pooled, **text.added}
    return {
        "sample": x,
        "timestep": t,
        "encoder_hidden_states": text.hidden,
        "added_cond_kwargs": added or None,
    }


def _sd3_inputs(x: Tensor, t: Tensor, text: Conditioning) -> Inputs:
    return {
        "hidden_states": x,
        "timestep": t,
        "encoder_hidden_states": text.hidden,
        "pooled_projections": text.pooled,
    }


def _flux_inputs(x: Tensor, t: Tensor, text: Conditioning) -> Inputs:
    height, width = x.shape[-2] // 2, x.shape[-1] // 2
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    ids = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1)
    return {
        "hidden_states": pack_latents(x),
        "timestep": t / UNSCALED_TIMESTEPS,
        "encoder_hidden_states": text.hidden,
        "pooled_projections": text.pooled,
        "img_ids": ids.to(x),
        "txt_ids": x.new_zeros(text.hidden.shape[1], 3),
        **text.added,
    }


_INPUTS: Mapping[str, Callable[[Tensor, Tensor, Conditioning], Inputs]] = {
    "UNet2DConditionModel": _unet_inputs,
    "SD3Transformer2DModel": _sd3_inputs,
    "FluxTransformer2DModel": _flux_inputs,
}
DENOISERS = tuple(_INPUTS)
"""Classes of denoisers that can be called."""
HIDDEN_ARGUMENT = "encoder_hidden_states"
"""Argument of every denoiser with the token embeddings."""
POOLED_ARGUMENTS: Mapping[str, tuple[str, ...]] = {
    "UNet2DConditionModel": ("added_cond_kwargs", "text_embeds"),
    "SD3Transformer2DModel": ("pooled_projections",),
    "FluxTransformer2DModel": ("pooled_projections",),
}
"""Argument with the pooled embeddings, or the one with a mapping and the key in it."""
UNBATCHED_ARGUMENTS = frozenset({"txt_ids", "img_ids"})
"""Arguments without a row per image, of FLUX: positions of tokens and of patches."""


def read_text(inputs: Mapping[str, Any]) -> Conditioning:
    """Return the text embeddings among a denoiser's keyword arguments."""
    hidden: Tensor = inputs[HIDDEN_ARGUMENT]
    for path in dict.fromkeys(POOLED_ARGUMENTS.values()):
        value: Any = inputs
        for key in path:
            value = (value or {}).get(key)
        if value is not None:
            return Conditioning(hidden, value)
    return Conditioning(hidden)


def replace_text(inputs: Mapping[str, Any], text: Conditioning) -> Inputs:
    """Return a denoiser's keyword arguments with other text embeddings."""
    replaced = dict(inputs) | {HIDDEN_ARGUMENT: text.hidden}
    for first, *rest in dict.fromkeys(POOLED_ARGUMENTS.values()) if text.pooled is not None else ():
        if inputs.get(first) is not None:
            new = {**inputs[first], rest[0]: text.pooled} if rest else text.pooled
            replaced[first] = new
    return replaced


def predict(
    denoiser: nn.Module,
    x: Tensor,
    t: Tensor,
    text: Conditioning,
    tensors: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Return a denoiser's prediction for noised latents, (b, c, h, w).

    Args:
        denoiser: the network, possibly wrapped for training.
        x: noised latents, (b, c, h, w).
        t: timesteps, (b,); see `NoiseSchedule`.
        text: what it is conditioned on, b rows.
        tensors: values for some of its weights during the call.

    Raises:
        ConfigError: it is of an unknown class.
    """
    network = getattr(denoiser, "module", denoiser)
    kind = type(network).__name__
    if kind not in _INPUTS:
        raise ConfigError(f"denoiser must be one of {', '.join(_INPUTS)}, got {kind}")
    inputs = _INPUTS[kind](x, t, text) | {"return_dict": False}
    quiet_autocast(x.device.type)
    if tensors is None:
        (prediction,) = denoiser(**inputs)
    else:
        (prediction,) = torch.func.functional_call(network, dict(tensors), (), inputs)
    return unpack_latents(prediction, x.shape) if prediction.ndim == 3 else prediction


def quiet_autocast(device: str) -> None:
    """Hide torch's remark that autocast leaves the weights of FLUX's norms in fp32.

    From now on: `catch_warnings` is for one thread, and a judge may work in another.
    """
    if torch.is_autocast_enabled(device):
        warnings.filterwarnings("ignore", "Mismatch dtype between input and weight", UserWarning)


def packs_latents(pipe: Any) -> bool:
    """Return whether a pipeline's latents are packed from its start to its end, as FLUX's are."""
    kinds = type(getattr(pipe, "transformer", None)).__mro__
    return any(kind.__name__ == "FluxTransformer2DModel" for kind in kinds)


def side_multiple(pipe: Any) -> int:
    """Return what a pipeline's images have sides a multiple of, in pixels."""
    transformer = getattr(pipe, "transformer", None)
    patch = 1 if transformer is None else int(transformer.config.get("patch_size") or 1)
    return int(pipe.vae_scale_factor) * (2 if packs_latents(pipe) else patch)


def largest_side(pipe: Any) -> int | None:
    """Return the largest side of a pipeline's images in pixels, which SD 3's positions limit."""
    transformer = getattr(pipe, "transformer", None)
    positions = None if transformer is None else transformer.config.get("pos_embed_max_size")
    return None if positions is None else int(positions) * side_multiple(pipe)


def default_side(pipe: Any) -> int:
    """Return the side of the latents of a pipeline's images, which FLUX's network does not say."""
    network = getattr(pipe, "unet", None) or pipe.transformer
    return int(network.config.get("sample_size") or pipe.default_sample_size)


def pack_latents(x: Tensor) -> Tensor:
    """Return latents (b, c, h, w) as FLUX reads them: 2 x 2 patches, (b, h w / 4, 4 c)."""
    b, c, h, w = x.shape
    return x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, -1, 4 * c)


def unpack_latents(x: Tensor, shape: torch.Size) -> Tensor:
    """Return packed latents (b, h w / 4, 4 c) in their shape (b, c, h, w)."""
    b, c, h, w = shape
    return x.view(b, h // 2, w // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, c, h, w)


def describe_architecture(denoiser: Any) -> str:
    """Return class, depth and widths of a denoiser; see `Model.family`."""
    config = denoiser.config
    if not hasattr(config, "down_block_types"):
        return (
            f"{type(denoiser).__name__}, layers {config.num_layers}, heads "
            f"{config.num_attention_heads}, text {config.joint_attention_dim}, dual "
            f"{len(config.get('dual_attention_layers') or ())}"
        )
    heads = config.attention_head_dim  # diffusers' name for the number of heads
    heads = [heads] * len(config.down_block_types) if isinstance(heads, int) else list(heads)
    return f"{type(denoiser).__name__}, heads {heads}, text {config.cross_attention_dim}"
