"""Selectors match weights by name."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel

from safegen.core.errors import ConfigError, UnknownNameError
from safegen.models.selectors import select_parameters


def test_attn1_matches_80_tensors_of_49574080_parameters_on_sd_1():
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=64,
            block_out_channels=(320, 640, 1280, 1280),
            layers_per_block=2,
            cross_attention_dim=768,
            attention_head_dim=8,
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        )
    names = select_parameters(unet, "attn1")
    own = dict(unet.named_parameters())
    assert sum(p.numel() for p in own.values()) == 859_520_964  # it is SD 1.x
    assert len(names) == len(set(names)) == 80
    assert sum(own[n].numel() for n in names) == 49_574_080
    assert {n.partition(".attn1.")[2] for n in names} == {
        "to_q.weight",
        "to_k.weight",
        "to_v.weight",
        "to_out.0.weight",
        "to_out.0.bias",
    }


def test_attn1_matches_self_attention_of_every_block_in_order(tiny_model):
    names = select_parameters(tiny_model.denoiser, "attn1")
    assert names == [n for n, _ in tiny_model.denoiser.named_parameters() if "attn1" in n]
    assert {n.split(".")[0] for n in names} == {"down_blocks", "mid_block", "up_blocks"}
    assert not [n for n in names if "attn2" in n or "norm" in n or "ff" in n]


def test_only_cross_attention_models_are_refused_for_attn1():
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=2,
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        only_cross_attention=True,
    )
    with pytest.raises(ConfigError, match="must match self-attention, got cross-attention"):
        select_parameters(unet, "attn1")


def test_a_model_without_attention_is_refused(tiny_model):
    with pytest.raises(ConfigError, match="must match a weight of the AutoencoderKL, got none"):
        select_parameters(tiny_model.vae, "attn1")


def test_an_unknown_selector_suggests_the_nearest(tiny_model):
    with pytest.raises(UnknownNameError, match="Did you mean 'attn1'"):
        select_parameters(tiny_model.denoiser, "atn1")
