"""One-file checkpoints of SD 2.x and SDXL: round trip, diffusers' reader, and errors."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from safegen.core.errors import ConfigError, FileError
from safegen.core.generation import GenerationConfig, Sample
from safegen.models.checkpoint.diffusers_folder import save_folder
from safegen.models.checkpoint.metadata import PatchMetadata
from safegen.models.checkpoint.single_file import CONFIGS_KEY
from safegen.models.checkpoint.single_file_writer import save_single_file
from safegen.models.generation import generate
from safegen.models.loading import load
from safegen.models.selectors import select_parameters
from safegen.patches.patch import Patch

CALL = {
    "prompt": "a red cube",
    "num_inference_steps": 3,
    "guidance_scale": 3.0,
    "output_type": "np",
}
CLASSES = {"sd2-v": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}


def image(pipeline):
    return torch.from_numpy(pipeline(**CALL, generator=torch.Generator().manual_seed(0)).images)


@pytest.fixture
def file(other_build, tmp_path):
    save_single_file(other_build, tmp_path / "tiny.safetensors", dtype="fp32")
    return tmp_path / "tiny.safetensors"


def test_the_round_trip_restores_weights_and_image(file, other_build):
    again = load(str(file))
    assert again.components == other_build.components
    for part in other_build.components:
        a, b = (getattr(model.pipeline, part).state_dict() for model in (again, other_build))
        assert a.keys() == b.keys()
        assert all(torch.equal(value, b[name]) for name, value in a.items())
    assert (again.prediction, again.family, again.hash) == (
        other_build.prediction,
        other_build.family,
        other_build.hash,
    )
    assert again.pipeline_hash == other_build.pipeline_hash
    assert torch.equal(image(again.pipeline), image(other_build.pipeline))


def test_diffusers_loads_the_file_and_generates_the_same_image(file, other_build, tmp_path):
    """diffusers reads the file by its keys alone, with a folder's configurations."""
    save_folder(other_build, tmp_path / "folder")
    kind = CLASSES[other_build.name]
    other = kind.from_single_file(str(file), config=str(tmp_path / "folder"), local_files_only=True)
    other.scheduler = other_build.pipeline.scheduler  # diffusers detects SD 2.x by its size
    other.set_progress_bar_config(disable=True)
    assert_close(image(other), image(other_build.pipeline), rtol=0, atol=1e-3)


def test_a_folder_round_trips(other_build, tmp_path):
    save_folder(other_build, tmp_path / "folder")
    again = load(str(tmp_path / "folder"))
    assert again.pipeline_hash == other_build.pipeline_hash
    # without AVX-512, rounding depends on the alignment of the weights in memory
    assert_close(image(again.pipeline), image(other_build.pipeline), rtol=0, atol=1e-5)
    theirs = CLASSES[other_build.name].from_pretrained(tmp_path / "folder")
    assert_close(image(theirs), image(other_build.pipeline), rtol=0, atol=1e-5)


def test_unused_tensors_are_ignored(file, other_build, tmp_path):
    """Buffers, scales, and SD 2.x's unused last block."""
    tensors = load_file(file)
    if other_build.name == "sd2-v":
        prefix = "cond_stage_model.model."
        more = {
            prefix + "text_projection": torch.ones(32, 32),
            prefix + "transformer.resblocks.2.ln_1.weight": torch.ones(32),
        }
    else:
        prefix = "conditioner.embedders.1.model."
        more = {
            "conditioner.embedders.0.transformer.text_model.embeddings.position_ids": torch.arange(
                4
            )
        }
    save_file(
        tensors | more | {prefix + "logit_scale": torch.ones(())}, tmp_path / "theirs.safetensors"
    )
    save_folder(other_build, tmp_path / "folder")
    again = load(str(tmp_path / "theirs.safetensors"), config=tmp_path / "folder")
    assert torch.equal(image(again.pipeline), image(other_build.pipeline))
    wrong = {prefix + "transformer.resblocks.3.ln_1.weight": torch.ones(32)}
    save_file(tensors | wrong, tmp_path / "wrong.safetensors")
    with pytest.raises(
        FileError, match=r"has 1 weights that .* does not know, first .*resblocks.3.ln_1.weight"
    ):
        load(str(tmp_path / "wrong.safetensors"), config=tmp_path / "folder")


class Harm:
    def __reduce__(self):
        return (print, ("harm",))


def test_a_pickle_is_opened_only_if_allowed_and_runs_no_code(file, other_build, tmp_path, capsys):
    save_folder(other_build, tmp_path / "folder")
    torch.save({"state_dict": load_file(file), "global_step": 7}, tmp_path / "old.ckpt")
    with pytest.raises(FileError, match=r"old.ckpt is a pickle, .* pass --allow-pickle"):
        load(str(tmp_path / "old.ckpt"), config=tmp_path / "folder")
    again = load(str(tmp_path / "old.ckpt"), config=tmp_path / "folder", allow_pickle=True)
    assert (again.components, again.hash) == (other_build.components, other_build.hash)
    assert torch.equal(image(again.pipeline), image(other_build.pipeline))
    torch.save({"state_dict": Harm()}, tmp_path / "bad.ckpt")
    with pytest.raises(FileError, match="cannot be read as a one-file checkpoint"):
        load(str(tmp_path / "bad.ckpt"), config=tmp_path / "folder", allow_pickle=True)
    assert capsys.readouterr().out == ""


def test_a_fused_tensor_of_another_shape_is_refused(file, other_build, tmp_path):
    with safe_open(file, framework="pt") as opener:
        header = dict(opener.metadata())
    tensors = load_file(file)
    name = next(n for n in tensors if n.endswith("resblocks.1.attn.in_proj_weight"))
    tensors[name] = tensors[name][:-1]
    save_file(tensors, tmp_path / "x.safetensors", metadata=header)
    with pytest.raises(
        FileError,
        match=r"in_proj_weight in .* must be \(\d+, \d+\) for .*[qkv]_proj.weight, got \(\d+",
    ):
        load(str(tmp_path / "x.safetensors"))


@pytest.mark.parametrize("build", ["sd2-v", "sdxl"])
@pytest.mark.parametrize(
    ("predicts", "ends"), [("v_prediction", True), ("v_prediction", False), ("epsilon", False)]
)
def test_prediction_markers_round_trip(make_tiny, tmp_path, build, predicts, ends):
    model = make_tiny(build, prediction_type=predicts, rescale_betas_zero_snr=ends)
    save_single_file(model, tmp_path / "m.safetensors")
    with safe_open(tmp_path / "m.safetensors", framework="pt") as opener:
        header, names = opener.metadata(), set(opener.keys())
    assert header["modelspec.prediction_type"] == ("v" if predicts == "v_prediction" else "epsilon")
    assert (
        header["modelspec.architecture"]
        == {"sd2-v": "stable-diffusion-v2", "sdxl": "stable-diffusion-xl-v1-base"}[build]
    )
    assert ("v_pred" in names, "ztsnr" in names) == (predicts == "v_prediction", ends)
    again = load(str(tmp_path / "m.safetensors"))
    assert (again.prediction, again.pipeline.scheduler.config.rescale_betas_zero_snr) == (
        predicts,
        ends,
    )


def test_a_contradicting_configuration_is_refused(make_tiny, tmp_path):
    """A v-prediction file with an epsilon schedule would generate noise."""
    for name, schedule in {
        "v": {},
        "eps": {"prediction_type": "epsilon"},
        "snr": {"rescale_betas_zero_snr": True},
    }.items():
        model = make_tiny("sd2-v", **schedule)
        save_single_file(model, tmp_path / f"{name}.safetensors")
        save_folder(model, tmp_path / name)
    load(str(tmp_path / "v.safetensors"), config=tmp_path / "v")
    for file, folder, words in (
        ("v", "eps", "must be v_prediction, which .* states, got epsilon"),
        ("eps", "v", "must be epsilon, which .* states, got v_prediction"),
        ("snr", "v", "must end in pure noise"),
    ):
        with pytest.raises(FileError, match=words) as caught:
            load(str(tmp_path / f"{file}.safetensors"), config=tmp_path / folder)
        assert "\n" not in str(caught.value)
    bare = {k: v for k, v in load_file(tmp_path / "v.safetensors").items() if k != "v_pred"}
    save_file(bare, tmp_path / "bare.safetensors")  # without a statement the folder decides
    assert load(str(tmp_path / "bare.safetensors"), config=tmp_path / "eps").prediction == "epsilon"


def test_an_unsupported_prediction_is_not_written(make_tiny, tmp_path):
    with pytest.raises(ConfigError, match="must be epsilon or v_prediction, got sample"):
        save_single_file(make_tiny("sd2-v", prediction_type="sample"), tmp_path / "m.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_patched_model_of_another_architecture_is_saved(make_tiny, tmp_path):
    for build in ("sd2-v", "sdxl"):
        model = make_tiny(build)
        names = select_parameters(model.denoiser, "attn1")
        patch = Patch(
            {n: model.denoiser.get_parameter(n) * 3 for n in names},
            PatchMetadata(base=model.hash, family=model.family),
        )
        before = image(model.pipeline)
        with patch.apply(model):
            save_single_file(model, tmp_path / f"{build}.safetensors", dtype="fp32")
            edited = image(model.pipeline)
        assert torch.equal(image(load(str(tmp_path / f"{build}.safetensors")).pipeline), edited)
        assert (edited - before).abs().max() > 1e-3
        assert torch.equal(image(model.pipeline), before)


def test_a_stack_generates_with_an_sdxl(make_tiny):
    model = make_tiny("sdxl")
    one, two = generate(
        model,
        [Sample(prompt="a red cube", seed=1), Sample(prompt="a blue ball", seed=1, index=1)],
        GenerationConfig(num_inference_steps=2),
    )
    assert one.size == two.size == (model.size, model.size)
    assert one.tobytes() != two.tobytes()


def test_the_header_has_the_configurations_of_both_text_encoders(make_tiny, tmp_path):
    save_single_file(make_tiny("sdxl"), tmp_path / "m.safetensors")
    with safe_open(tmp_path / "m.safetensors", framework="pt") as opener:
        files = json.loads(opener.metadata()[CONFIGS_KEY])
    assert {
        "text_encoder_2/config.json",
        "tokenizer_2/vocab.json",
        "tokenizer/merges.txt",
    } <= files.keys()
