"""Tiny random models of SD 2.x (v-prediction) and SDXL."""

from __future__ import annotations

import pytest
from real import UNETS

PROMPTS = ("a red cube on a white table", "a blue ball in the grass", "a green cone under a tree")


@pytest.fixture(scope="session")
def make_tiny():
    """Return a builder of tiny random models by architecture, `sd2` or `sdxl`.

    More arguments go to the schedule.
    """
    import torch
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    from safegen.models.model import Model
    from tools.mini.networks import build_tokenizer

    def build(kind: str, **schedule):
        tokenizer, xl = build_tokenizer(PROMPTS), kind == "sdxl"
        ends = {
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        common = {
            "vocab_size": len(tokenizer),
            "max_position_embeddings": tokenizer.model_max_length,
            "num_attention_heads": 2,
            **ends,
        }

        def text(width, layers, act):
            return CLIPTextConfig(
                hidden_size=width,
                intermediate_size=2 * width,
                num_hidden_layers=layers,
                hidden_act=act,
                projection_dim=width,
                **common,
            )

        unet = {
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "block_out_channels": (16, 32),
            "layers_per_block": 1,
            "norm_num_groups": 8,
            "use_linear_projection": True,
            "attention_head_dim": [2, 4],
        }
        if xl:
            unet |= {
                "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
                "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
                "cross_attention_dim": 56,
                "transformer_layers_per_block": (1, 2),
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 8,
                "projection_class_embeddings_input_dim": 6 * 8 + 24,
            }
        else:
            crossed = {
                "down_block_types": ("CrossAttnDownBlock2D",) * 2,
                "up_block_types": ("CrossAttnUpBlock2D",) * 2,
            }
            unet |= crossed | {"cross_attention_dim": 32}
        ddim = {
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "steps_offset": 1,
            "clip_sample": False,
        }
        ddim |= (
            {"set_alpha_to_one": False}
            | ({} if xl else {"prediction_type": "v_prediction"})
            | schedule
        )
        with torch.random.fork_rng():
            torch.manual_seed(0)
            parts = {
                "vae": AutoencoderKL(
                    block_out_channels=(8, 8, 8),
                    down_block_types=("DownEncoderBlock2D",) * 3,
                    up_block_types=("UpDecoderBlock2D",) * 3,
                    layers_per_block=1,
                    latent_channels=4,
                    norm_num_groups=4,
                    sample_size=32,
                ),
                "unet": UNet2DConditionModel(**unet),
                "tokenizer": tokenizer,
                "scheduler": DDIMScheduler(**ddim),
            }
            if xl:
                two = {
                    "text_encoder": CLIPTextModel(text(32, 3, "quick_gelu")),
                    "tokenizer_2": tokenizer,
                }
                two["text_encoder_2"] = CLIPTextModelWithProjection(text(24, 3, "gelu"))
                pipe = StableDiffusionXLPipeline(**parts, **two, add_watermarker=False)
            else:
                parts["text_encoder"] = CLIPTextModel(text(32, 2, "gelu"))
                pipe = StableDiffusionPipeline(
                    **parts,
                    safety_checker=None,
                    feature_extractor=None,
                    requires_safety_checker=False,
                )
        pipe.set_progress_bar_config(disable=True)
        model = Model(kind, pipe)
        for part in model.components:
            getattr(pipe, part).eval().requires_grad_(False)
        return model

    return build


@pytest.fixture(scope="session", params=["sd2", "sdxl"])
def other_build(request, make_tiny):
    """Return a tiny SD 2.x, then a tiny SDXL, both read-only."""
    return make_tiny(request.param)


@pytest.fixture(scope="module", params=sorted(UNETS))
def real(request):
    """Return an architecture and its UNet of real size, without weights."""
    import torch
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return request.param, UNet2DConditionModel(**UNETS[request.param])
