"""Names of the original layout and of LoRA files, against the published lists.

The lists are the component files of arenasys/stable-diffusion-webui-model-toolkit (`components/*.txt`), which tells checkpoints apart by
them: every key with its shape, sorted, a line each. Too long to carry (370 kB), so each is held to its length in characters, which a
missing, additional or misnamed key changes, and to lines of it; and the library's own reader must take every name back.
"""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from torch.testing import assert_close
from transformers import CLIPTextConfig, CLIPTextModel

from safegen.models import select
from safegen.models.layout import lora_factors, lora_name, original_names, to_original, unet_names, vae_names

CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
SD1 = {
    "sample_size": 64, "block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2, "cross_attention_dim": 768,
    "attention_head_dim": 8, "down_block_types": (CROSS,) * 3 + (PLAIN,), "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}  # fmt: skip
SD2 = SD1 | {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True, "sample_size": 96}
SDXL = {
    "sample_size": 128, "block_out_channels": (320, 640, 1280), "layers_per_block": 2, "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20), "down_block_types": (PLAIN, CROSS, CROSS), "use_linear_projection": True,
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "transformer_layers_per_block": (1, 2, 10),
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
UNETS = {"SD 1.4": SD1, "SD 2.1": SD2, "SDXL": SDXL}
PUBLISHED = {
    "SD 1.4": (686, 36_314, [
        "output_blocks.9.1.transformer_blocks.0.attn2.to_v.weight [320,768]", "output_blocks.9.1.transformer_blocks.0.norm3.bias [320]",
        "output_blocks.9.1.transformer_blocks.0.ff.net.0.proj.weight [2560,320]", "time_embed.2.weight [1280,1280]",
    ]),
    "SD 2.1": (686, 36_218, ["output_blocks.9.1.transformer_blocks.0.norm3.weight [320]", "time_embed.0.weight [1280,320]"]),
    "SDXL": (1680, 101_976, [
        "output_blocks.2.2.conv.weight [1280,1280,3,3]", "output_blocks.3.0.in_layers.2.weight [640,1920,3,3]",
        "output_blocks.3.1.transformer_blocks.1.attn2.to_k.weight [640,2048]", "output_blocks.5.2.conv.weight [640,640,3,3]",
        "output_blocks.8.0.skip_connection.weight [320,640,1,1]", "output_blocks.5.1.proj_in.weight [640,640]",
    ]),
}  # fmt: skip
"""UNet: keys, characters of its list, lines of it."""
SELECTED = {"SD 1.4": (80, 80, 32, 49_574_080), "SD 2.1": (80, 80, 32, 49_574_080), "SDXL": (350, 350, 140, 409_683_200)}
"""UNet: tensors of attn1, attn2 and kv2; parameters of attn1."""


@pytest.fixture(scope="module", params=sorted(UNETS))
def real(request):
    """A UNet of real size without weights."""
    with torch.device("meta"):
        return request.param, UNet2DConditionModel(**UNETS[request.param])


def lines(named):
    """A list in the published form."""
    return sorted(f"{name} [{','.join(map(str, shape))}]" for name, shape in named.items())


def test_the_unets_keys_are_the_published_ones(real):
    kind, unet = real
    own = dict(unet.named_parameters())
    assert own.keys() == unet.state_dict().keys()
    listed = lines({to: own[name].shape for name, to in unet_names(own).items()})
    count, characters, some = PUBLISHED[kind]
    assert len(set(listed)) == count
    assert len("\n".join(listed)) == characters
    assert set(some) <= set(listed)


def test_the_library_reads_every_name_back(real):
    """diffusers' own conversion of our names gives exactly the names we began with, each from its own tensor."""
    _, unet = real
    names = unet_names(unet.state_dict())
    marked = {f"model.diffusion_model.{to}": torch.full((1,), float(i)) for i, to in enumerate(names.values())}
    back = convert_ldm_unet_checkpoint(marked, dict(unet.config))
    assert {name: float(v) for name, v in back.items()} == {name: float(i) for i, name in enumerate(names)}


def test_the_selectors_pick_the_published_layers(real):
    kind, unet = real
    own = dict(unet.named_parameters())
    one, two, kv, size = SELECTED[kind]
    assert [len(select(unet, s)) for s in ("attn1", "attn2", "kv2")] == [one, two, kv]
    assert sum(own[n].numel() for n in select(unet, "attn1")) == size
    rest, cross = set(select(unet, "noxattn")), set(select(unet, "attn2"))
    ends = {n for n in own if n.startswith(("conv_norm_out.", "conv_out.", "time_embedding."))}
    assert rest | cross | ends == set(own) == set(select(unet, "all"))
    assert not rest & cross
    assert not rest & ends


def vae(**changes):
    with torch.device("meta"):
        return AutoencoderKL(**{
            "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4,
            "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
        } | changes)  # fmt: skip


def test_the_autoencoders_keys_are_the_published_ones():
    own = vae().state_dict()
    listed = lines({to: to_original("vae", name, own[name]).shape for name, to in vae_names(own).items()})
    assert (len(set(listed)), len("\n".join(listed))) == (248, 10_149)
    some = ("decoder.mid.attn_1.proj_out.weight [512,512,1,1]", "decoder.up.0.block.0.nin_shortcut.weight [128,256,1,1]")
    some += ("decoder.up.3.upsample.conv.weight [512,512,3,3]", "encoder.down.2.downsample.conv.bias [512]", "encoder.norm_out.bias [512]")
    assert set(some) <= set(listed)


def test_the_library_reads_the_autoencoder_back():
    net = vae()
    names = vae_names(net.state_dict())
    marked = {f"first_stage_model.{to}": torch.full((1, 1, 1, 1), float(i)) for i, to in enumerate(names.values())}
    back = convert_ldm_vae_checkpoint(marked, dict(net.config))
    assert {name: float(v.flatten()[0]) for name, v in back.items()} == {name: float(i) for i, name in enumerate(names)}


def test_the_text_encoders_keys_are_the_published_ones():
    """The published list has the buffer `embeddings.position_ids` too, which today's libraries do not keep; readers make it themselves."""
    config = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768)
    with torch.device("meta"):
        own = CLIPTextModel(config).state_dict()
    named = {to: own[name].shape for name, to in original_names("text_encoder", own).items()}
    assert len(named) == 196
    assert {name.partition("cond_stage_model.transformer.text_model.")[0] for name in named} == {""}
    short = {name.removeprefix("cond_stage_model.transformer."): shape for name, shape in named.items()}
    assert short["text_model.embeddings.token_embedding.weight"] == (49408, 768)
    assert {"text_model.final_layer_norm.weight", "text_model.encoder.layers.11.mlp.fc2.bias"} <= short.keys()


LORA = ("proj_in.weight", "proj_out.weight", "to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight", "proj.weight", "net.2.weight")


def test_lora_keys_are_the_published_ones_on_sd_1():
    """kohya's files name two factors of each linear weight in the attention blocks; -1 stands for the rank. The list has no alphas."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SD1)
    listed = {}
    for name, p in unet.named_parameters():
        if ".attentions." in name and name.endswith(LORA):
            tail = (1, 1) if p.ndim == 4 else ()
            listed[f"{lora_name(name)}.lora_down.weight"] = (-1, p.shape[1], *tail)
            listed[f"{lora_name(name)}.lora_up.weight"] = (p.shape[0], -1, *tail)
    assert len("\n".join(lines(listed))) == 34_765
    assert "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0.lora_down.weight" in listed


def test_lora_keys_are_the_published_ones_on_sdxl():
    """There the names are those of the original layout, and the list has convolutions and alphas too."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SDXL)
    own, listed = dict(unet.named_parameters()), {}
    for name, to in unet_names(own).items():
        p = own[name]
        if p.ndim >= 2 and name.partition(".")[0] not in ("conv_in", "conv_out", "time_embedding", "add_embedding"):
            stem, tail = lora_name(name, to), (1,) * (p.ndim - 2)
            listed[f"{stem}.alpha"] = ()
            listed[f"{stem}.lora_down.weight"] = (-1, *p.shape[1:])
            listed[f"{stem}.lora_up.weight"] = (p.shape[0], -1, *tail)
    assert len("\n".join(lines(listed))) == 184_846
    assert {"lora_unet_output_blocks_5_1_transformer_blocks_1_attn2_to_v.alpha", "lora_unet_output_blocks_5_2_conv.alpha"} <= listed.keys()


def test_a_weight_without_a_place_is_named():
    with pytest.raises(ValueError, match=r"UNet's weight controlnet.w.weight has no place"):
        unet_names(["controlnet.w.weight"])
    with pytest.raises(ValueError, match=r"autoencoder's weight extra.weight has no place"):
        vae_names([*vae().state_dict(), "extra.weight"])


# ------------------------------------------------------------ factors


def test_all_ranks_give_the_change_back_exactly():
    delta = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    down, up, kept = lora_factors(delta, 9)
    assert (down.shape, up.shape) == ((4, 4), (6, 4))
    assert kept == pytest.approx(1)
    assert_close(up @ down, delta, rtol=0, atol=1e-6)


def test_a_rank_keeps_the_largest_singular_values_and_says_how_much_that_is():
    """diag(3, 2, 1): rank 1 keeps 9 of 14."""
    down, up, kept = lora_factors(torch.diag(torch.tensor([3.0, 2.0, 1.0])), 1)
    assert kept == pytest.approx(9 / 14)
    assert_close(up @ down, torch.diag(torch.tensor([3.0, 0.0, 0.0])), rtol=0, atol=1e-6)


def test_a_convolution_is_two_convolutions():
    delta = torch.randn(5, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    down, up, kept = lora_factors(delta, 12)
    assert (down.shape, up.shape) == ((5, 3, 2, 2), (5, 5, 1, 1))
    x = torch.randn(1, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    two = torch.nn.functional.conv2d(torch.nn.functional.conv2d(x, down), up)
    assert_close(two, torch.nn.functional.conv2d(x, delta), rtol=0, atol=1e-5)
    assert kept == pytest.approx(1)


def test_no_change_is_held_by_anything():
    down, up, kept = lora_factors(torch.zeros(4, 3), 2)
    assert kept == 1
    assert (up @ down).abs().max() == 0
