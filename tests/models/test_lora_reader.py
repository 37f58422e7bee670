"""Keys and shapes of LoRA files for models of real size, against the published lists in `keys/`."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.utils.state_dict_utils import (
    convert_state_dict_to_diffusers,
    convert_unet_state_dict_to_peft,
)
from real import lines, published
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from safegen.core.errors import FileError
from safegen.models.checkpoint.key_map import kohya_name, unet_names
from safegen.models.model import Model
from safegen.models.selectors import select_parameters
from safegen.patches.lora import Lora, extract_lora, save_lora
from safegen.patches.lora_reader import load_lora
from safegen.patches.patch import Patch

SELECTED = {"attn1": (".attn1.", "_attn1_"), "attention": (".attn", "_attn")}
"""Selector: a part of its modules' names in diffusers' and kohya's form."""


@pytest.fixture(scope="module")
def written(real, tmp_path_factory):
    """Return a function that saves a LoRA of real size and returns its shapes, -1 for the rank."""
    build, unet = real
    model = Model(build, SimpleNamespace(unet=unet, scheduler=DDIMScheduler()))
    own, folder = dict(unet.named_parameters()), tmp_path_factory.mktemp("lora")

    def write(selector, keys):
        names = [n for n in select_parameters(unet, selector) if own[n].ndim in (2, 4)]
        factors = {
            n: (
                torch.zeros(1, *own[n].shape[1:]),
                torch.zeros(len(own[n]), 1, *(1,) * (own[n].ndim - 2)),
            )
            for n in names
        }
        out = folder / f"{selector}-{keys}.safetensors"
        if not out.exists():
            save_lora(Lora(factors, 1, dict.fromkeys(names, 1.0), (), 1.0), model, out, keys=keys)
        with safe_open(out, framework="pt") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        return {key: ranked(key, shape) for key, shape in shapes.items()}

    return write


def ranked(key, shape):
    if key.endswith((".lora_down.weight", ".lora_A.weight")):
        return (-1, *shape[1:])
    return (shape[0], -1, *shape[2:]) if shape else ()


@pytest.mark.parametrize("selector", SELECTED)
@pytest.mark.parametrize("keys", ["kohya", "diffusers"])
def test_a_lora_of_a_selector_has_the_published_keys_and_shapes(real, written, keys, selector):
    listed = published(f"lora-{keys}-{real[0]}")
    wanted = {
        key: shape
        for key, shape in listed.items()
        if any(mark in key for mark in SELECTED[selector])
    }
    modules = {"sd1": 64, "sd2": 64, "sdxl": 280}[real[0]] * (
        1 if selector == "attn1" else 2
    )  # four matrices a block
    assert len(wanted) == modules * (3 if keys == "kohya" else 2)
    if (selector, keys) == ("attn1", "kohya") and real[0] != "sdxl":  # zeros that tell the family
        first = min(key for key in listed if "attn2_to_k" in key).partition(".")[0]
        wanted |= {key: shape for key, shape in listed.items() if key.startswith(first)}
    assert written(selector, keys) == wanted


def test_a_lora_of_everything_has_every_published_key(real, written):
    """Edits change modules that kohya's trainer does not; no published list has them."""
    build, _ = real
    ours, listed = written("all", "kohya"), published(f"lora-kohya-{build}")
    assert {key: ours[key] for key in listed} == listed
    more = {key.partition(".")[0].removeprefix("lora_unet_") for key in ours.keys() - listed.keys()}
    if build == "sdxl":
        assert more == {
            "input_blocks_0_0",
            "out_2",
            *(f"{name}_{i}" for name in ("time_embed", "label_emb_0") for i in (0, 2)),
        }
    else:
        assert {name for name in more if "resnets" not in name and "samplers" not in name} == {
            "conv_in",
            "conv_out",
            "time_embedding_linear_1",
            "time_embedding_linear_2",
        }


def test_the_published_lists_have_the_length_of_an_independent_list():
    """Lengths of arenasys' component files LoRA-v1A-UNET.txt and LoRA-XL-UNET.txt."""
    for build, characters in (("sd1", 48_869), ("sdxl", 184_846)):
        assert len("\n".join(lines(published(f"lora-kohya-{build}")))) == characters


@pytest.mark.parametrize("keys", ["kohya", "diffusers"])
def test_a_file_of_unequal_ranks_has_one_rank_and_the_same_change(tiny_model, tmp_path, keys):
    """diffusers reads a kohya file with its most common alpha, or with the first rank."""
    own = dict(tiny_model.denoiser.named_parameters())
    names = [n for n in select_parameters(tiny_model.denoiser, "kv2") if n.endswith("to_k.weight")]
    patch = Patch(
        {
            n: own[n] + torch.randn(own[n].shape, generator=torch.Generator().manual_seed(0))
            for n in names
        }
    )
    lora = extract_lora(patch, tiny_model, 24)
    assert len({len(down) for down, _ in lora.factors.values()}) > 1
    save_lora(lora, tiny_model, tmp_path / "l.safetensors", keys=keys, dtype=torch.float32)
    state = load_file(tmp_path / "l.safetensors")
    assert {float(v) for k, v in state.items() if k.endswith(".alpha")} == (
        {24.0} if keys == "kohya" else set()
    )
    for name in names:
        stem, ends = kohya_name(name), ("lora_down", "lora_up")
        if keys == "diffusers":
            stem, ends = "unet." + name.removesuffix(".weight"), ("lora_A", "lora_B")
        down, up = (state[f"{stem}.{end}.weight"] for end in ends)
        assert (len(down), up.shape[1]) == (24, 24)
        assert_close(up @ down, lora.factors[name][1] @ lora.factors[name][0], rtol=0, atol=1e-5)


# ------------------------------------------------------------ forms that others write


@pytest.fixture(scope="module")
def ours(tiny_model, tmp_path_factory):
    """Return a LoRA of every attention matrix of the tiny model in diffusers' keys."""
    g, own = torch.Generator().manual_seed(0), dict(tiny_model.denoiser.named_parameters())
    names = [
        n for n in select_parameters(tiny_model.denoiser, "attention") if n.endswith(".weight")
    ]
    patch = Patch({n: own[n] + torch.randn(own[n].shape, generator=g) for n in names})
    out = tmp_path_factory.mktemp("forms") / "ours.safetensors"
    save_lora(
        extract_lora(patch, tiny_model, 2), tiny_model, out, keys="diffusers", dtype=torch.float32
    )
    return out


def processors(key):
    """Return a key in the form of 2023, when attention processors held the factors."""
    key = key.replace(".to_out.0.", ".to_out.")
    for kind in ("q", "k", "v", "out"):
        key = key.replace(f".to_{kind}.lora_A.", f".processor.to_{kind}_lora.down.")
        key = key.replace(f".to_{kind}.lora_B.", f".processor.to_{kind}_lora.up.")
    return key


@pytest.mark.parametrize("form", ["scripts", "processors"])
def test_older_diffusers_files_are_read_too(ours, tiny_model, tmp_path, form):
    """Files of diffusers' training scripts, old and new, are read as diffusers reads them."""
    state = load_file(ours)
    old = (
        convert_state_dict_to_diffusers(state)
        if form == "scripts"
        else {processors(key): value for key, value in state.items()}
    )
    assert not old.keys() & state.keys()
    assert (
        convert_unet_state_dict_to_peft(dict(old)).keys() == state.keys()
    )  # diffusers' own reading
    save_file(old, tmp_path / "old.safetensors")
    assert (
        load_lora(tmp_path / "old.safetensors", tiny_model).hash == load_lora(ours, tiny_model).hash
    )
    gone = next(key for key in old if key.endswith(".up.weight"))
    save_file(
        {key: value for key, value in old.items() if key != gone}, tmp_path / "torn.safetensors"
    )
    with pytest.raises(FileError, match=r"is damaged: it has .*down\.weight without .*up\.weight"):
        load_lora(tmp_path / "torn.safetensors", tiny_model)


def test_a_lora_of_an_sdxl_may_have_either_names(make_tiny, tmp_path):
    """kohya's trainer writes original names, other tools diffusers' names with the same prefix."""
    model = make_tiny("sdxl")
    own = dict(model.denoiser.named_parameters())
    names = [n for n in select_parameters(model.denoiser, "attn1") if n.endswith(".weight")]
    lora = extract_lora(Patch({n: own[n] * 2 for n in names}), model, 2)
    save_lora(lora, model, tmp_path / "kohya.safetensors", dtype=torch.float32)
    to = unet_names(own)
    renamed = {kohya_name(n, to[n]): kohya_name(n) for n in names}
    theirs = load_file(tmp_path / "kohya.safetensors")
    split = {key: key.partition(".") for key in theirs}
    state = {
        f"{renamed[stem]}.{end}": value
        for (stem, _, end), value in zip(split.values(), theirs.values(), strict=True)
    }
    save_file(state, tmp_path / "other.safetensors")
    assert not state.keys() & split.keys()
    one, two = (load_lora(tmp_path / f"{name}.safetensors", model) for name in ("kohya", "other"))
    assert one.hash == two.hash
