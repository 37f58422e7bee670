"""Names of diffusers weights in the layouts of the models' publishers and in LoRA files.

Block counts are read off the names, so that the map holds for every size of an architecture.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor, nn

from safegen.core.tensor_files import LazyTensor, Tensors, values_of
from safegen.models.checkpoint.transformer_map import (
    part_of,
    swap_halves,
    swapped_names,
    transformer_names,
)

DENOISER_PREFIX = "model.diffusion_model."
"""Prefix of a denoiser's weights in the file; files of a transformer alone may lack it."""
_SHARED = {"unet": DENOISER_PREFIX, "vae": "first_stage_model."}
_FLOW = {"transformer": DENOISER_PREFIX, "vae": "first_stage_model."}
_CLIP_L, _CLIP_G, _T5 = (
    f"text_encoders.{name}.transformer." for name in ("clip_l", "clip_g", "t5xxl")
)
PREFIX = {
    "sd1": _SHARED | {"text_encoder": "cond_stage_model.transformer.text_model."},
    "sd2": _SHARED | {"text_encoder": "cond_stage_model.model."},
    "sdxl": _SHARED
    | {
        "text_encoder": "conditioner.embedders.0.transformer.text_model.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    },
    "sd3": _FLOW | {"text_encoder": _CLIP_L, "text_encoder_2": _CLIP_G, "text_encoder_3": _T5},
    "flux": _FLOW | {"text_encoder": _CLIP_L, "text_encoder_2": _T5},
}
"""Architecture, component: prefix of its weights in the file."""
OPEN_CLIP = {("sd2", "text_encoder"), ("sdxl", "text_encoder_2")}
"""Text encoders that are stored in OpenCLIP's layout."""
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_QKV = ("q_proj", "k_proj", "v_proj")
_OPEN_CLIP = {
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_OPEN_CLIP_ENDS = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
    "text_projection.weight": "text_projection",
}
_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def unet_names(names: Iterable[str]) -> dict[str, str]:
    """Return the original name of each weight of a UNet, without prefix.

    The original layout numbers blocks in one sequence. On the way down, a resnet with its attention
    is one block and a downsampler another; on the way up, an upsampler is the last layer of the
    block before it.

    Raises:
        ValueError: a name is unknown.
    """
    names = list(names)
    resnets = {
        side: _counts(names, rf"{side}_blocks\.(\d+)\.resnets\.(\d+)\.") for side in ("down", "up")
    }
    attention_levels = {
        int(m[1]) for n in names if (m := re.match(r"up_blocks\.(\d+)\.attentions\.", n))
    }
    renamed = {}
    for name in names:
        stem, _, end = name.rpartition(".")
        if stem in _ENDS:
            renamed[name] = f"{_ENDS[stem]}.{end}"
        elif m := re.match(
            r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.+)\.(weight|bias)$", name
        ):
            side, level, kind, j, inner, end = m[1], int(m[2]), m[3], int(m[4]), m[5], m[6]
            block = _first_block(resnets[side], side, level) + j
            inner = _RESNET[inner] if kind == "resnets" else inner
            blocks = "input_blocks" if side == "down" else "output_blocks"
            renamed[name] = f"{blocks}.{block}.{int(kind == 'attentions')}.{inner}.{end}"
        elif m := re.match(r"down_blocks\.(\d+)\.downsamplers\.0\.conv\.(.+)$", name):
            level = int(m[1])
            block = _first_block(resnets["down"], "down", level) + resnets["down"][level]
            renamed[name] = f"input_blocks.{block}.0.op.{m[2]}"
        elif m := re.match(r"up_blocks\.(\d+)\.upsamplers\.0\.conv\.(.+)$", name):
            level = int(m[1])
            block = _first_block(resnets["up"], "up", level) + resnets["up"][level] - 1
            renamed[name] = (
                f"output_blocks.{block}.{2 if level in attention_levels else 1}.conv.{m[2]}"
            )
        elif m := re.match(r"mid_block\.resnets\.(\d+)\.(.+)\.(weight|bias)$", name):
            renamed[name] = f"middle_block.{2 * int(m[1])}.{_RESNET[m[2]]}.{m[3]}"
        elif m := re.match(r"mid_block\.attentions\.0\.(.+)$", name):
            renamed[name] = f"middle_block.1.{m[1]}"
        else:
            raise ValueError(f"the UNet's weight {name} has no place in the original layout")
    return renamed


def vae_names(names: Iterable[str]) -> dict[str, str]:
    """Return the original name of each weight of an autoencoder, without prefix.

    The decoder's levels count backwards.

    Raises:
        ValueError: a name is unknown.
    """
    names = list(names)
    top = max(_counts(names, r"decoder\.up_blocks\.(\d+)\.resnets\.(\d+)\."))
    renamed = {}
    for name in names:
        if m := re.match(
            r"(encoder|decoder)\.(?:down|up)_blocks\.(\d+)\.(resnets|downsamplers|upsamplers)\.(\d+)\.(.+)$",
            name,
        ):
            side, level = m[1], int(m[2]) if m[1] == "encoder" else top - int(m[2])
            direction = "down" if side == "encoder" else "up"
            inner = m[5].replace("conv_shortcut", "nin_shortcut")
            renamed[name] = f"{side}.{direction}.{level}." + (
                f"block.{m[4]}.{inner}" if m[3] == "resnets" else f"{direction}sample.{inner}"
            )
        elif m := re.match(r"(encoder|decoder)\.mid_block\.resnets\.(\d+)\.(.+)$", name):
            renamed[name] = (
                f"{m[1]}.mid.block_{int(m[2]) + 1}.{m[3].replace('conv_shortcut', 'nin_shortcut')}"
            )
        elif m := re.match(
            r"(encoder|decoder)\.mid_block\.attentions\.0\.(.+)\.(weight|bias)$", name
        ):
            renamed[name] = f"{m[1]}.mid.attn_1.{_ATTENTION[m[2]]}.{m[3]}"
        elif m := re.match(
            r"(?:(?:encoder|decoder)\.)?(?:conv_in|conv_out|conv_norm_out|quant_conv|post_quant_conv)\.",
            name,
        ):
            renamed[name] = name.replace("conv_norm_out", "norm_out")
        else:
            raise ValueError(f"the autoencoder's weight {name} has no place in the original layout")
    return renamed


def open_clip_names(names: Iterable[str]) -> dict[str, str]:
    """Return the OpenCLIP name of each weight of a text encoder, without prefix.

    Queries, keys and values share one tensor.

    Raises:
        ValueError: a name is unknown.
    """
    renamed = {}
    for name in names:
        bare = name.removeprefix("text_model.")
        if bare in _OPEN_CLIP_ENDS:
            renamed[name] = _OPEN_CLIP_ENDS[bare]
        elif m := re.match(r"encoder\.layers\.(\d+)\.self_attn\.[qkv]_proj\.(weight|bias)$", bare):
            renamed[name] = f"transformer.resblocks.{m[1]}.attn.in_proj_{m[2]}"
        elif (m := re.match(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)$", bare)) and m[
            2
        ] in _OPEN_CLIP:
            renamed[name] = f"transformer.resblocks.{m[1]}.{_OPEN_CLIP[m[2]]}.{m[3]}"
        else:
            raise ValueError(f"the text encoder's weight {name} has no place in OpenCLIP's layout")
    return renamed


_RENAMED = {"unet": unet_names, "vae": vae_names, "transformer": transformer_names}
"""Component: the function that names its weights."""


def original_names(architecture: str, component: str, names: Iterable[str]) -> dict[str, str]:
    """Return the name in a one-file checkpoint of each weight of a component.

    Several weights may share one (`pack`).
    """
    names, prefix = list(names), PREFIX[architecture][component]
    if component in _RENAMED:
        return {n: prefix + original for n, original in _RENAMED[component](names).items()}
    if (architecture, component) in OPEN_CLIP:
        return {n: prefix + original for n, original in open_clip_names(names).items()}
    if prefix == _T5:  # the table of embeddings has two names in transformers
        return {n: prefix + n.replace("encoder.embed_tokens.", "shared.") for n in names}
    if prefix in (_CLIP_L, _CLIP_G):  # CLIPTextModel has no `text_model.` of its own
        heads = ("text_model.", "text_projection.")
        return {n: prefix + ("" if n.startswith(heads) else "text_model.") + n for n in names}
    return {n: prefix + n.removeprefix("text_model.") for n in names}


def _groups(architecture: str, component: str, names: Iterable[str]) -> dict[str, list[str]]:
    """Return the weights by the name of the tensor that they share, in their order there."""
    groups: dict[str, list[str]] = {}
    for name, original in original_names(architecture, component, names).items():
        groups.setdefault(original, []).append(name)
    order = part_of if component == "transformer" else _qkv
    return {original: sorted(group, key=order) for original, group in groups.items()}


def pack(architecture: str, component: str, state: Tensors) -> dict[str, LazyTensor]:
    """Return the weights of a component as a one-file checkpoint stores them, not yet computed.

    The autoencoder's attention has 1x1 convolutions; OpenCLIP stores queries, keys and values in
    one tensor, and transposes its text projection. Transformers share tensors too, and their last
    modulations have shift before scale.
    """
    swapped = swapped_names(state) if component == "transformer" else set()

    def pack_tensor(original: str, names: Sequence[str], values: Sequence[Tensor]) -> Tensor:
        value = values[0] if len(values) == 1 else torch.cat(list(values))
        if component == "vae" and ".mid_block.attentions." in names[0] and value.ndim == 2:
            value = value[:, :, None, None]
        if names[0] in swapped:
            value = swap_halves(value)
        return value.T if _is_transposed(architecture, component, original) else value

    packed = {}
    for original, names in _groups(architecture, component, state).items():
        stored = names[:1] if _is_tied(names) else names
        sources = [state[name] for name in stored]
        packed[original] = LazyTensor.of(sources, partial(pack_tensor, original, stored))
    return packed


def unpack(
    architecture: str, component: str, tensors: Tensors, shapes: Mapping[str, torch.Size]
) -> dict[str, LazyTensor]:
    """Return a component's weights from the tensors of a one-file checkpoint: inverse of `pack`.

    Nothing is read yet. A tensor that weights share is read once if they are loaded in order.

    Args:
        architecture: key of `PREFIX`.
        component: key of `PREFIX[architecture]`.
        tensors: tensors of the file, those of `original_names` among them.
        shapes: shape of each weight by its name in diffusers. A result of another shape means that
            the file does not fit.
    """
    swapped = swapped_names(shapes) if component == "transformer" else set()
    shared: dict[str, Tensor] = {}  # the fused tensor that was read last

    def load_shared(original: str) -> Tensor:
        if original not in shared:
            shared.clear()
            shared[original] = values_of(tensors[original])
        return shared[original]

    def unpack_tensor(name: str, place: slice, values: Sequence[Tensor]) -> Tensor:
        value = values[0] if place.stop is None else values[0][place]
        if component == "vae" and value.ndim == 4 and len(shapes[name]) == 2:
            return value[:, :, 0, 0]
        if name in swapped and value.shape == shapes[name]:
            return swap_halves(value)
        return value.T if _is_transposed(architecture, component, name) else value

    weights = {}
    for original, names in _groups(architecture, component, shapes).items():
        source, rows = tensors[original], [shapes[name][0] for name in names]
        if len(names) > 1:
            load = partial(load_shared, original)
            source = LazyTensor(tuple(source.shape), source.dtype, load)
        stops = list(accumulate(rows)) if len(names) > 1 and not _is_tied(names) else []
        splits = bool(stops) and tuple(source.shape[:1]) == (stops[-1],)
        for i, name in enumerate(names):
            place = slice(stops[i] - rows[i], stops[i]) if splits else slice(None)
            weights[name] = LazyTensor.of([source], partial(unpack_tensor, name, place))
    return weights


def _is_tied(names: Sequence[str]) -> bool:
    """Return whether names are those of one weight, T5's table of embeddings."""
    return "shared.weight" in names


def _qkv(name: str) -> int:
    """Return the index of a projection in OpenCLIP's fused tensor; 3 for other weights."""
    return next((i for i, kind in enumerate(_QKV) if f".{kind}." in name), len(_QKV))


def _is_transposed(architecture: str, component: str, name: str) -> bool:
    return (architecture, component) in OPEN_CLIP and name.removesuffix(".weight").endswith(
        "text_projection"
    )


def kohya_name(name: str, original: str | None = None) -> str:
    """Return the module name of a UNet's weight in the LoRA files of web UIs (kohya's form).

    Args:
        name: name of the weight. On SD 1.x and 2.x the form keeps diffusers' names.
        original: its name in the original layout, which the form uses on SDXL.
    """
    return "lora_unet_" + (original or name).removesuffix(".weight").replace(".", "_")


def sdxl_unet_names(unet: nn.Module) -> dict[str, str]:
    """Return the original names of an SDXL UNet's weights, which its LoRAs use.

    Empty for other UNets. The extra weight of a guidance-distilled UNet (LCM) has no such name, and
    no LoRA changes it.
    """
    if not hasattr(unet, "add_embedding"):
        return {}
    return unet_names(
        name for name in unet.state_dict() if not name.startswith("time_embedding.cond_proj")
    )


def _counts(names: Iterable[str], pattern: str) -> dict[int, int]:
    """Return the number of blocks of each level."""
    pairs = {(int(m[1]), int(m[2])) for n in names if (m := re.match(pattern, n))}
    return {
        level: sum(first == level for first, _ in pairs)
        for level in sorted({first for first, _ in pairs})
    }


def _first_block(resnets: dict[int, int], side: str, level: int) -> int:
    """Return the number of a level's first block.

    On the way down, the first convolution and a downsampler per level come before it.
    """
    before = sum(count for other, count in resnets.items() if other < level)
    return 1 + before + level if side == "down" else before
