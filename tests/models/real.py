"""Denoisers of real size, and published lists of their keys; each list states its source."""

from __future__ import annotations

import gzip
from pathlib import Path

CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
SD1 = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "down_block_types": (CROSS,) * 3 + (PLAIN,),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}
SD2 = SD1 | {
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
    "sample_size": 96,
}
SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "down_block_types": (PLAIN, CROSS, CROSS),
    "use_linear_projection": True,
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
UNETS = {"sd1": SD1, "sd2": SD2, "sdxl": SDXL}
SD35_MEDIUM = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}
SD3_MEDIUM = SD35_MEDIUM | {"pos_embed_max_size": 192, "dual_attention_layers": (), "qk_norm": None}
FLUX_DEV = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
}
TRANSFORMERS = {
    "sd3-medium": ("SD3Transformer2DModel", SD3_MEDIUM),
    "sd35-medium": ("SD3Transformer2DModel", SD35_MEDIUM),
    "flux-dev": ("FluxTransformer2DModel", FLUX_DEV),
}
"""Class and settings of published transformers."""


def build_denoiser(name):
    """Return a denoiser of real size on the meta device: shapes without weights."""
    import diffusers
    import torch

    kind, config = TRANSFORMERS.get(name) or ("UNet2DConditionModel", UNETS[name])
    with torch.device("meta"):
        return getattr(diffusers, kind)(**config)


def published(name, prefix=""):
    """Return shapes by name from a list in `keys/`, below a prefix and without it."""
    text = gzip.decompress(
        (Path(__file__).parent / "keys" / f"{name}.txt.gz").read_bytes()
    ).decode()
    found = {}
    for line in text.splitlines():
        key, _, shape = line.partition(" [")
        if not line.startswith("#") and key.startswith(prefix):
            found[key.removeprefix(prefix)] = tuple(
                int(n) for n in shape.rstrip("]").split(",") if n
            )
    return found


def lines(shapes):
    """Return a list in the published form."""
    return sorted(f"{name} [{','.join(map(str, shape))}]" for name, shape in shapes.items())
