"""One-file checkpoints of SD 1.x: round trip, diffusers' reader, and errors."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from safegen.core.errors import ConfigError, FileError
from safegen.models.checkpoint import key_map as layout
from safegen.models.checkpoint.metadata import CheckpointMetadata
from safegen.models.checkpoint.single_file import CONFIGS_KEY
from safegen.models.checkpoint.single_file_writer import save_single_file
from safegen.models.loading import load

PREFIX = layout.PREFIX["sd1"]
CALL = {
    "prompt": "a red cube",
    "num_inference_steps": 3,
    "guidance_scale": 3.0,
    "output_type": "np",
}


@pytest.fixture(scope="module")
def file(tiny_model, tmp_path_factory):
    out = tmp_path_factory.mktemp("single") / "tiny.safetensors"
    save_single_file(
        tiny_model, out, dtype="fp32", metadata=CheckpointMetadata(base=tiny_model.hash)
    )
    return out


def image(pipeline):
    return torch.from_numpy(pipeline(**CALL, generator=torch.Generator().manual_seed(0)).images)


def weights(model):
    return [part.state_dict() for part in (model.denoiser, model.vae, model.pipeline.text_encoder)]


def test_the_round_trip_restores_weights_and_image(file, tiny_model):
    again = load(str(file))
    for a, b in zip(weights(again), weights(tiny_model), strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(value, b[name]) for name, value in a.items())
    assert again.hash == tiny_model.hash
    assert torch.equal(image(again.pipeline), image(tiny_model.pipeline))
    assert type(again.pipeline.scheduler) is type(tiny_model.pipeline.scheduler)
    assert not any(p.requires_grad for p in again.denoiser.parameters())


def test_diffusers_loads_the_file_and_generates_the_same_image(file, tiny_model, tiny_folder):
    """diffusers reads the file by its keys alone, as A1111, ComfyUI and InvokeAI do."""
    other = StableDiffusionPipeline.from_single_file(
        str(file),
        config=str(tiny_folder),
        local_files_only=True,
        safety_checker=None,
        requires_safety_checker=False,
    )
    other.set_progress_bar_config(disable=True)
    assert_close(image(other), image(tiny_model.pipeline), rtol=0, atol=1e-3)


def test_fp16_changes_the_image_slightly(tiny_model, tmp_path):
    out = tmp_path / "half.safetensors"
    save_single_file(tiny_model, out)
    assert {v.dtype for v in load_file(out).values()} == {torch.float16}
    assert_close(image(load(str(out)).pipeline), image(tiny_model.pipeline), rtol=0, atol=2e-2)


def test_a_patched_model_is_saved_with_its_patch(make_model, tmp_path):
    from safegen.edits.uce import UCE

    model = make_model()
    with UCE(erase=("red cube",)).apply(model).apply(model):
        save_single_file(model, tmp_path / "edited.safetensors", dtype="fp32")
        edited = image(model.pipeline)
    again = load(str(tmp_path / "edited.safetensors"))
    assert torch.equal(image(again.pipeline), edited)
    assert (edited - image(model.pipeline)).abs().max() > 1e-3


def test_the_header_states_the_provenance(file, tiny_model):
    with safe_open(file, framework="pt") as opener:
        header = opener.metadata()
    assert json.loads(header["safegen"]) == {"base": tiny_model.hash, "weights": tiny_model.hash}
    assert header["format"] == "pt"
    assert {"model_index.json", "unet/config.json", "tokenizer/vocab.json"} <= json.loads(
        header[CONFIGS_KEY]
    ).keys()


def test_a_file_without_configurations_uses_a_folder(file, tiny_model, tiny_folder, tmp_path):
    """Files of other tools have no configurations, and old ones have an extra buffer."""
    bare = tmp_path / "bare.safetensors"
    extra = {
        PREFIX["text_encoder"] + "embeddings.position_ids": torch.arange(4),
        "betas": torch.zeros(3),
        "model_ema.decay": torch.ones(1),
    }
    save_file(load_file(file) | extra, bare)
    with pytest.raises(
        FileError, match=r"lacks .* configuration is that .* SD 1\.x\. Name .* \(--config, or"
    ):
        load(str(bare))
    assert torch.equal(
        image(load(str(bare), config=tiny_folder).pipeline), image(tiny_model.pipeline)
    )


def test_a_pickle_is_opened_only_if_allowed(file, tiny_model, tiny_folder, tmp_path):
    path = tmp_path / "old.ckpt"
    torch.save({"state_dict": load_file(file), "global_step": 7}, path)
    with pytest.raises(FileError, match="--allow-pickle"):
        load(str(path), config=tiny_folder)
    again = load(str(path), config=tiny_folder, allow_pickle=True)
    assert again.hash == tiny_model.hash


class Harm:
    def __reduce__(self):
        return (print, ("harm",))


def test_a_pickle_with_code_is_refused(tiny_folder, tmp_path, capsys):
    path = tmp_path / "bad.ckpt"
    torch.save({"state_dict": Harm()}, path)
    with pytest.raises(FileError, match="cannot be read as a one-file checkpoint"):
        load(str(path), config=tiny_folder, allow_pickle=True)
    assert capsys.readouterr().out == ""


def drop(tensors, _):
    tensors.pop(PREFIX["unet"] + "out.2.bias")


def widen(tensors, _):
    tensors[PREFIX["unet"] + "out.2.bias"] = torch.zeros(9)


def add(tensors, _):
    tensors[PREFIX["vae"] + "encoder.down.9.block.0.conv1.weight"] = torch.zeros(1)


def spoil(tensors, _):
    tensors[PREFIX["unet"] + "out.2.bias"][0] = float("nan")


def climb(_, header):
    header[CONFIGS_KEY] = json.dumps({"../../out.txt": "x"})


def break_header(_, header):
    header[CONFIGS_KEY] = "{"


def other_family(_, header):
    files = json.loads(header[CONFIGS_KEY])
    header[CONFIGS_KEY] = json.dumps(
        files | {"model_index.json": json.dumps({"_class_name": "WanPipeline"})}
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop, r"lacks model.diffusion_model.out.2.bias, which its .* needs. The file was changed"),
        (widen, r"out.2.bias in .* must be \(4,\) for conv_out.bias, got \(9,\)"),
        (add, r"has 1 weights .* first .*encoder.down.9.block.0.conv1.weight"),
        (spoil, "NaN or infinite weights in unet"),
        (climb, "must match pattern"),
        (break_header, "safegen_configs of .* is not JSON"),
        (other_family, "_class_name must be .* got 'WanPipeline'"),
    ],
)
def test_an_unusable_file_is_refused_in_one_line(file, tmp_path, change, words):
    with safe_open(file, framework="pt") as opener:
        header = dict(opener.metadata())
    tensors = load_file(file)
    change(tensors, header)
    save_file(tensors, tmp_path / "x.safetensors", metadata=header)
    with pytest.raises(FileError, match=words) as caught:
        load(str(tmp_path / "x.safetensors"))
    assert "\n" not in str(caught.value)


def test_invalid_arguments_are_refused(make_model, tiny_folder, tmp_path, file):
    with pytest.raises(ConfigError, match="config must go with a one-file checkpoint, got 'mini'"):
        load("mini", config=tiny_folder)
    with pytest.raises(ConfigError, match="dtype must be one of fp32, bf16, fp16"):
        save_single_file(make_model(), tmp_path / "x.safetensors", dtype="int8")
    big = make_model()
    with torch.no_grad():
        big.denoiser.conv_out.bias.fill_(1e6)
    with pytest.raises(ConfigError, match=r"got fp16, which overflows in unet.conv_out.bias"):
        save_single_file(big, tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()
    with pytest.raises(FileError, match="must be a diffusers folder"):
        load(file, config=tmp_path)


def test_a_folder_with_a_damaged_index_is_refused_in_one_line(file, tmp_path):
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(FileError, match=r"model_index.json' is not JSON") as caught:
        load(file, config=tmp_path)
    assert "\n" not in str(caught.value)
