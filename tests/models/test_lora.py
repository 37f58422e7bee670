"""LoRAs: extraction from patches, loss of effect, saving and reading."""

from __future__ import annotations

import json
import re

import pytest
import torch
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_lora_to_diffusers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from safegen.core.errors import ConfigError, FileError, PatchError
from safegen.edits.uce import UCE
from safegen.models.selectors import select_parameters
from safegen.patches.active_lora import active_loras
from safegen.patches.lora import Lora, effect_loss, extract_lora, save_lora
from safegen.patches.lora_reader import load_lora, read_lora
from safegen.patches.patch import BaseMismatchWarning, Patch
from tests.tiny import build_model


@pytest.fixture(scope="module")
def patch(tiny_model):
    """Return an edit of one phrase, which has nearly rank 1."""
    return UCE(erase=("red cube",)).apply(tiny_model)


def image(model):
    call = {
        "prompt": "a red cube",
        "num_inference_steps": 3,
        "guidance_scale": 3.0,
        "output_type": "np",
    }
    return torch.from_numpy(
        model.pipeline(**call, generator=torch.Generator().manual_seed(0)).images
    )


@pytest.mark.parametrize("keys", ["kohya", "diffusers"])
@pytest.mark.parametrize(
    ("dtype", "near"), [(torch.float32, 1e-5), (torch.float16, 1e-3)]
)  # fp16 is the default
def test_a_full_rank_round_trip_restores_the_image(make_model, patch, tmp_path, keys, dtype, near):
    model, out = make_model(), tmp_path / "lora.safetensors"
    lora = extract_lora(patch, model, 32)
    assert (lora.retained_energy, lora.left_out) == (pytest.approx(1), ())
    save_lora(lora, model, out, keys=keys, dtype=dtype, base=model.hash)
    again = load_lora(out, model)
    assert again.tensors.keys() == patch.tensors.keys()
    for name, value in patch.tensors.items():
        assert_close(again.tensors[name], value, rtol=0, atol=near)
    with patch.apply(model):
        want = image(model)
    with again.apply(model):
        assert_close(image(model), want, rtol=0, atol=1e-3)
    assert (image(model) - want).abs().max() > 1e-3  # the patch is undone, and had an effect


def test_a_lora_of_self_attention_alone_has_zeros_that_tell_its_family(make_model, tmp_path):
    """InvokeAI tells SD 1.x from 2.x by the width of a key of attn2."""
    model = make_model()
    names = [n for n in select_parameters(model.denoiser, "attn1") if n.endswith(".weight")]
    own = dict(model.denoiser.named_parameters())
    look = Patch({name: own[name].detach() * 1.1 for name in names})
    lora, kohya = extract_lora(look, model, 4), tmp_path / "kohya.safetensors"
    save_lora(lora, model, kohya)
    stored = load_file(kohya)
    (down,) = (key for key in stored if "attn2_to_k.lora_down" in key)
    up = down.replace("lora_down", "lora_up")
    assert stored[down].shape == (lora.rank, model.denoiser.config.cross_attention_dim)
    assert not stored[down].any()
    assert not stored[up].any()
    assert len([key for key in stored if key.endswith(".alpha")]) == len(names) + 1
    factors = read_lora(kohya, model)
    assert factors.factors.keys() == set(names)  # active LoRAs have no hook for the zeros
    assert load_lora(kohya, model).tensors.keys() == set(names)
    save_lora(lora, model, tmp_path / "diffusers.safetensors", keys="diffusers")
    assert not [key for key in load_file(tmp_path / "diffusers.safetensors") if "attn2" in key]


def test_a_lora_of_cross_attention_needs_no_zeros(make_model, patch, tmp_path):
    model, out = make_model(), tmp_path / "lora.safetensors"
    save_lora(extract_lora(patch, model, 4), model, out)
    alphas = [key for key in load_file(out) if key.endswith(".alpha")]
    assert len(alphas) == len(patch.tensors)


def test_a_lora_of_zeros_alone_is_refused(make_model, patch, tmp_path):
    model, out = make_model(), tmp_path / "lora.safetensors"
    lora = extract_lora(patch, model, 2)
    zeros = {n: (torch.zeros_like(d), torch.zeros_like(u)) for n, (d, u) in lora.factors.items()}
    save_lora(Lora(zeros, 2, lora.energy_by_weight, (), 1.0), model, out)
    with pytest.raises(FileError, match="must not be 0 in every module"):
        read_lora(out, model)


def test_lower_rank_retains_less_energy(tiny_model):
    g = torch.Generator().manual_seed(0)
    own = dict(tiny_model.denoiser.named_parameters())
    wild = Patch(
        {
            n: own[n] + torch.randn(own[n].shape, generator=g)
            for n in select_parameters(tiny_model.denoiser, "kv2")
        }
    )
    energies = [extract_lora(wild, tiny_model, r).retained_energy for r in (1, 4, 16, 32)]
    assert energies == sorted(energies)
    assert 0 < energies[0] < 0.3
    assert energies[-1] == pytest.approx(1)


def test_effect_loss_falls_with_the_rank_and_depends_on_the_prompts(make_model):
    """|e_lora - e_patch| / |e_base - e_patch| is 0 at full rank and 1 for zero factors."""
    model = make_model()
    g = torch.Generator().manual_seed(0)
    own = dict(model.denoiser.named_parameters())
    wild = Patch(
        {
            n: own[n] + 0.1 * torch.randn(own[n].shape, generator=g)
            for n in select_parameters(model.denoiser, "kv2")
        }
    )
    before, image_before = (
        {k: v.clone() for k, v in model.denoiser.state_dict().items()},
        image(model),
    )
    lost = [effect_loss(extract_lora(wild, model, r), wild, model, steps=3) for r in (1, 4, 16, 32)]
    assert lost == sorted(lost, reverse=True)
    assert 0.3 < lost[0] < 1.2
    assert lost[-1] < 1e-3
    lora = extract_lora(wild, model, 4)
    nothing = Lora(
        {n: (0 * d, u) for n, (d, u) in lora.factors.items()}, 4, lora.energy_by_weight, (), 0.0
    )
    assert effect_loss(nothing, wild, model, steps=3) == pytest.approx(1, abs=1e-4)
    losses = [
        effect_loss(lora, wild, model, prompts=p, steps=3)
        for p in (["red cube"], ["a blue ball"], ["red cube", "a blue ball"])
    ]
    assert len(set(losses)) == 3
    assert all(torch.equal(v, before[k]) for k, v in model.denoiser.state_dict().items())
    assert torch.equal(image(model), image_before)
    assert not model.applied_patches


def test_effect_loss_is_none_if_no_prediction_changes(make_model):
    """If to_out is zero, queries have no effect."""
    model = make_model()
    own = dict(model.denoiser.named_parameters())
    name = next(n for n in select_parameters(model.denoiser, "attn1") if n.endswith("to_q.weight"))
    with torch.no_grad():
        own[name.replace("to_q", "to_out.0")].zero_()
    change = Patch({name: own[name] + 1})
    assert effect_loss(extract_lora(change, model, 4), change, model, steps=2) is None


def test_effect_loss_restores_the_model_on_errors(make_model, patch, monkeypatch):
    model = make_model()
    lora, before = extract_lora(patch, model, 2), image(model)
    with pytest.raises(ConfigError, match="needs an fp32 model, got bf16"):
        effect_loss(lora, patch, make_half(make_model()))
    calls = []

    def fail(self, *args, **kwargs):
        calls.append(1)
        raise MemoryError("no room")

    with monkeypatch.context() as broken:
        broken.setattr(type(model.pipeline), "prepare_latents", fail)
        with pytest.raises(MemoryError):
            effect_loss(lora, patch, model)
    assert calls
    assert not model.applied_patches
    assert not model.denoiser._forward_hooks
    assert torch.equal(image(model), before)


def make_half(model):
    model.pipeline.to(torch.bfloat16)
    return model


@pytest.mark.parametrize("family", ["sdxl", "sd35", "flux"])
def test_effect_loss_of_other_families(family):
    model = build_model(family)
    own = dict(model.denoiser.named_parameters())
    names = [n for n in select_parameters(model.denoiser, "kv2") if n.endswith(".weight")]
    wild = Patch({n: own[n] * 3 for n in names})
    whole, part = (effect_loss(extract_lora(wild, model, r), wild, model, steps=2) for r in (32, 2))
    assert whole < 1e-3 < part < 1.2


def test_a_bare_peft_adapter_is_refused(tiny_model, tmp_path):
    name = "base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    save_file(
        {f"{name}.lora_A.weight": torch.ones(2, 32), f"{name}.lora_B.weight": torch.ones(32, 2)},
        tmp_path / "adapter.safetensors",
    )
    with pytest.raises(
        FileError, match=r"must be saved by save_lora_weights, got a bare peft adapter"
    ):
        load_lora(tmp_path / "adapter.safetensors", tiny_model)


def test_biases_count_as_lost_energy(tiny_model):
    """Half of the squared change is in a bias."""
    own = dict(tiny_model.denoiser.named_parameters())
    weight = next(
        n for n in select_parameters(tiny_model.denoiser, "attn1") if n.endswith("to_q.weight")
    )
    bias = next(
        n for n in select_parameters(tiny_model.denoiser, "attn1") if n.endswith("to_out.0.bias")
    )
    one = torch.zeros_like(own[weight])
    one[0, 0] = 2.0
    other = torch.zeros_like(own[bias])
    other[0] = 2.0
    found = extract_lora(Patch({weight: own[weight] + one, bias: own[bias] + other}), tiny_model, 1)
    assert found.left_out == (bias,)
    assert found.retained_energy == pytest.approx(0.5, abs=1e-5)


def test_convolutions_are_extracted(make_model):
    model = make_model()
    own = dict(model.denoiser.named_parameters())
    name = next(n for n in own if n.endswith("conv1.weight"))
    change = torch.randn(own[name].shape, generator=torch.Generator().manual_seed(0))
    lora = extract_lora(Patch({name: own[name] + change}), model, 500)
    down, up = lora.factors[name]
    assert down.shape[1:] == own[name].shape[1:]
    assert up.shape[2:] == (1, 1)
    assert lora.retained_energy == pytest.approx(1)


def test_diffusers_converts_our_kohya_keys(tiny_model, patch, tmp_path):
    """diffusers' conversion restores the module names and alphas."""
    out = tmp_path / "lora.safetensors"
    save_lora(extract_lora(patch, tiny_model, 3), tiny_model, out)
    names, alphas = _convert_non_diffusers_lora_to_diffusers(load_file(out))
    stems = {n.removesuffix(".weight") for n in patch.tensors}
    found = {
        k.removeprefix("unet.")
        .replace(".processor", "")
        .replace("_lora.", ".lora.")
        .partition(".lora.")[0]
        for k in names
    }
    assert found == stems
    assert set(alphas.values()) == {3.0}
    assert len(names) == 2 * len(stems)


def test_scale_multiplies_the_change(tiny_model, patch, tmp_path):
    out = tmp_path / "lora.safetensors"
    save_lora(extract_lora(patch, tiny_model, 32), tiny_model, out, dtype=torch.float32)
    own = dict(tiny_model.denoiser.named_parameters())
    half = load_lora(out, tiny_model, scale=0.5)
    for name, value in patch.tensors.items():
        assert_close(half.tensors[name] - own[name], 0.5 * (value - own[name]), rtol=0, atol=1e-5)


def test_alpha_scales_the_change(tiny_model, patch, tmp_path):
    """Trained files have an alpha below their rank: the change is up @ down * alpha / rank."""
    out = tmp_path / "lora.safetensors"
    save_lora(extract_lora(patch, tiny_model, 4), tiny_model, out, dtype=torch.float32)
    plain = load_lora(out, tiny_model)
    tensors = {k: v / 4 if k.endswith(".alpha") else v for k, v in load_file(out).items()}
    save_file(tensors, tmp_path / "less.safetensors")
    own = dict(tiny_model.denoiser.named_parameters())
    for name, value in load_lora(tmp_path / "less.safetensors", tiny_model).tensors.items():
        assert_close(value - own[name], (plain.tensors[name] - own[name]) / 4, rtol=0, atol=1e-5)


def test_the_header_names_rank_and_energy(tiny_model, patch, tmp_path):
    save_lora(
        extract_lora(patch, tiny_model, 2), tiny_model, tmp_path / "l.safetensors", method="uce"
    )
    with safe_open(tmp_path / "l.safetensors", framework="pt") as file:
        header = file.metadata()
    assert (header["ss_network_dim"], header["ss_network_module"]) == ("2", "networks.lora")
    assert '"method": "uce"' in header["safegen"]


def test_unusable_loras_are_refused(tiny_model, make_model, patch, tmp_path):
    with pytest.raises(ConfigError, match="rank of a LoRA must be >= 1, got 0"):
        extract_lora(patch, tiny_model, 0)
    own = dict(tiny_model.denoiser.named_parameters())
    bias = next(n for n in own if n.endswith("bias"))
    with pytest.raises(ConfigError, match="must change a matrix or a convolution"):
        extract_lora(Patch({bias: own[bias] + 1}), tiny_model, 1)
    out = tmp_path / "lora.safetensors"
    save_lora(extract_lora(patch, tiny_model, 2), tiny_model, out)
    with pytest.raises(PatchError, match="does not fit the model 'wide'"):
        load_lora(out, make_model(name="wide", channels=24))
    tensors = load_file(out)
    some = next(k for k in tensors if k.endswith("lora_up.weight"))
    save_file({k: v for k, v in tensors.items() if k != some}, tmp_path / "torn.safetensors")
    with pytest.raises(FileError, match="is damaged"):
        load_lora(tmp_path / "torn.safetensors", tiny_model)
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(FileError, match="must be a LoRA of a denoiser"):
        load_lora(tmp_path / "other.safetensors", tiny_model)
    save_file(
        {"lora_unet_nothing.lora_down.weight": torch.zeros(1, 2)}, tmp_path / "foreign.safetensors"
    )
    with pytest.raises(PatchError, match="it has no module lora_unet_nothing"):
        load_lora(tmp_path / "foreign.safetensors", tiny_model)
    (tmp_path / "bytes.safetensors").write_bytes(b"x")
    with pytest.raises(FileError, match="not a readable safetensors file"):
        load_lora(tmp_path / "bytes.safetensors", tiny_model)


@pytest.fixture
def lora_file(tiny_model, patch, tmp_path):
    out = tmp_path / "of-the-tiny-one.safetensors"
    save_lora(
        extract_lora(patch, tiny_model, 4),
        tiny_model,
        out,
        dtype=torch.float32,
        base=tiny_model.hash,
    )
    return out


def test_the_base_of_a_loaded_lora_is_the_model(lora_file, tiny_model, make_model):
    """The new values contain the model's weights, not those of the LoRA's base."""
    other = make_model(5)
    with pytest.warns(BaseMismatchWarning, match="the LoRA was made on weights"):
        patch = load_lora(lora_file, other)
    assert patch.metadata.base == other.hash
    patch.apply(other)  # warnings are errors
    with pytest.warns(BaseMismatchWarning, match="the patch was made on weights"):
        patch.check_compatible(tiny_model)


def test_a_lora_of_another_family_is_refused_even_if_shapes_fit(lora_file, make_model):
    other = make_model()
    other.denoiser.register_to_config(attention_head_dim=(4, 4))
    with pytest.raises(PatchError, match="it was made for another family"):
        load_lora(lora_file, other)


@pytest.mark.parametrize(
    "stem",
    [
        "lora_te_text_model_encoder_layers_0_mlp_fc1",
        "text_encoder.text_model.encoder.layers.0.mlp.fc1",
    ],
)
def test_text_encoder_tensors_are_left_out_and_counted(lora_file, tiny_model, tmp_path, stem):
    """Most published LoRAs have them."""
    ends = (".lora_down.weight", ".lora_up.weight", ".alpha")
    both = load_file(lora_file) | {
        stem + end: torch.ones(1, 1) if end != ".alpha" else torch.tensor(1.0) for end in ends
    }
    save_file(both, tmp_path / "both.safetensors")
    patch, plain = (
        load_lora(tmp_path / "both.safetensors", tiny_model),
        load_lora(lora_file, tiny_model),
    )
    assert patch.hash == plain.hash
    assert patch.metadata.left_out == "3 tensors of the text encoder"
    assert "left_out" not in plain.metadata.to_json()


@pytest.mark.parametrize("end", [".dora_scale", ".lora_mid.weight", ".hada_w1_a"])
def test_files_with_more_than_plain_factors_are_refused(lora_file, tiny_model, tmp_path, end):
    tensors = load_file(lora_file)
    stem = next(k for k in tensors if k.endswith(".alpha")).removesuffix(".alpha")
    save_file(tensors | {stem + end: torch.ones(1)}, tmp_path / "more.safetensors")
    with pytest.raises(FileError, match=rf"must be a plain LoRA, got {stem}{end}") as caught:
        load_lora(tmp_path / "more.safetensors", tiny_model)
    assert "\n" not in str(caught.value)


def test_alpha_in_the_header_scales_the_change(tiny_model, patch, tmp_path):
    """diffusers' files have one alpha for all modules in the header."""
    out = tmp_path / "plain.safetensors"
    save_lora(
        extract_lora(patch, tiny_model, 4), tiny_model, out, keys="diffusers", dtype=torch.float32
    )
    plain, own = load_lora(out, tiny_model), dict(tiny_model.denoiser.named_parameters())
    for adapter, words in (
        ({"unet.lora_alpha": 2, "unet.alpha_pattern": {}}, None),
        ({"unet.alpha_pattern": {"x": 1}}, "one alpha for all modules"),
    ):
        save_file(
            load_file(out),
            tmp_path / "theirs.safetensors",
            metadata={"lora_adapter_metadata": json.dumps(adapter)},
        )
        if words:
            with pytest.raises(FileError, match=words):
                load_lora(tmp_path / "theirs.safetensors", tiny_model)
            continue
        for name, value in load_lora(tmp_path / "theirs.safetensors", tiny_model).tensors.items():
            assert_close(
                value - own[name], (plain.tensors[name] - own[name]) / 2, rtol=0, atol=1e-5
            )


def test_an_unreadable_header_is_refused(lora_file, tiny_model, tmp_path):
    save_file(load_file(lora_file), tmp_path / "torn.safetensors", metadata={"safegen": "{"})
    with pytest.raises(FileError, match=r"metadata of .*torn.*' is not JSON") as caught:
        load_lora(tmp_path / "torn.safetensors", tiny_model)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "text", "words"),
    [
        ("safegen", "[]", "metadata of .*torn.*: value must be a valid dictionary"),
        ("safegen", '{"base": 3}', "metadata of .*torn.*: base must be a valid string, got 3"),
        ("safegen", '{"family": 3}', "metadata of .*torn.*: family must be a valid string"),
        ("lora_adapter_metadata", "[]", "lora_adapter_metadata of .*torn.*: value must be"),
        (
            "lora_adapter_metadata",
            '{"unet.lora_alpha": "x"}',
            "lora_adapter_metadata of .*torn.*: unet.lora_alpha must be a valid number, got 'x'",
        ),
    ],
)
def test_an_invalid_header_is_refused(lora_file, tiny_model, tmp_path, key, text, words):
    save_file(load_file(lora_file), tmp_path / "torn.safetensors", metadata={key: text})
    with pytest.raises(FileError, match=words) as caught:
        load_lora(tmp_path / "torn.safetensors", tiny_model)
    assert "\n" not in str(caught.value)


def test_factors_of_rank_0_and_nan_are_refused(lora_file, tiny_model, tmp_path):
    tensors = load_file(lora_file)
    stem = next(k for k in tensors if k.endswith(".alpha")).removesuffix(".alpha")
    down, up = tensors[f"{stem}.lora_down.weight"], tensors[f"{stem}.lora_up.weight"]
    save_file(
        tensors | {f"{stem}.lora_down.weight": down[:0], f"{stem}.lora_up.weight": up[:, :0]},
        tmp_path / "none.safetensors",
    )
    with pytest.raises(FileError, match=f"must have values, got none in {stem}"):
        load_lora(tmp_path / "none.safetensors", tiny_model)
    save_file(tensors | {f"{stem}.alpha": torch.tensor(float("nan"))}, tmp_path / "nan.safetensors")
    with pytest.raises(
        FileError, match=f"{stem}: alpha / rank must be from -1000 to 1000, got nan"
    ):
        load_lora(tmp_path / "nan.safetensors", tiny_model)
    for scale in (float("nan"), float("inf"), 0.0, 1001.0, -1e38):
        words = f"scale of a LoRA must be from -1000 to 1000 and not 0, got {scale:g}"
        with pytest.raises(ConfigError, match=re.escape(words)):
            load_lora(lora_file, tiny_model, scale=scale)


def test_the_rank_is_limited_by_the_weights(tiny_model, patch, tmp_path):
    """In fp16 an alpha of 100,000 would overflow."""
    lora = extract_lora(patch, tiny_model, 100_000)
    assert lora.rank == max(len(down) for down, _ in lora.factors.values()) == 32
    save_lora(lora, tiny_model, tmp_path / "l.safetensors")
    for name, value in load_lora(tmp_path / "l.safetensors", tiny_model).tensors.items():
        assert_close(value, patch.tensors[name], rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (None, ("sd_v1", "False")),
        (("sd2-v", "v_prediction"), ("sd_v2_v", "True")),
        (("sd2-v", "epsilon"), ("sd_v2", "True")),
        (("sdxl", "epsilon"), ("sdxl_base_v1-0", "False")),
    ],
)
def test_the_header_states_the_base_model_version(tiny_model, make_tiny, tmp_path, build, expected):
    """A1111 lists a LoRA without a version for SD 1.x only."""
    model = make_tiny(build[0], prediction_type=build[1]) if build else tiny_model
    name = select_parameters(model.denoiser, "attn1")[0]
    change = Patch({name: model.denoiser.get_parameter(name).detach() + 1})
    save_lora(extract_lora(change, model, 1), model, tmp_path / "l.safetensors")
    with safe_open(tmp_path / "l.safetensors", framework="pt") as file:
        header = file.metadata()
    assert (header["ss_base_model_version"], header["ss_v2"]) == expected


def test_extracting_from_a_patch_with_parents_warns(make_model, patch):
    model = make_model()
    with patch.apply(model):
        above = UCE(erase=("blue ball",)).apply(model)
    with pytest.warns(BaseMismatchWarning, match="was made on a model with the patch"):
        extract_lora(above, model, 4)


@pytest.mark.parametrize("shaped", ["matrix", "convolution"])
def test_factors_of_matrices_may_be_1x1_convolutions(make_model, patch, tmp_path, shaped):
    """kohya's scripts write the projections of SD 2.x as convolutions."""
    model, out, own = make_model(), tmp_path / "lora.safetensors", tmp_path / "own.safetensors"
    save_lora(extract_lora(patch, model, 32), model, own, dtype=torch.float32)
    tensors = {
        k: v[:, :, None, None] if v.ndim == 2 and shaped == "convolution" else v
        for k, v in load_file(own).items()
    }
    save_file(tensors, out, metadata={"format": "pt"})
    want, found = load_lora(own, model), load_lora(out, model)
    assert all(torch.equal(found.tensors[name], value) for name, value in want.tensors.items())
    with active_loras(model, [(read_lora(out, model), 1.0)]):
        active = image(model)
    with want.apply(model):
        assert_close(active, image(model), rtol=0, atol=1e-4)


MISSHAPEN = {
    "two strengths": lambda t, stem: t.update({f"{stem}.alpha": torch.ones(2)}),
    "a number for a factor": lambda t, stem: t.update(
        {f"{stem}.lora_down.weight": torch.tensor(1.0)}
    ),
    "a row for a factor": lambda t, stem: t.update(
        {f"{stem}.lora_up.weight": torch.ones(len(t[f"{stem}.lora_up.weight"]))}
    ),
    "a wide kernel": lambda t, stem: t.update(
        {
            f"{stem}.lora_up.weight": t[f"{stem}.lora_up.weight"][:, :, None, None].expand(
                -1, -1, 3, 3
            )
        }
    ),
}


@pytest.mark.parametrize("how", sorted(MISSHAPEN))
def test_factors_of_another_shape_are_refused(make_model, patch, tmp_path, how):
    model, own, out = make_model(), tmp_path / "own.safetensors", tmp_path / "lora.safetensors"
    save_lora(extract_lora(patch, model, 4), model, own)
    tensors = load_file(own)
    MISSHAPEN[how](
        tensors,
        next(
            k.removesuffix(".lora_down.weight")
            for k in tensors
            if k.endswith("attn2_to_k.lora_down.weight")
        ),
    )
    save_file({k: v.contiguous() for k, v in tensors.items()}, out, metadata={"format": "pt"})
    with pytest.raises(
        PatchError, match=r"does not fit the model .*: the factors of lora_unet_.*attn2_to_k are"
    ) as caught:
        load_lora(out, model)
    assert "\n" not in str(caught.value)
