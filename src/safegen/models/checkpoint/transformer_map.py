"""Names of SD3's and FLUX's transformer weights in the layout of their publishers.

ComfyUI, kohya's sd-scripts and one-file checkpoints use that layout.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import Tensor

_ADDED = {
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "context_embedder": "context_embedder",
    "pos_embed.proj": "x_embedder.proj",
}
_FINAL = {"norm_out.linear": "final_layer.adaLN_modulation.1", "proj_out": "final_layer.linear"}
_SD3_BLOCK = {
    "attn.to_q": "x_block.attn.qkv",
    "attn.to_k": "x_block.attn.qkv",
    "attn.to_v": "x_block.attn.qkv",
    "attn.to_out.0": "x_block.attn.proj",
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn2.to_q": "x_block.attn2.qkv",
    "attn2.to_k": "x_block.attn2.qkv",
    "attn2.to_v": "x_block.attn2.qkv",
    "attn2.to_out.0": "x_block.attn2.proj",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "attn.add_q_proj": "context_block.attn.qkv",
    "attn.add_k_proj": "context_block.attn.qkv",
    "attn.add_v_proj": "context_block.attn.qkv",
    "attn.to_add_out": "context_block.attn.proj",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
_FLUX_ENDS = {
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "context_embedder": "txt_in",
    "x_embedder": "img_in",
}
_FLUX_DOUBLE = {
    "attn.to_q": "img_attn.qkv",
    "attn.to_k": "img_attn.qkv",
    "attn.to_v": "img_attn.qkv",
    "attn.to_out.0": "img_attn.proj",
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.add_q_proj": "txt_attn.qkv",
    "attn.add_k_proj": "txt_attn.qkv",
    "attn.add_v_proj": "txt_attn.qkv",
    "attn.to_add_out": "txt_attn.proj",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
}
_FLUX_SINGLE = {
    "attn.to_q": "linear1",
    "attn.to_k": "linear1",
    "attn.to_v": "linear1",
    "proj_mlp": "linear1",
    "proj_out": "linear2",
    "norm.linear": "modulation.lin",
    "attn.norm_q": "norm.query_norm",
    "attn.norm_k": "norm.key_norm",
}
_BLOCKS = {
    "sd3": {"transformer_blocks": ("joint_blocks", _SD3_BLOCK)},
    "flux": {
        "transformer_blocks": ("double_blocks", _FLUX_DOUBLE),
        "single_transformer_blocks": ("single_blocks", _FLUX_SINGLE),
    },
}
_ENDS = {"sd3": _ADDED | _FINAL, "flux": _FLUX_ENDS | _FINAL}
POSITIONS = "pos_embed.pos_embed"
"""SD 3's position embedding, a constant that its files have."""
_BLOCK = re.compile(r"((?:single_)?transformer_blocks)\.(\d+)\.(.+)")
_PARTS = re.compile(r"\.(?:to_(?P<image>[qkv])|add_(?P<text>[qkv])_proj|proj_mlp)\.")


def transformer_names(names: Iterable[str]) -> dict[str, str]:
    """Return the original name of each weight of an SD3 or FLUX transformer, without prefix.

    Weights that share a name are one tensor there: queries, keys, values and, in FLUX's single
    blocks, the MLP's first layer, stacked in the order of `part_of`.

    Raises:
        ValueError: a name is unknown.
    """
    names = list(names)
    layout = "flux" if any(name.startswith("x_embedder.") for name in names) else "sd3"
    renamed = {}
    for name in names:
        stem, _, end = name.rpartition(".")
        if name == POSITIONS:
            renamed[name] = "pos_embed"
            continue
        original = _ENDS[layout].get(stem)
        if match := _BLOCK.fullmatch(stem):
            blocks, inner = _BLOCKS[layout].get(match[1], ("", {}))
            original = f"{blocks}.{match[2]}.{inner[match[3]]}" if match[3] in inner else None
        if original is None:
            raise ValueError(f"the transformer's weight {name} has no place in the original layout")
        if layout == "flux" and original.endswith(("query_norm", "key_norm")):
            end = "scale"
        renamed[name] = f"{original}.{end}"
    return renamed


def part_of(name: str) -> int:
    """Return the place of a weight in the tensor that it shares: q, k, v, then the MLP."""
    match = _PARTS.search(name)
    if match is None:
        return 0
    kind = match["image"] or match["text"]
    return "qkv".index(kind) if kind else 3


def swapped_names(names: Iterable[str]) -> set[str]:
    """Return the weights that have their halves in the other order in the original layout.

    diffusers' last norms return scale and shift, the original ones shift and scale. SD3's last
    block has such a norm for its text, too.
    """
    names = list(names)
    blocks = [int(m[1]) for n in names if (m := re.match(r"transformer_blocks\.(\d+)\.", n))]
    last = f"transformer_blocks.{max(blocks, default=0)}.norm1_context.linear."
    is_flux = any(name.startswith("x_embedder.") for name in names)
    return {
        name
        for name in names
        if name.startswith("norm_out.linear.") or (name.startswith(last) and not is_flux)
    }


def swap_halves(value: Tensor) -> Tensor:
    """Return a tensor with its two halves along the first dimension exchanged."""
    return torch.cat(value.chunk(2)[::-1])
