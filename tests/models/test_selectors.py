"""Selectors match weights by name."""

from __future__ import annotations

import re

import pytest
from diffusers import UNet2DConditionModel
from real import build_denoiser

from safegen.core.errors import ConfigError, UnknownNameError
from safegen.models.selectors import FLUX, SELECTORS, select_parameters
from tests.tiny import build_pipeline

IMAGE = ("to_q", "to_k", "to_v", "to_out.0")
TEXT = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


COUNTS = {
    "sd1": (859_520_964, {"attn1": (80, 49_574_080)}),
    "sd35-medium": (
        2_243_171_520,
        {
            "attn1": (296, 349_403_136),
            "joint": (192, 226_639_872),
            "dual": (104, 122_763_264),
            "attn2": (190, 224_279_040),
            "kv2": (96, 113_319_936),
            "context": (2, 9_437_184),
            "attention": (486, 573_682_176),
            "noxattn": (516, 1_234_709_120),
            "esd-u": (596, 2_018_884_672),
            "all": (908, 2_243_171_520),
        },
    ),
    "flux-dev": (
        11_901_408_320,
        {
            "attn1": (380, 1_793_648_640),
            "joint": (152, 717_459_456),
            "attn2": (152, 717_459_456),
            "kv2": (76, 358_729_728),
            "context": (2, 14_942_208),
            "attention": (532, 2_511_108_096),
            "noxattn": (838, 8_609_085_696),
            "esd-u": (856, 11_183_929_408),
            "all": (1160, 11_901_408_320),
        },
    ),
}
"""Model of real size: its parameters, and by selector the tensors and parameters that match."""


@pytest.mark.parametrize("name", COUNTS)
def test_each_selector_matches_known_counts_at_real_size(name):
    denoiser = build_denoiser(name)
    own = dict(denoiser.named_parameters())
    size, expected = COUNTS[name]
    assert sum(p.numel() for p in own.values()) == size  # it is the published model
    for selector, counts in expected.items():
        names = select_parameters(denoiser, selector)
        assert len(names) == len(set(names))
        assert (len(names), sum(own[n].numel() for n in names)) == counts, selector


def _layers(denoiser, selector):
    """Return the matched names without block numbers, with the kind of block."""
    return {
        re.sub(r"^(single_)?transformer_blocks\.\d+\.", r"\1", name)
        for name in (select_parameters(denoiser, selector))
    }


def test_attn1_of_sd_1_is_projections_of_self_attention():
    names = select_parameters(build_denoiser("sd1"), "attn1")
    assert {n.partition(".attn1.")[2] for n in names} == {
        "to_q.weight",
        "to_k.weight",
        "to_v.weight",
        "to_out.0.weight",
        "to_out.0.bias",
    }


def test_transformers_select_image_and_text_streams_apart():
    sd35, flux = (build_denoiser(name) for name in ("sd35-medium", "flux-dev"))
    image = {f"{layer}.{kind}" for layer in IMAGE for kind in ("weight", "bias")}
    joint = {f"attn.{layer}" for layer in image}
    dual = {f"attn2.{layer}" for layer in image}
    single = {f"single_attn.{layer}" for layer in image if "to_out" not in layer}
    text = {f"attn.{layer}.{kind}" for layer in TEXT for kind in ("weight", "bias")}
    assert _layers(sd35, "joint") == _layers(flux, "joint") == joint
    assert _layers(sd35, "dual") == dual
    assert _layers(sd35, "attn1") == joint | dual
    assert _layers(flux, "attn1") == joint | single
    assert _layers(sd35, "attn2") == _layers(flux, "attn2") == text
    assert _layers(sd35, "attention") == joint | dual | text
    assert _layers(flux, "attention") == joint | single | text


@pytest.mark.parametrize("family", ["sd35", "flux"])
def test_image_selectors_and_text_selectors_share_no_weight(family):
    denoiser = build_pipeline(family).transformer
    chosen = {name: set(select_parameters(denoiser, name)) for name in SELECTORS[FLUX]}
    assert not chosen["attn1"] & chosen["attn2"]
    assert chosen["attention"] == chosen["attn1"] | chosen["attn2"]
    assert chosen["kv2"] < chosen["attn2"]
    assert not chosen["noxattn"] & (chosen["attn2"] | chosen["context"])
    assert not chosen["esd-u"] & chosen["attn2"]
    assert (
        chosen["attn1"]
        < chosen["noxattn"]
        < chosen["esd-u"] | {name for name in chosen["all"] if ".norm_" in name}
    )


@pytest.mark.parametrize(
    ("family", "selector", "reason"),
    [
        ("sd1", "joint", "text and image have separate attention. Use attn1, attn2 or attention"),
        ("sd1", "dual", "all attention of the image alone is attn1. Use attn1"),
        ("sd1", "context", "text enters at every cross-attention. Use kv2"),
        ("sd3", "dual", "no block of it has attention of the image alone. Use joint"),
        ("flux", "dual", "no block of it has attention of the image alone. Use joint"),
    ],
)
def test_a_selector_without_layers_is_refused_with_a_reason(family, selector, reason):
    denoiser = getattr(build_pipeline(family), "unet" if family == "sd1" else "transformer")
    with pytest.raises(ConfigError, match=f"must match weights of the .*, got '{selector}': ") as e:
        select_parameters(denoiser, selector)
    assert str(e.value).endswith(reason)


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


def test_a_network_of_an_unknown_class_is_refused(tiny_model):
    with pytest.raises(ConfigError, match=r"denoiser must be one of .*, got AutoencoderKL"):
        select_parameters(tiny_model.vae, "attn1")


def test_an_unknown_selector_suggests_the_nearest(tiny_model):
    with pytest.raises(UnknownNameError, match="Did you mean 'attn1'"):
        select_parameters(tiny_model.denoiser, "atn1")
