"""LoRA files of every family in every form: ours, diffusers', and published names."""

from __future__ import annotations

import re

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from lora_families import LORAS_OF_FAMILIES
from real import FLUX_DEV, build_denoiser, published
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from safegen.core.errors import PatchError
from safegen.edits.training.lora import trainable_parameters
from safegen.models.families.denoisers import predict
from safegen.models.selectors import SD3, select_parameters, weights_by_name
from safegen.patches.active_lora import active_loras
from safegen.patches.lora import IgnoredKeysWarning, extract_lora, save_lora
from safegen.patches.lora_keys import LoraModule, file_modules, lora_tensors
from safegen.patches.lora_reader import load_lora, read_lora
from safegen.patches.patch import Patch
from tests.tiny import FAMILIES, build_model

NIGHTLY = ("sd2-v", "sdxl-v", "flux-schnell")
"""Families with the same names as another one."""
CASES = [
    pytest.param(family, keys, marks=[pytest.mark.slow] if family in NIGHTLY else [])
    for family, forms in LORAS_OF_FAMILIES.items()
    for keys in forms
]


def noised(model, names, size=0.1):
    """Return a patch that adds noise to some weights."""
    own, g = dict(model.denoiser.named_parameters()), torch.Generator().manual_seed(0)
    return Patch({n: own[n] + size * torch.randn(own[n].shape, generator=g) for n in names})


def matrices(model):
    return [n for n, p in model.denoiser.named_parameters() if p.ndim in (2, 4)]


def random_factors(denoiser, names, rank):
    """Return random factors for weights, which may be on the meta device."""
    g, own = torch.Generator().manual_seed(0), dict(denoiser.named_parameters())
    return {
        name: (
            torch.randn(rank, *own[name].shape[1:], generator=g),
            torch.randn(own[name].shape[0], rank, generator=g),
        )
        for name in names
    }


def test_the_table_has_every_family():
    assert tuple(LORAS_OF_FAMILIES) == FAMILIES


@pytest.mark.filterwarnings("ignore::safegen.patches.lora.IgnoredKeysWarning")
@pytest.mark.parametrize(("family", "keys"), CASES)
def test_a_lora_restores_every_weight_here_and_in_diffusers(tmp_path, family, keys):
    """Compare every weight; the table names those that diffusers leaves as they are.

    Its conversion has FLUX's real width in it for the first layer of single blocks.
    """
    model, out = build_model(family), tmp_path / "lora.safetensors"
    single = re.compile(r"single_transformer_blocks\.\d+\.(attn\.to_|proj_mlp)")
    names = [n for n in matrices(model) if keys == "diffusers" or not single.match(n)]
    patch, before = noised(model, names), dict(model.denoiser.named_parameters())
    before = {n: p.detach().clone() for n, p in before.items()}
    save_lora(extract_lora(patch, model, 512), model, out, keys=keys, dtype=torch.float32)
    back = load_lora(out, model)
    assert back.tensors.keys() == set(names)
    for name, value in back.tensors.items():
        assert_close(value, patch.tensors[name], rtol=0, atol=1e-6)

    model.pipeline.load_lora_weights(tmp_path, weight_name=out.name)
    model.pipeline.fuse_lora(components=[model.denoiser_name])
    changed = weights_by_name(model.denoiser)
    ignored = {n for n in names if torch.equal(changed[n], before[n])}
    for name in set(names) - ignored:
        assert_close(changed[name], patch.tensors[name], rtol=0, atol=1e-5)
    if not LORAS_OF_FAMILIES[family][keys]:
        assert not ignored
    elif type(model.denoiser).__name__ == SD3:
        assert ignored == set(names)
    else:
        assert ignored == {n for n in names if "blocks." not in n}


@pytest.mark.parametrize(("family", "selector"), [("sd3", "attn1"), ("flux", "context")])
def test_keys_that_diffusers_ignores_are_warned_about(tmp_path, family, selector):
    model = build_model(family)
    names = [n for n in select_parameters(model.denoiser, selector) if n.endswith(".weight")]
    lora = extract_lora(noised(model, names), model, 2)
    with pytest.warns(IgnoredKeysWarning, match=f"ignores {len(names)} of {len(names)} layers"):
        save_lora(lora, model, tmp_path / "kohya.safetensors")
    save_lora(lora, model, tmp_path / "diffusers.safetensors", keys="diffusers")


def test_kohya_keys_of_the_blocks_of_flux_are_not_warned_about(tmp_path):
    model = build_model("flux")
    names = [n for n in select_parameters(model.denoiser, "attn1") if n.endswith(".weight")]
    lora = extract_lora(noised(model, names), model, 2)
    save_lora(lora, model, tmp_path / "lora.safetensors")
    back = load_lora(tmp_path / "lora.safetensors", model)
    assert back.tensors.keys() == set(names)
    with safe_open(tmp_path / "lora.safetensors", framework="pt") as file:
        header = file.metadata()
    assert header["ss_base_model_version"] == "flux1"
    assert header["ss_network_module"] == "networks.lora_flux"


def test_diffusers_splits_the_single_blocks_of_flux_as_we_fused_them():
    with torch.device("meta"):
        flux = FluxTransformer2DModel(**FLUX_DEV | {"num_layers": 1, "num_single_layers": 1})
    names = [n for n in select_parameters(flux, "attn1") if n.endswith(".weight")]
    names += ["single_transformer_blocks.0.proj_out.weight", "norm_out.linear.weight"]
    factors = random_factors(flux, names, 3)
    theirs = FluxPipeline.lora_state_dict(lora_tensors(factors, flux, 4, "kohya"))
    for name, (down, up) in factors.items():
        stem = name.removesuffix(".weight")
        stem = stem if stem == "norm_out.linear" else f"transformer.{stem}"
        assert_close(theirs[f"{stem}.lora_A.weight"][:3], down, rtol=0, atol=0)
        assert_close(theirs[f"{stem}.lora_B.weight"][:, :3], up, rtol=0, atol=0)
        assert not theirs[f"{stem}.lora_A.weight"][3:].any()
    rest = "transformer.single_transformer_blocks.0.proj_mlp"
    assert not theirs.pop(f"{rest}.lora_A.weight").any()
    assert not theirs.pop(f"{rest}.lora_B.weight").any()
    assert len(theirs) == 2 * len(names)


# ------------------------------------------------------------ fused modules

MODULE = LoraModule(("q", "k", "v"))
SHAPES = {name: torch.Size([5, 4]) for name in "qkv"}


def test_fused_factors_are_the_stacked_changes_and_split_exactly():
    g = torch.Generator().manual_seed(0)
    ranks = {"q": 1, "k": 3, "v": 2}
    factors = {
        n: (torch.randn(r, 4, generator=g), torch.randn(5, r, generator=g))
        for n, r in ranks.items()
    }
    down, up = MODULE.fuse(factors, SHAPES, 3)
    assert (down.shape, up.shape) == ((9, 4), (15, 9))
    stacked = torch.cat([u @ d for d, u in factors.values()])
    assert_close(up @ down, stacked, rtol=0, atol=1e-6)
    for name, (part_down, part_up) in MODULE.split(down, up, SHAPES):
        assert torch.equal(part_down, factors[name][0])
        assert torch.equal(part_up, factors[name][1])


def test_dense_fused_factors_are_split_exactly():
    """Trainers write one down for all of q, k and v."""
    g = torch.Generator().manual_seed(0)
    down, up = torch.randn(2, 4, generator=g), torch.randn(15, 2, generator=g)
    parts = dict(MODULE.split(down, up, SHAPES))
    assert_close(torch.cat([u @ d for d, u in parts.values()]), up @ down, rtol=0, atol=1e-6)


def test_a_weight_without_factors_is_left_out_of_a_fused_module(tmp_path):
    model = build_model("sd35")
    names = [n for n in select_parameters(model.denoiser, "kv2") if n.endswith(".weight")]
    out = tmp_path / "lora.safetensors"
    with pytest.warns(IgnoredKeysWarning):
        save_lora(extract_lora(noised(model, names), model, 2), model, out)
    assert read_lora(out, model).factors.keys() == set(names)
    assert "lora_unet_joint_blocks_0_context_block_attn_qkv.alpha" in load_file(out)


def test_fused_factors_of_another_shape_are_refused(tmp_path):
    model = build_model("flux")
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    state = {f"{stem}.lora_down.weight": torch.ones(2, 32)}
    save_file(state | {f"{stem}.lora_up.weight": torch.ones(64, 2)}, tmp_path / "lora.safetensors")
    with pytest.raises(PatchError, match=r"the weight is \(96, 32\) in the model"):
        load_lora(tmp_path / "lora.safetensors", model)


def test_a_lora_of_sd_3_is_refused_on_sd_35(tmp_path):
    """Compare families, as the matrices have equal shapes."""
    sd3, out = build_model("sd3"), tmp_path / "lora.safetensors"
    names = [n for n in select_parameters(sd3.denoiser, "joint") if n.endswith(".weight")]
    save_lora(extract_lora(noised(sd3, names), sd3, 2), sd3, out, keys="diffusers")
    with pytest.raises(PatchError, match=r"another family .*dual 0\), this one is .*dual 2"):
        load_lora(out, build_model("sd35"))


# ------------------------------------------------------------ published names

FLUX_DOUBLE = {
    "attn_proj": (3072, 3072),
    "attn_qkv": (3072, 9216),
    "mlp_0": (3072, 12288),
    "mlp_2": (12288, 3072),
    "mod_lin": (3072, 18432),
}
FLUX_SINGLE = {"linear1": (3072, 21504), "linear2": (15360, 3072), "modulation_lin": (3072, 9216)}
"""Module, inputs and outputs, in the list of kohya-ss/sd-scripts, networks/convert_flux_lora.py."""


def published_kohya(name):
    """Return inputs and outputs of each module of a LoRA of the blocks in kohya's form.

    sd-scripts joins `lora_unet` and the module's name by underscores (networks/lora_sd3.py).
    """
    if name == "flux":
        return {
            f"lora_unet_double_blocks_{i}_{side}_{module}": shape
            for i in range(19)
            for side in ("img", "txt")
            for module, shape in FLUX_DOUBLE.items()
        } | {
            f"lora_unet_single_blocks_{i}_{module}": shape
            for i in range(38)
            for module, shape in FLUX_SINGLE.items()
        }
    return {
        "lora_unet_" + key.removesuffix(".weight").replace(".", "_"): shape[::-1]
        for key, shape in published("sd3", "model.diffusion_model.").items()
        if key.startswith("joint_blocks.") and len(shape) == 2
    }


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_kohya_modules_of_the_blocks_have_the_published_names_and_shapes(name):
    denoiser = build_denoiser({"flux": "flux-dev", "sd3": "sd3-medium"}[name])
    own = {n: p.shape for n, p in denoiser.named_parameters()}
    ours = {
        stem: module.shape(own)[::-1]
        for stem, module in file_modules(denoiser, "kohya").items()
        if "blocks" in stem and len(module.shape(own)) == 2
    }
    assert ours == published_kohya(name)


def test_the_last_norms_of_sd_3_have_their_halves_swapped_in_kohya_modules():
    modules = file_modules(build_denoiser("sd3-medium"), "kohya")
    assert {name for name, module in modules.items() if module.is_swapped} == {
        "lora_unet_final_layer_adaLN_modulation_1",
        "lora_unet_joint_blocks_23_context_block_adaLN_modulation_1",
    }


def test_sd_35_has_a_kohya_module_for_its_attention_of_the_image_alone():
    modules = file_modules(build_denoiser("sd35-medium"), "kohya")
    stem = "transformer_blocks.12.attn2"
    assert modules["lora_unet_joint_blocks_12_x_block_attn2_qkv"].weights == tuple(
        f"{stem}.to_{part}.weight" for part in "qkv"
    )
    assert modules["lora_unet_joint_blocks_12_x_block_attn2_proj"].weights == (
        f"{stem}.to_out.0.weight",
    )


@pytest.mark.parametrize(
    ("family", "stem"),
    [
        ("flux", "diffusion_model.double_blocks.0.img_attn.proj"),
        ("flux", "lora_transformer_transformer_blocks_0_attn_to_out_0"),
        ("sd35", "diffusion_model.joint_blocks.0.x_block.attn.proj"),
        ("sd35", "lora_transformer_transformer_blocks_0_attn_to_out_0"),
    ],
)
def test_names_of_comfyui_and_onetrainer_are_read(tmp_path, family, stem):
    model = build_model(family)
    down, up = torch.full((1, 32), 0.5), torch.ones(32, 1)
    save_file(
        {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up},
        tmp_path / "lora.safetensors",
    )
    name = "transformer_blocks.0.attn.to_out.0.weight"
    (read,) = read_lora(tmp_path / "lora.safetensors", model).factors.items()
    assert read[0] == name
    assert torch.equal(read[1][0], down)


@pytest.mark.parametrize("family", ["sdxl", "sd35", "flux"])
def test_adapters_of_peft_saved_by_diffusers_are_read(tmp_path, family):
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    model = build_model(family)
    part, net = model.denoiser_name, model.denoiser
    targets = ["to_q", "to_k", "to_v", "to_out.0"] + (["add_k_proj"] if part != "unet" else [])
    net.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=targets))
    g = torch.Generator().manual_seed(0)
    for name, weight in net.named_parameters():
        if "lora_B" in name:
            weight.data = 0.1 * torch.randn(weight.shape, generator=g)
    config = {k: v for k, v in net.peft_config["default"].to_dict().items() if v is not None}
    config = {k: list(v) if isinstance(v, set) else v for k, v in config.items()}
    model.pipeline.save_lora_weights(
        tmp_path,
        **{
            f"{part}_lora_layers": get_peft_model_state_dict(net),
            f"{part}_lora_adapter_metadata": config,
        },
    )
    net.fuse_lora()
    fused = {n: w.detach().clone() for n, w in weights_by_name(net).items()}
    fresh = build_model(family)
    patch = load_lora(tmp_path / "pytorch_lora_weights.safetensors", fresh)
    assert len(patch.tensors) == sum("lora_A" in n for n, _ in net.named_parameters())
    for name, value in patch.tensors.items():
        assert_close(value, fused[name], rtol=0, atol=1e-6)


# ------------------------------------------------------------ in use


@pytest.mark.parametrize("family", ["sdxl", "sd35", "flux"])
def test_an_active_lora_and_a_trained_one_predict_as_the_merged_weights(tmp_path, family):
    model = build_model(family)
    text = model.encode_text(["a red cube"])
    x = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    t = model.noise_schedule.timesteps[500:501]
    names = [n for n in select_parameters(model.denoiser, "attn1") if n.endswith(".weight")]
    patch, out = noised(model, names), tmp_path / "lora.safetensors"
    save_lora(extract_lora(patch, model, 64), model, out, keys="diffusers", dtype=torch.float32)
    before = predict(model.denoiser, x, t, text)
    with patch.apply(model):
        patched = predict(model.denoiser, x, t, text)
    with active_loras(model, [(read_lora(out, model), 1.0)]):
        assert_close(predict(model.denoiser, x, t, text), patched, rtol=0, atol=1e-4)
    assert (patched - before).abs().max() > 1e-3

    with trainable_parameters(model, "attn1", rank=2, alpha=None, seed=0) as trainable:
        own = dict(model.denoiser.named_parameters())
        factors = {n: own[n].detach() for n in trainable.names}
        for name, value in factors.items():
            if name.endswith(".up"):
                value.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
        trained = predict(model.denoiser, x, t, text).detach()
        merged = trainable.merge(factors)
    assert merged.keys() == set(names)
    assert any(".to_out.0." in name for name in merged)
    with Patch(merged).apply(model):
        assert_close(predict(model.denoiser, x, t, text), trained, rtol=0, atol=1e-4)
    assert (trained - before).abs().max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd35", "flux"])
def test_commands_convert_a_patch_to_a_lora_and_back(tmp_path, family):
    from typer.testing import CliRunner

    from safegen.cli import app

    model = build_model(family)
    model.pipeline.save_pretrained(tmp_path / "model", safe_serialization=True)
    names = [n for n in select_parameters(model.denoiser, "attn1") if n.endswith(".weight")]
    patch = noised(model, names)
    patch.save(tmp_path / "patch.safetensors")
    files = {name: str(tmp_path / name) for name in ("patch", "lora", "back")}
    base, (before, lora, back) = (
        str(tmp_path / "model"),
        (f"{f}.safetensors" for f in files.values()),
    )
    run = CliRunner().invoke
    out = ["--out", lora, "--keys", "diffusers", "--rank", "64", "--no-card"]
    result = run(app, ["patch", "extract-lora", base, before, *out])
    assert result.exit_code == 0, result.output
    assert "keep 100.0 % (energy)" in result.output
    result = run(app, ["patch", "from-lora", base, lora, "--out", back, "--no-card"])
    assert result.exit_code == 0, result.output
    for name, value in Patch.load(back).tensors.items():
        assert_close(value, patch.tensors[name], rtol=0, atol=1e-3)
