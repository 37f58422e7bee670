"""Active LoRAs: equal to fused ones without a change of weights, and part of a stack's hash."""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

from safegen.cli import main as run
from safegen.core.errors import ConfigError, FileError, PatchError
from safegen.core.generation import GenerationConfig, Sample
from safegen.edits.uce import UCE
from safegen.models.families import denoisers
from safegen.models.loading import load
from safegen.models.selectors import select_parameters
from safegen.patches.active_lora import AdapterWarning, active_loras, lora_forward
from safegen.patches.arithmetic import merge
from safegen.patches.lora import extract_lora, save_lora
from safegen.patches.lora_reader import load_lora, read_lora
from safegen.patches.lora_spec import LoraSpec
from safegen.patches.patch import Patch
from safegen.stack import Stack, add_loras, load_stack
from safegen.stack_loader import StackLoader

SAMPLES, GENERATION_CONFIG = (
    [Sample(prompt="a red cube", seed=1), Sample(prompt="a blue ball", seed=1, index=1)],
    GenerationConfig(num_inference_steps=2),
)


@pytest.fixture(scope="module")
def files(tmp_path_factory, tiny_folder):
    """Return a user's and a safety LoRA of the tiny model, which share weights."""
    folder, model = tmp_path_factory.mktemp("loras"), load(str(tiny_folder))
    own, g = dict(model.denoiser.named_parameters()), torch.Generator().manual_seed(0)
    names = [
        n
        for n in own
        if n.endswith(("attn1.to_q.weight", "attn2.to_v.weight", "conv1.weight", "proj_in.weight"))
    ]
    wild = Patch(
        {n: own[n] + 0.3 * own[n].std() * torch.randn(own[n].shape, generator=g) for n in names}
    )
    for name, patch, keys in (
        ("user", wild, "kohya"),
        ("safe", UCE(erase=("red cube",), lamb=0.01).apply(model), "diffusers"),
    ):
        save_lora(
            extract_lora(patch, model, 8),
            model,
            folder / f"{name}.safetensors",
            keys=keys,
            dtype=torch.float32,
            base=model.hash,
        )
    return folder / "user.safetensors", folder / "safe.safetensors"


@torch.no_grad()
def predict(model, text="a red cube"):
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return denoisers.predict(model.denoiser, x, torch.tensor([500]), model.encode_text([text]))


@pytest.mark.filterwarnings("ignore::safegen.patches.active_lora.AdapterWarning")
@pytest.mark.parametrize("scales", [(1.0, None), (-0.5, None), (1.0, 0.8), (0.3, 2.0)])
def test_active_loras_equal_fused_ones(make_model, files, scales):
    model = make_model()
    plain = predict(model)
    active = [(file, scale) for file, scale in zip(files, scales, strict=True) if scale]
    fused = [load_lora(file, model, scale=scale) for file, scale in active]
    with (merge(fused, overlap="add", model=model) if len(fused) > 1 else fused[0]).apply(model):
        want = predict(model)
    before = {k: v.clone() for k, v in model.denoiser.state_dict().items()}
    read = [(read_lora(file, model), scale) for file, scale in active]
    with active_loras(model, read):
        found = predict(model)
        assert all(
            torch.equal(v, before[k]) for k, v in model.denoiser.state_dict().items()
        )  # also inside the block
    with active_loras(model, read[::-1]):
        assert_close(predict(model), found, rtol=0, atol=1e-5)  # any order
    assert_close(found, want, rtol=0, atol=1e-4)
    assert (found - plain).abs().max() > 1e-3
    assert torch.equal(predict(model), plain)  # nothing is left of them


def test_lora_forward_by_hand():
    """down (1, 2) . (3, 4) = 11; up (5, 6): 55 and 66."""
    line = nn.Linear(2, 2)
    assert lora_forward(
        line, torch.tensor([3.0, 4.0]), torch.tensor([[1.0, 2.0]]), torch.tensor([[5.0], [6.0]])
    ).tolist() == [55.0, 66.0]
    net = nn.Conv2d(1, 1, 3, stride=2, padding=1)
    x, down, up = torch.randn(1, 1, 6, 6), torch.randn(1, 1, 3, 3), torch.randn(1, 1, 1, 1)
    assert_close(lora_forward(net, x, down, up), nn.functional.conv2d(x, down * up, None, 2, 1))


def test_active_loras_act_on_the_patched_weights(make_model, files):
    model = make_model()
    own = dict(model.denoiser.named_parameters())
    patch = Patch({n: own[n] * 1.5 for n in select_parameters(model.denoiser, "kv2")})
    read = read_lora(files[1], model)
    with patch.apply(model):
        fused = load_lora(files[1], model)
        with fused.apply(model):
            want = predict(model)
        with active_loras(model, [(read, 1.0)]):
            assert_close(predict(model), want, rtol=0, atol=1e-4)


def test_gradients_flow_through_active_loras(make_model, files):
    """Guards that optimize latents need it."""
    model = make_model()
    x, t, text = torch.randn(1, 4, 8, 8), torch.tensor([500]), model.encode_text(["a"])
    slopes = []
    read = read_lora(files[0], model)
    for scale in (1.0, 0.0):
        start = x.clone().requires_grad_()
        with active_loras(model, [(read, scale)]):
            denoisers.predict(model.denoiser, start, t, text).sum().backward()
        slopes.append(start.grad)
    assert (slopes[0] - slopes[1]).abs().max() > 1e-3


def test_active_loras_are_removed_on_errors(make_model, files):
    model = make_model()
    plain = predict(model)
    with pytest.raises(ZeroDivisionError), active_loras(model, [(read_lora(files[0], model), 1.0)]):
        _ = 1 / 0
    assert torch.equal(predict(model), plain)


def test_shared_weights_and_text_encoder_tensors_are_warned_about(make_model, files, tmp_path):
    model = make_model()
    user, safe = (read_lora(file, model) for file in files)
    shared = len(user.factors.keys() & safe.factors.keys())
    with pytest.warns(
        AdapterWarning,
        match=f"{shared} weights are changed by more than one LoRA, .*The changes add up",
    ):
        with active_loras(model, [(user, 1.0), (safe, 1.0)]):
            pass
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with active_loras(model, [(user, 1.0)]):
            pass
    more = load_file(files[0]) | {
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.zeros(2, 2)
    }
    save_file(more, tmp_path / "with text.safetensors")
    with pytest.warns(
        AdapterWarning,
        match=r"with text.safetensors also has 1 tensors for the text encoder; they are left out",
    ):
        with active_loras(model, [(read_lora(tmp_path / "with text.safetensors", model), 1.0)]):
            pass


# ------------------------------------------------------------ on stacks


def test_loras_of_a_recipe_and_of_words_can_be_equal(tmp_path):
    (tmp_path / "s.toml").write_text(
        'model = "mini"\nloras = ["a.safetensors", {file = "b.safetensors", scale = 0.8}]\n'
    )
    stack = load_stack(str(tmp_path / "s.toml"))
    assert [(lora.file, lora.scale) for lora in stack.loras] == [
        (tmp_path / "a.safetensors", 1.0),
        (tmp_path / "b.safetensors", 0.8),
    ]
    words = [f"{tmp_path}/a.safetensors", f"{tmp_path}/b.safetensors:0.8"]
    assert add_loras(Stack(name="s", model="mini"), words) == stack
    assert Stack.model_validate_json(stack.model_dump_json()) == stack
    assert not stack.is_base
    odd = add_loras(Stack(name="s", model="mini"), ["C:/lora.safetensors", "a:b.safetensors:-1"])
    assert odd.loras == (
        LoraSpec(file=Path("C:/lora.safetensors")),
        LoraSpec(file=Path("a:b.safetensors"), scale=-1),
    )


def test_the_hash_depends_on_lora_file_scale_and_order(tiny_folder, files):
    loader, name = StackLoader(), str(tiny_folder)
    user, safe = (str(file) for file in files)
    stacks = [
        Stack(name="s", model=name, loras=loras)
        for loras in ((), (user,), (f"{user}:0.5",), (user, safe), (safe, user))
    ]
    assert len({loader.hash(stack) for stack in stacks}) == len(stacks)


@pytest.mark.filterwarnings("ignore::safegen.patches.active_lora.AdapterWarning")
def test_a_stack_generates_with_its_loras_and_restores_the_model(tiny_folder, files):
    loader, name = StackLoader(), str(tiny_folder)
    plain, both = (
        Stack(name="p", model=name),
        Stack(name="s", model=name, loras=tuple(str(file) for file in files)),
    )
    images = []
    for stack in (plain, both, plain):
        with loader.open(stack) as loaded:
            images.append([p.tobytes() for p in loaded.generate_images(SAMPLES, GENERATION_CONFIG)])
    assert images[0] == images[2] != images[1]
    model = loader.model(name)[0]
    assert model.hash_denoiser() == model.hash


def test_generate_records_its_loras_in_the_images(
    tiny_folder, files, tmp_path, monkeypatch, capsys
):
    words = [
        "--lora",
        str(files[0]),
        "--lora",
        f"{files[1]}:0.8",
        "--prompt",
        "a red cube",
        "--steps",
        "2",
    ]
    monkeypatch.setattr(
        "sys.argv",
        ["safegen", "generate", str(tiny_folder), *words, "--out", str(tmp_path / "out")],
    )
    with pytest.raises(SystemExit) as end:
        run()
    assert not end.value.code
    assert "warning: " in (err := capsys.readouterr().err)
    assert "changed by more than one LoRA" in err
    with Image.open(tmp_path / "out" / "0000.png") as image:
        metadata = json.loads(image.text["safegen"])
    digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    assert metadata["loras"] == [
        {"file": f.name, "hash": d, "scale": s}
        for f, d, s in zip(files, digests, (1.0, 0.8), strict=True)
    ]
    assert metadata["patches"] == []


# ------------------------------------------------------------ refusals


def test_patches_and_loras_are_not_confused(tiny_folder, files, make_model, tmp_path):
    with pytest.raises(
        FileError, match=r"must be a safegen patch, got a LoRA\. Use it with `generate --lora`"
    ):
        Patch.load(files[0])
    model = make_model()
    UCE(erase=("red cube",)).apply(model).save(tmp_path / "p.safetensors")
    with pytest.raises(FileError, match=r"must be a LoRA, got a safegen patch"):
        read_lora(tmp_path / "p.safetensors", model)
    bad = load_file(files[0])
    bad[next(k for k in bad if "lora_up" in k)][0] = float("nan")
    save_file(bad, tmp_path / "nan.safetensors")
    with pytest.raises(FileError, match="has NaN or infinite values in lora_unet_"):
        read_lora(tmp_path / "nan.safetensors", model)
    with (
        pytest.raises(PatchError, match="does not fit the model"),
        StackLoader().open(
            Stack(name="s", model=str(tiny_folder), loras=(str(_wider(files[0], tmp_path)),))
        ),
    ):
        pass


def _wider(file, folder):
    tensors = {
        k: torch.cat([v, v], dim=1) if "lora_down" in k else v for k, v in load_file(file).items()
    }
    save_file(tensors, folder / "wide.safetensors")
    return folder / "wide.safetensors"


def test_invalid_lora_words_are_refused(tmp_path, tiny_folder):
    stack = Stack(name="s", model="mini")
    for word, message in (
        ("a.safetensors:0", "scale of a LoRA must not be 0"),
        ("a.safetensors:nan", "finite"),
        ("a:inf", "finite"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            add_loras(stack, [word])
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="a blank stack must have no patches, words, LoRAs"):
        add_loras(Stack(name="s", model="mini", blank=True), ["a"])
    with pytest.raises(FileError, match=r"'no.safetensors' does not exist"):
        StackLoader().hash(Stack(name="s", model=str(tiny_folder), loras=("no.safetensors",)))
    (tmp_path / "s.toml").write_text('model = "mini"\nblank = true\nloras = ["a"]\n')
    with pytest.raises(FileError, match="a blank stack must have no patches, words, LoRAs"):
        load_stack(str(tmp_path / "s.toml"))
