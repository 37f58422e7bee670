"""The original Stable Diffusion layout: what a weight of a diffusers part is called in a one-file checkpoint, and in a LoRA file.

Names only, so that it holds for every size of the family: the block counts are read off the names themselves.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import Tensor

PREFIX = {"unet": "model.diffusion_model.", "vae": "first_stage_model.", "text_encoder": "cond_stage_model.transformer.text_model."}
"""Part of an SD 1.x pipeline: where it lies in the file."""
_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0", "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}  # fmt: skip
_ENDS = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2", "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0", "conv_out": "out.2", "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip
_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def unet_names(names: Iterable[str]) -> dict[str, str]:
    """Return, for each weight of a UNet, its name in the original layout, without prefix.

    The original numbers its blocks in one row: down, a resnet with its attention is one block and so is a downsampler; up, an upsampler
    is the last layer of the block before it.

    Raises:
        ValueError: a name is of no known kind.
    """
    names = list(names)
    resnets = {side: _counts(names, rf"{side}_blocks\.(\d+)\.resnets\.(\d+)\.") for side in ("down", "up")}
    tall = {int(m[1]) for n in names if (m := re.match(r"up_blocks\.(\d+)\.attentions\.", n))}
    out = {}
    for name in names:
        stem, _, end = name.rpartition(".")
        if stem in _ENDS:
            out[name] = f"{_ENDS[stem]}.{end}"
        elif m := re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.+)\.(weight|bias)$", name):
            side, level, kind, j, inner, end = m[1], int(m[2]), m[3], int(m[4]), m[5], m[6]
            place = _place(resnets[side], side, level) + j
            inner = _RESNET[inner] if kind == "resnets" else inner
            out[name] = f"{'input' if side == 'down' else 'output'}_blocks.{place}.{int(kind == 'attentions')}.{inner}.{end}"
        elif m := re.match(r"down_blocks\.(\d+)\.downsamplers\.0\.conv\.(.+)$", name):
            level = int(m[1])
            out[name] = f"input_blocks.{_place(resnets['down'], 'down', level) + resnets['down'][level]}.0.op.{m[2]}"
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
        if m := re.match(r"(encoder|decoder)\.(?:down|up)_blocks\.(\d+)\.(resnets|downsamplers|upsamplers)\.(\d+)\.(.+)$", name):
            side, level = m[1], int(m[2]) if m[1] == "encoder" else top - int(m[2])
            way = "down" if side == "encoder" else "up"
            inner = m[5].replace("conv_shortcut", "nin_shortcut")
            out[name] = f"{side}.{way}.{level}." + (f"block.{m[4]}.{inner}" if m[3] == "resnets" else f"{way}sample.{inner}")
        elif m := re.match(r"(encoder|decoder)\.mid_block\.resnets\.(\d+)\.(.+)$", name):
            out[name] = f"{m[1]}.mid.block_{int(m[2]) + 1}.{m[3].replace('conv_shortcut', 'nin_shortcut')}"
        elif m := re.match(r"(encoder|decoder)\.mid_block\.attentions\.0\.(.+)\.(weight|bias)$", name):
            out[name] = f"{m[1]}.mid.attn_1.{_ATTENTION[m[2]]}.{m[3]}"
        elif m := re.match(r"(?:(?:encoder|decoder)\.)?(?:conv_in|conv_out|conv_norm_out|quant_conv|post_quant_conv)\.", name):
            out[name] = name.replace("conv_norm_out", "norm_out")
        else:
            raise ValueError(f"the autoencoder's weight {name} has no place in the original layout")
    return out


def original_names(part: str, names: Iterable[str]) -> dict[str, str]:
    """Return, for each weight of an SD 1.x pipeline's part, its name in a one-file checkpoint."""
    names = list(names)
    if part == "text_encoder":
        return {n: PREFIX[part] + n.removeprefix("text_model.") for n in names}
    return {n: PREFIX[part] + to for n, to in (unet_names if part == "unet" else vae_names)(names).items()}


def to_original(part: str, name: str, value: Tensor) -> Tensor:
    """Return a weight in the shape of the original layout: the autoencoder's attention was made of 1x1 convolutions."""
    linear = part == "vae" and ".mid_block.attentions." in name and value.ndim == 2
    return value[:, :, None, None] if linear else value


def lora_name(name: str, original: str | None = None) -> str:
    """Return the module of a UNet's weight as LoRA files of the web UIs name it (kohya's form).

    Args:
        name: of the weight. On SD 1.x and 2.x the form keeps the diffusers names.
        original: its name in the original layout, which is what the form uses on SDXL.
    """
    return "lora_unet_" + (original or name).removesuffix(".weight").replace(".", "_")


def lora_factors(delta: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """Return the best factors of a rank for a change of weights, and how much of it they hold.

    Truncated singular value decomposition, each factor with the root of the singular values (Eckart and Young 1936), in float64.

    Args:
        delta: change of a linear weight, (out, in), or of a convolution, (out, in, h, w).
        rank: columns to keep; more than there are is all of them.

    Returns:
        `down` (r, in[, h, w]) and `up` (out, r[, 1, 1]), float32, with up @ down nearest to delta; the share of its squared norm that
        they hold, in [0, 1], 1 for no change at all.
    """
    flat = delta.detach().cpu().double().flatten(1)
    u, s, v = torch.linalg.svd(flat, full_matrices=False)
    r = min(rank, len(s))
    root = s[:r].sqrt()
    down, up = (root[:, None] * v[:r]).reshape(r, *delta.shape[1:]), (u[:, :r] * root).reshape(-1, r, *(1,) * (delta.ndim - 2))
    total = float(s.pow(2).sum())
    return down.float().contiguous(), up.float().contiguous(), float(s[:r].pow(2).sum()) / total if total else 1.0


def _counts(names: Iterable[str], pattern: str) -> dict[int, int]:
    """Return how many of the second number there are for each first one."""
    found = {(int(m[1]), int(m[2])) for n in names if (m := re.match(pattern, n))}
    return {level: sum(at == level for at, _ in found) for level in sorted({at for at, _ in found})}


def _place(resnets: dict[int, int], side: str, level: int) -> int:
    """Return the number of a level's first block: down, after the first convolution and a downsampler for each level above."""
    before = sum(n for at, n in resnets.items() if at < level)
    return 1 + before + level if side == "down" else before
