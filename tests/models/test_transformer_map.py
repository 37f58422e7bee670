"""Names of transformers' weights in the original layout, against published lists and diffusers."""

from __future__ import annotations

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from diffusers.loaders.single_file_utils import (
    convert_flux_transformer_checkpoint_to_diffusers,
    convert_sd3_transformer_checkpoint_to_diffusers,
)
from real import FLUX_DEV, SD3_MEDIUM, SD35_MEDIUM, published

from safegen.models.checkpoint.transformer_map import (
    part_of,
    swap_halves,
    swapped_names,
    transformer_names,
)

CONVERTERS = {
    "flux": (
        FluxTransformer2DModel,
        FLUX_DEV | {"num_layers": 2, "num_single_layers": 2},
        convert_flux_transformer_checkpoint_to_diffusers,
    ),
    "sd3": (
        SD3Transformer2DModel,
        SD3_MEDIUM | {"num_layers": 2},
        convert_sd3_transformer_checkpoint_to_diffusers,
    ),
    "sd35": (
        SD3Transformer2DModel,
        SD35_MEDIUM | {"num_layers": 3, "dual_attention_layers": (0, 1)},
        convert_sd3_transformer_checkpoint_to_diffusers,
    ),
}


@pytest.mark.parametrize(
    ("name", "network", "config"),
    [("flux", FluxTransformer2DModel, FLUX_DEV), ("sd3", SD3Transformer2DModel, SD3_MEDIUM)],
)
def test_names_and_shapes_are_those_of_the_published_list(name, network, config):
    with torch.device("meta"):
        own = {n: tuple(p.shape) for n, p in network(**config).named_parameters()}
    ours = {}
    for weight, original in transformer_names(own).items():
        rows, *rest = own[weight]
        ours[original] = (ours.get(original, (0,))[0] + rows, *rest)
    listed = published(name, "model.diffusion_model.")
    listed.pop("pos_embed", None)  # a constant of SD 3
    assert ours == listed


@pytest.mark.parametrize("kind", CONVERTERS)
def test_diffusers_converts_every_name_part_and_half_back(kind):
    network, config, convert = CONVERTERS[kind]
    with torch.device("meta"):
        own = {n: p.shape for n, p in network(**config).named_parameters()}
    marked = {
        name: torch.arange(shape[0])[:, None] / shape[0] + i
        for i, (name, shape) in enumerate(own.items())
    }
    swapped = swapped_names(own)
    parts = {}
    for name, original in transformer_names(own).items():
        value = swap_halves(marked[name]) if name in swapped else marked[name]
        parts.setdefault(original, {})[part_of(name)] = value
    state = {name: torch.cat([v for _, v in sorted(p.items())]) for name, p in parts.items()}
    if kind != "flux":
        state["pos_embed"] = torch.zeros(1)
    back = convert(state)
    back.pop("pos_embed.pos_embed", None)
    assert back.keys() == marked.keys()
    for name, value in back.items():
        assert torch.equal(value, marked[name]), name


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match=r"weight transformer_blocks.0.attn.to_x.weight has no"):
        transformer_names(["transformer_blocks.0.attn.to_x.weight"])
