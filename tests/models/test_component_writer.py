"""Components in folders: the bytes of `save_pretrained`, shards, and another type of weights."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import tests.tiny
from safegen.core.errors import ConfigError
from safegen.core.hashing import hash_tensors
from safegen.core.tensor_files import read_metadata
from safegen.models.checkpoint.component_writer import save_component
from safegen.models.checkpoint.diffusers_folder import save_folder
from safegen.models.checkpoint.single_file_writer import save_single_file
from safegen.models.checkpoint.weight_files import stored_dtype
from safegen.models.loading import load
from safegen.patches.patch import Patch
from safegen.workflows.export import export


@pytest.mark.parametrize("family", ["sd1", "sdxl", "sd35", "flux"])
def test_a_component_is_written_as_its_library_does(family, tmp_path):
    model = tests.tiny.build_model(family)
    for name in model.components:
        part = getattr(model.pipeline, name)
        save_component(part, tmp_path / name)
        state = part.state_dict()
        if hasattr(part, "embeddings"):  # files have the names of earlier releases
            state = {f"text_model.{key}": value for key, value in state.items()}
            part.save_pretrained(tmp_path / "theirs", state_dict=state)
        else:
            part.save_pretrained(tmp_path / "theirs")
        theirs = sorted((tmp_path / "theirs").iterdir())
        assert [path.name for path in theirs] == sorted(p.name for p in (tmp_path / name).iterdir())
        for path in theirs:
            assert path.read_bytes() == (tmp_path / name / path.name).read_bytes(), path.name
        shutil.rmtree(tmp_path / "theirs")


def test_shards_are_opened_by_the_libraries(tmp_path):
    pipe = tests.tiny.build_pipeline("sd35")
    for name in ("transformer", "text_encoder_3"):
        part = getattr(pipe, name)
        save_component(part, tmp_path / name, max_shard_size=60_000)
        shards = sorted(path.name for path in (tmp_path / name).glob("*-of-*.safetensors"))
        assert len(shards) > 1
        found = type(part).from_pretrained(tmp_path / name)
        assert hash_tensors(found.state_dict()) == hash_tensors(part.state_dict())
        index = json.loads(next((tmp_path / name).glob("*.index.json")).read_text())
        assert set(index["weight_map"].values()) == set(shards)


def test_a_folder_of_another_type_has_the_rounded_weights(tiny_model, tmp_path):
    save_folder(tiny_model, tmp_path / "half", dtype="fp16")
    assert stored_dtype(tmp_path / "half") == "fp16"
    config = json.loads((tmp_path / "half" / "text_encoder" / "config.json").read_text())
    assert config["dtype"] == "float16"
    found = load(tmp_path / "half")
    for name in tiny_model.components:
        old, new = (getattr(m.pipeline, name).state_dict() for m in (tiny_model, found))
        assert all(torch.equal(new[key], old[key].half().float()) for key in new)
    assert tiny_model.dtype == "fp32"


def test_a_type_that_overflows_leaves_no_folder(make_model, tmp_path):
    big = make_model()
    with torch.no_grad():
        big.vae.encoder.conv_in.bias.fill_(1e6)
    with pytest.raises(ConfigError, match=r"fp16, which overflows in vae\.encoder\.conv_in\.bias"):
        save_folder(big, tmp_path / "x", dtype="fp16")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def half(tiny_model, tmp_path):
    """Return a folder and a file with the weights of the tiny model in fp16."""
    save_folder(tiny_model, tmp_path / "half", dtype="fp16")
    save_single_file(tiny_model, tmp_path / "half.safetensors", dtype="fp16")
    return tmp_path / "half", tmp_path / "half.safetensors"


def test_auto_is_the_type_of_all_files(half, tiny_model, tmp_path):
    for path in half:
        model = load(path, dtype="auto")
        assert (model.dtype, model.stored_dtype) == ("fp16", "fp16")
        assert model.hash == load(path).hash
    shutil.rmtree(half[0] / "vae")
    save_component(tiny_model.vae, half[0] / "vae")  # fp32
    mixed = load(half[0], dtype="auto")
    assert (mixed.dtype, mixed.stored_dtype) == ("fp32", None)
    assert stored_dtype(tmp_path / "absent") is None


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_patch_on_half_weights_is_exported_as_on_whole_ones(kind, half, tmp_path):
    """Apply it in fp16, and in fp32 with one rounding at the end: the files are equal."""
    source = half[kind == "file"]
    whole, small = load(source), load(source, dtype="auto")
    weight = whole.denoiser.conv_in.weight
    patch = Patch({"conv_in.weight": weight + torch.randn(weight.shape) / 3})
    for name, model in (("whole", whole), ("small", small)):
        out = tmp_path / name / "m.safetensors"
        export(model, out, patches=[patch], card=False)
        export(model, tmp_path / name / "m", format="diffusers", patches=[patch], card=False)
    files = {p.relative_to(tmp_path / "whole") for p in (tmp_path / "whole").rglob("*.*")}
    assert len(files) > 10
    for file in files:
        if (tmp_path / "whole" / file).is_file():
            one, two = ((tmp_path / name / file).read_bytes() for name in ("whole", "small"))
            assert one == two, file
    written = load_file(tmp_path / "whole/m/unet/diffusion_pytorch_model.safetensors")
    assert torch.equal(written["conv_in.weight"], patch.tensors["conv_in.weight"].half())
    assert load(tmp_path / "whole" / "m").verified_metadata is not None


def test_a_folder_has_the_type_that_is_asked_for_or_that_of_its_base(half, tmp_path):
    model = load(half[0])
    for dtype, want in ((None, "fp16"), ("bf16", "bf16"), ("fp32", "fp32")):
        out = tmp_path / f"{want}-{dtype}"
        export(model, out, format="diffusers", dtype=dtype)
        assert stored_dtype(out) == want
        card = (out / "README.md").read_text()
        assert (f"Weights are {want}." in card) == (want != "fp32")


def test_an_export_hashes_the_denoiser_once_and_its_patched_weights_once(half, monkeypatch):
    from safegen.core import hashing
    from safegen.models import patched_weights

    taken = []

    def spy(tensors, **options):
        taken.append("conv_in.weight" in tensors)
        return hash_tensors(tensors, **options)

    for module in (hashing, patched_weights):
        monkeypatch.setattr(module, "hash_tensors", spy)
    model = load(half[0], dtype="auto")
    export(model, half[0].with_name("plain.safetensors"))
    export(model, half[0].with_name("plain"), format="diffusers")
    assert sum(taken) == 1
    patch = Patch({"conv_in.weight": model.denoiser.conv_in.weight.float() * 2})
    export(model, half[0].with_name("patched.safetensors"), patches=[patch])
    assert sum(taken) == 1 + 1
    for _ in range(3):
        assert model.pipeline_hash
    assert len(taken) - sum(taken) == len(model.components) - 1
    header = read_metadata(half[0].with_name("patched.safetensors"))
    assert patch.hash in header["safegen"]
