"""The original Stable Diffusion layout: what a weight of a diffusers part is called in a one-file checkpoint, and in a LoRA file.

Names only, so that it holds for every size of the family: the block counts are read off the names
themselves.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

_BOTH = {"unet": "model.diffusion_model.", "vae": "first_stage_model."}
PREFIX = {
    "sd1": _BOTH | {"text_encoder": "cond_stage_model.transformer.text_model."},
    "sd2": _BOTH | {"text_encoder": "cond_stage_model.model."},
    "sdxl": _BOTH
    | {
        "text_encoder": "conditioner.embedders.0.transformer.text_model.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    },
}
"""Build of a model, part of its pipeline: where that lies in the file."""
OPEN_CLIP = {("sd2", "text_encoder"), ("sdxl", "text_encoder_2")}
"""Text encoders that lie in the file as OpenCLIP has them."""
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
    """Return, for each weight of a UNet, its name in the original layout, without prefix.

    The original numbers its blocks in one row: down, a resnet with its attention is one block and
    so is a downsampler; up, an upsampler is the last layer of the block before it.

    Raises:
        ValueError: a name is of no known kind.
    """
    names = list(names)
    resnets = {
        side: _counts(names, rf"{side}_blocks\.(\d+)\.resnets\.(\d+)\.") for side in ("down", "up")
    }
    tall = {int(m[1]) for n in names if (m := re.match(r"up_blocks\.(\d+)\.attentions\.", n))}
    out = {}
    for name in names:
        stem, _, end = name.rpartition(".")
        if stem in _ENDS:
            out[name] = f"{_ENDS[stem]}.{end}"
        elif m := re.match(
            r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.+)\.(weight|bias)$", name
        ):
            side, level, kind, j, inner, end = m[1], int(m[2]), m[3], int(m[4]), m[5], m[6]
            place = _place(resnets[side], side, level) + j
            inner = _RESNET[inner] if kind == "resnets" else inner
            out[name] = (
                f"{'input' if side == 'down' else 'output'}_blocks.{place}.{int(kind == 'attentions')}.{inner}.{end}"
            )
        elif m := re.match(r"down_blocks\.(\d+)\.downsamplers\.0\.conv\.(.+)$", name):
            level = int(m[1])
            out[name] = (
                f"input_blocks.{_place(resnets['down'], 'down', level) + resnets['down'][level]}.0.op.{m[2]}"
            )
        elif m := re.match(r"up_blocks\.(\d+)\.upsamplers\.0\.conv\.(.+)$", name):
            level = int(m[1])
            place = _place(resnets["up"], "up", level) + resnets["up"][level] - 1
            out[name] = f"output_blocks.{place}.{2 if level in tall else 1}.conv.{m[2]}"
        elif m := re.match(r"mid_block\.resnets\.(\d+)\.(.+)\.(weight|bias)$", name):
            out[name] = f"middle_block.{2 * int(m[1])}.{_RESNET[m[2]]}.{m[3]}"
        elif m := re.match(r"mid_block\.attentions\.0\.(.+)$", name):
            out[name] = f"middle_block.1.{m[1]}"
        else:
            raise ValueError(f"the UNet's weight {name} has no place in the original layout")
    return out


def vae_names(names: Iterable[str]) -> dict[str, str]:
    """Return, for each weight of an autoencoder, its name in the original layout, without prefix; the decoder's levels count backwards.

    Raises:
        ValueError: a name is of no known kind.
    """
    names = list(names)
    top = max(_counts(names, r"decoder\.up_blocks\.(\d+)\.resnets\.(\d+)\."))
    out = {}
    for name in names:
        if m := re.match(
            r"(encoder|decoder)\.(?:down|up)_blocks\.(\d+)\.(resnets|downsamplers|upsamplers)\.(\d+)\.(.+)$",
            name,
        ):
            side, level = m[1], int(m[2]) if m[1] == "encoder" else top - int(m[2])
            way = "down" if side == "encoder" else "up"
            inner = m[5].replace("conv_shortcut", "nin_shortcut")
            out[name] = f"{side}.{way}.{level}." + (
                f"block.{m[4]}.{inner}" if m[3] == "resnets" else f"{way}sample.{inner}"
            )
        elif m := re.match(r"(encoder|decoder)\.mid_block\.resnets\.(\d+)\.(.+)$", name):
            out[name] = (
                f"{m[1]}.mid.block_{int(m[2]) + 1}.{m[3].replace('conv_shortcut', 'nin_shortcut')}"
            )
        elif m := re.match(
            r"(encoder|decoder)\.mid_block\.attentions\.0\.(.+)\.(weight|bias)$", name
        ):
            out[name] = f"{m[1]}.mid.attn_1.{_ATTENTION[m[2]]}.{m[3]}"
        elif m := re.match(
            r"(?:(?:encoder|decoder)\.)?(?:conv_in|conv_out|conv_norm_out|quant_conv|post_quant_conv)\.",
            name,
        ):
            out[name] = name.replace("conv_norm_out", "norm_out")
        else:
            raise ValueError(f"the autoencoder's weight {name} has no place in the original layout")
    return out


def open_clip_names(names: Iterable[str]) -> dict[str, str]:
    """Return, for each weight of a text encoder, its name in OpenCLIP's layout, without prefix; queries, keys and values share one.

    Raises:
        ValueError: a name is of no known kind.
    """
    out = {}
    for name in names:
        bare = name.removeprefix("text_model.")
        if bare in _OPEN_CLIP_ENDS:
            out[name] = _OPEN_CLIP_ENDS[bare]
        elif m := re.match(r"encoder\.layers\.(\d+)\.self_attn\.[qkv]_proj\.(weight|bias)$", bare):
            out[name] = f"transformer.resblocks.{m[1]}.attn.in_proj_{m[2]}"
        elif (m := re.match(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)$", bare)) and m[
            2
        ] in _OPEN_CLIP:
            out[name] = f"transformer.resblocks.{m[1]}.{_OPEN_CLIP[m[2]]}.{m[3]}"
        else:
            raise ValueError(f"the text encoder's weight {name} has no place in OpenCLIP's layout")
    return out


def original_names(build: str, part: str, names: Iterable[str]) -> dict[str, str]:
    """Return, for each weight of a pipeline's part, its name in a one-file checkpoint of a build.

    Several may share one (`pack`).
    """
    names, prefix = list(names), PREFIX[build][part]
    if part in _BOTH:
        return {
            n: prefix + to for n, to in (unet_names if part == "unet" else vae_names)(names).items()
        }
    if (build, part) in OPEN_CLIP:
        return {n: prefix + to for n, to in open_clip_names(names).items()}
    return {n: prefix + n.removeprefix("text_model.") for n in names}


def pack(build: str, part: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a part's weights as a one-file checkpoint holds them.

    The autoencoder's attention was made of 1x1 convolutions; OpenCLIP has queries, keys and values
    in one tensor, in this order, and its text projection multiplies from the right.
    """
    shared: dict[str, list[str]] = {}
    for name, to in original_names(build, part, state).items():
        shared.setdefault(to, []).append(name)
    out = {}
    for to, names in shared.items():
        value = (
            torch.cat([state[name] for name in sorted(names, key=_qkv)])
            if len(names) > 1
            else state[names[0]]
        )
        if part == "vae" and ".mid_block.attentions." in names[0] and value.ndim == 2:
            value = value[:, :, None, None]
        out[to] = value.T if _turned(build, part, to) else value
    return out


def unpack(build: str, part: str, name: str, value: Tensor, shape: torch.Size) -> Tensor:
    """Return the part of a one-file checkpoint's tensor that is one weight: the inverse of `pack`, weight by weight.

    Args:
        build: of the model.
        part: of its pipeline.
        name: of the weight in diffusers.
        value: the tensor under its `original_names`.
        shape: of the weight; an answer of another shape means that the file does not fit.
    """
    if part == "vae" and value.ndim == 4 and len(shape) == 2:
        return value[:, :, 0, 0]
    if (build, part) in OPEN_CLIP and (at := _qkv(name)) < len(_QKV):
        return (
            value[at * shape[0] : (at + 1) * shape[0]]
            if len(value) == len(_QKV) * shape[0]
            else value
        )
    return value.T if _turned(build, part, name) else value


def _qkv(name: str) -> int:
    """Return the place of a projection in OpenCLIP's fused tensor; 3 for what is not in it."""
    return next((i for i, kind in enumerate(_QKV) if f".{kind}." in name), len(_QKV))


def _turned(build: str, part: str, name: str) -> bool:
    return (build, part) in OPEN_CLIP and name.removesuffix(".weight").endswith("text_projection")


def kohya_name(name: str, original: str | None = None) -> str:
    """Return the module of a UNet's weight as the LoRA files of web UIs name it (kohya's form).

    Args:
        name: name of the weight. On SD 1.x and 2.x the form keeps diffusers' names.
        original: its name in the original layout, which the form uses on SDXL.
    """
    return "lora_unet_" + (original or name).removesuffix(".weight").replace(".", "_")


def sdxl_unet_names(unet: nn.Module) -> dict[str, str]:
    """Return the original names of an SDXL UNet's weights, which its LoRAs use; empty for other UNets.

    The extra weight of a guidance-distilled UNet (LCM) has no such name, and no LoRA changes it.
    """
    if not hasattr(unet, "add_embedding"):
        return {}
    return unet_names(
        name for name in unet.state_dict() if not name.startswith("time_embedding.cond_proj")
    )


def _counts(names: Iterable[str], pattern: str) -> dict[int, int]:
    """Return how many of the second number there are for each first one."""
    found = {(int(m[1]), int(m[2])) for n in names if (m := re.match(pattern, n))}
    return {level: sum(at == level for at, _ in found) for level in sorted({at for at, _ in found})}


def _place(resnets: dict[int, int], side: str, level: int) -> int:
    """Return the number of a level's first block: down, after the first convolution and a downsampler for each level above."""
    before = sum(n for at, n in resnets.items() if at < level)
    return 1 + before + level if side == "down" else before
