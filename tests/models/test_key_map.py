"""Names of the original layout, against the published lists in `keys/`.

The library's own reader must take every name back.
"""

from __future__ import annotations

import re
from math import prod

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from real import lines, published
from torch.testing import assert_close
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from safegen.models.checkpoint.key_map import (
    PREFIX,
    open_clip_names,
    pack,
    unet_names,
    unpack,
    vae_names,
)
from safegen.models.selectors import SELECTORS, UNET, select_parameters
from safegen.patches.lora import svd_factors

VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
CLIP_H = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
}
CLIP_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
TEXT = {
    ("sd1", "text_encoder"): (CLIPTextModel, CLIP_L),
    ("sd2", "text_encoder"): (CLIPTextModel, CLIP_H),
    ("sdxl", "text_encoder"): (CLIPTextModel, CLIP_L),
    ("sdxl", "text_encoder_2"): (CLIPTextModelWithProjection, CLIP_G),
}
OPEN_CLIP = {"sd2": "text_encoder", "sdxl": "text_encoder_2"}
SELECTED = {
    "sd1": {
        "attn1": (80, 49_574_080),
        "attn2": (80, 43_962_560),
        "kv2": (32, 19_169_280),
        "attention": (160, 93_536_640),
        "noxattn": (598, 813_495_680),
        "esd-u": (388, 815_358_084),
        "all": (686, 859_520_964),
    },
    "sd2": {
        "attn1": (80, 49_574_080),
        "attn2": (80, 50_352_320),
        "kv2": (32, 25_559_040),
        "attention": (160, 99_926_400),
        "noxattn": (598, 813_495_680),
        "esd-u": (388, 815_358_084),
        "all": (686, 865_910_724),
    },
    "sdxl": {
        "attn1": (350, 409_683_200),
        "attn2": (350, 545_670_400),
        "kv2": (140, 340_787_200),
        "attention": (700, 955_353_600),
        "noxattn": (1322, 2_019_730_560),
        "esd-u": (818, 2_021_205_124),
        "all": (1680, 2_567_463_684),
    },
}
"""Architecture: tensors and parameters of each selector, by hand, and of the whole UNet.

A block of width c with text of width d has 4 c^2 + c in attn1, 2 c^2 + c + 2 c d in attn2, of which
2 c d in kv2. SD 1.x and 2.x have 5, 5 and 6 blocks of 320, 640 and 1280 (d 768 and 1024), SDXL 10
and 60 of 640 and 1280 (d 2048). `noxattn` is all but attn2 and the eight tensors of 2,062,724
parameters of the last layers and the time embedding. `esd-u` is all but attn2 and the norms: 218
tensors of 200,320 parameters in SD 1.x and 2.x, 512 of 588,160 in SDXL.
"""


def test_a_whole_checkpoint_has_the_published_keys_and_shapes(real):
    """Models of real size are built on the meta device; `UNUSED` lists the other published keys."""
    build, unet = real
    with torch.device("meta"):
        parts = {"unet": unet, "vae": AutoencoderKL(**VAE)} | {
            part: kind(CLIPTextConfig(**config))
            for (of, part), (kind, config) in TEXT.items()
            if of == build
        }
    ours = {
        name: tuple(v.shape)
        for part, net in parts.items()
        for name, v in pack(build, part, net.state_dict()).items()
    }
    theirs = published(build)
    besides = theirs.keys() - ours.keys()
    assert {name: theirs[name] for name in ours} == ours
    assert besides == BESIDES[build]


BUFFER = "embeddings.position_ids"
LAST = ("attn.in_proj", "attn.out_proj", "ln_1", "ln_2", "mlp.c_fc", "mlp.c_proj")
BESIDES = {
    "sd1": {f"cond_stage_model.transformer.text_model.{BUFFER}"},
    "sd2": {"cond_stage_model.model.logit_scale", "cond_stage_model.model.text_projection"}
    | {
        "cond_stage_model.model.transformer.resblocks.23."
        f"{name}{'_' if name == 'attn.in_proj' else '.'}{end}"
        for name in LAST
        for end in ("weight", "bias")
    },
    "sdxl": {
        f"conditioner.embedders.0.transformer.text_model.{BUFFER}",
        "conditioner.embedders.1.model.logit_scale",
    },
}
"""Published keys that decide no image: buffer, logit scale, SD 2.x's last block and projection."""


def test_the_published_lists_have_the_length_of_an_independent_list():
    """Lengths in characters of arenasys' component files, made independently."""
    for build, part, characters in (
        ("sd1", "unet", 36_314),
        ("sd2", "unet", 36_218),
        ("sdxl", "unet", 101_976),
        ("sd1", "vae", 10_149),
        ("sdxl", "vae", 10_149),
        ("sd2", "text_encoder", 14_193),
    ):
        assert len("\n".join(lines(published(build, PREFIX[build][part])))) == characters


def test_diffusers_converts_every_name_back(real):
    """diffusers' conversion of our names restores the original names."""
    _, unet = real
    names = unet_names(unet.state_dict())
    marked = {
        f"model.diffusion_model.{to}": torch.full((1,), float(i))
        for i, to in enumerate(names.values())
    }
    back = convert_ldm_unet_checkpoint(marked, dict(unet.config))
    assert {name: float(v) for name, v in back.items()} == {
        name: float(i) for i, name in enumerate(names)
    }


def test_selectors_match_the_published_layers(real):
    """Selected weights have the selector's layers in their published names."""
    build, unet = real
    own, to = dict(unet.named_parameters()), unet_names(unet.state_dict())
    listed = published(build, "model.diffusion_model.")
    layers = {
        "attn1": (".attn1.",),
        "attn2": (".attn2.",),
        "kv2": (".attn2.to_k.", ".attn2.to_v."),
        "attention": (".attn1.", ".attn2."),
    }
    ends = ("out.", "time_embed.")
    norm = re.compile(r"(^out|\.in_layers|\.out_layers)\.0\.|\.norm\d?\.")
    of = {
        "all": set(listed),
        "noxattn": {n for n in listed if ".attn2." not in n and not n.startswith(ends)},
        "esd-u": {n for n in listed if ".attn2." not in n and not norm.search(n)},
    }
    of |= {
        selector: {n for n in listed if any(mark in n for mark in marks)}
        for selector, marks in layers.items()
    }
    assert of.keys() == SELECTORS[UNET].keys() == SELECTED[build].keys()
    for selector, wanted in of.items():
        picked = select_parameters(unet, selector)
        assert {to[n]: tuple(own[n].shape) for n in picked} == {n: listed[n] for n in wanted}
        assert (len(picked), sum(prod(listed[n]) for n in wanted)) == SELECTED[build][selector]
    rest, cross = set(select_parameters(unet, "noxattn")), set(select_parameters(unet, "attn2"))
    last = {n for n in own if n.startswith(("conv_norm_out.", "conv_out.", "time_embedding."))}
    assert rest | cross | last == set(own) == set(select_parameters(unet, "all"))
    assert not rest & cross
    assert not rest & last


def vae():
    with torch.device("meta"):
        return AutoencoderKL(**VAE)


def test_diffusers_converts_the_autoencoder_back():
    net = vae()
    names = vae_names(net.state_dict())
    marked = {
        f"first_stage_model.{to}": torch.full((1, 1, 1, 1), float(i))
        for i, to in enumerate(names.values())
    }
    back = convert_ldm_vae_checkpoint(marked, dict(net.config))
    assert {name: float(v.flatten()[0]) for name, v in back.items()} == {
        name: float(i) for i, name in enumerate(names)
    }


@pytest.mark.parametrize(("build", "part"), OPEN_CLIP.items())
def test_diffusers_converts_an_open_clip_encoder_back(build, part):
    """Models have real names and depth at width 4."""
    kind, config = TEXT[build, part]
    small = {
        "hidden_size": 4,
        "intermediate_size": 6,
        "num_attention_heads": 2,
        "vocab_size": 9,
        "projection_dim": 4,
    }
    net = kind(CLIPTextConfig(**config | small))
    state = net.state_dict()
    packed = {name: value.load() for name, value in pack(build, part, state).items()}
    back = convert_open_clip_checkpoint(
        getattr(net, "text_model", net), packed, prefix=PREFIX[build][part]
    )
    wrapped = hasattr(net, "text_model")
    back = {
        name if wrapped else name.removeprefix("text_model."): value for name, value in back.items()
    }
    assert back.keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in back.items())
    again = unpack(build, part, packed, {name: value.shape for name, value in state.items()})
    assert all(torch.equal(again[name].load(), value) for name, value in state.items())


def test_an_unknown_weight_is_named():
    with pytest.raises(ValueError, match=r"UNet's weight controlnet.w.weight has no place"):
        unet_names(["controlnet.w.weight"])
    with pytest.raises(ValueError, match=r"autoencoder's weight extra.weight has no place"):
        vae_names([*vae().state_dict(), "extra.weight"])
    with pytest.raises(
        ValueError, match=r"text encoder's weight encoder.layers.0.gate.weight has no place"
    ):
        open_clip_names(["encoder.layers.0.gate.weight"])


# ------------------------------------------------------------ factors


def test_full_rank_factors_restore_the_change():
    delta = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    down, up, energy = svd_factors(delta, 9)
    assert (down.shape, up.shape) == ((4, 4), (6, 4))
    assert energy == pytest.approx(1)
    assert_close(up @ down, delta, rtol=0, atol=1e-6)


def test_factors_keep_the_largest_singular_values():
    """diag(3, 2, 1): rank 1 keeps 9 of 14."""
    down, up, energy = svd_factors(torch.diag(torch.tensor([3.0, 2.0, 1.0])), 1)
    assert energy == pytest.approx(9 / 14)
    assert_close(up @ down, torch.diag(torch.tensor([3.0, 0.0, 0.0])), rtol=0, atol=1e-6)


def test_a_convolution_factors_into_two():
    delta = torch.randn(5, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    down, up, energy = svd_factors(delta, 12)
    assert (down.shape, up.shape) == ((5, 3, 2, 2), (5, 5, 1, 1))
    x = torch.randn(1, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    two = torch.nn.functional.conv2d(torch.nn.functional.conv2d(x, down), up)
    assert_close(two, torch.nn.functional.conv2d(x, delta), rtol=0, atol=1e-5)
    assert energy == pytest.approx(1)


def test_no_change_is_retained_by_any_rank():
    down, up, energy = svd_factors(torch.zeros(4, 3), 2)
    assert energy == 1
    assert (up @ down).abs().max() == 0
