"""One-file SD 2.x and SDXL: the round trip, the library's own reader, prediction of v, and what does not fit."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from safegen.core import registry as tables
from safegen.core.errors import ConfigError, FileError
from safegen.core.generation import GenerationConfig, Sample
from safegen.edits.base import Edit
from safegen.models.checkpoint.diffusers_folder import save_folder
from safegen.models.checkpoint.single_file import CONFIGS, save_single_file
from safegen.models.generation import generate
from safegen.models.model import load
from safegen.models.selectors import select_parameters
from safegen.patches.patch import Patch
from safegen.stack import pipeline_hash

ASK = {"prompt": "a red cube", "num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "np"}
CLASSES = {"sd2": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}


def picture(pipeline):
    return torch.from_numpy(pipeline(**ASK, generator=torch.Generator().manual_seed(0)).images)


@pytest.fixture
def file(other_build, tmp_path):
    save_single_file(other_build, tmp_path / "tiny.safetensors", dtype="fp32")
    return tmp_path / "tiny.safetensors"


def test_the_round_trip_gives_every_weight_and_the_picture_back(file, other_build):
    again = load(str(file))
    assert again.parts == other_build.parts
    for part in other_build.parts:
        a, b = (getattr(model.pipeline, part).state_dict() for model in (again, other_build))
        assert a.keys() == b.keys()
        assert all(torch.equal(value, b[name]) for name, value in a.items())
    assert (again.prediction, again.family, again.hash) == (
        other_build.prediction,
        other_build.family,
        other_build.hash,
    )
    assert pipeline_hash(again) == pipeline_hash(other_build)
    assert torch.equal(picture(again.pipeline), picture(other_build.pipeline))


def test_the_library_opens_the_file_and_draws_the_same_picture(file, other_build, tmp_path):
    """By the file's keys alone, with a folder's configurations. Within 1e-3, as rounding goes."""
    save_folder(other_build, tmp_path / "folder")
    kind = CLASSES[other_build.name]
    other = kind.from_single_file(str(file), config=str(tmp_path / "folder"), local_files_only=True)
    other.scheduler = (
        other_build.pipeline.scheduler
    )  # what the reader takes for SD 2.x rests on its size
    other.set_progress_bar_config(disable=True)
    assert_close(picture(other), picture(other_build.pipeline), rtol=0, atol=1e-3)


def test_a_folder_is_read_and_written_too(other_build, tmp_path):
    save_folder(other_build, tmp_path / "folder")
    again = load(str(tmp_path / "folder"))
    assert pipeline_hash(again) == pipeline_hash(other_build)
    # a processor without AVX-512 rounds by where in memory a file's weights lie
    assert_close(picture(again.pipeline), picture(other_build.pipeline), rtol=0, atol=1e-5)
    theirs = CLASSES[other_build.name].from_pretrained(tmp_path / "folder")
    assert_close(picture(theirs), picture(other_build.pipeline), rtol=0, atol=1e-5)


def test_a_file_of_somebody_elses_has_more_that_decides_nothing(file, other_build, tmp_path):
    """Buffers, scales, and of SD 2.x the block after the last that is read."""
    tensors = load_file(file)
    if other_build.name == "sd2":
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
    assert torch.equal(picture(again.pipeline), picture(other_build.pipeline))
    wrong = {prefix + "transformer.resblocks.3.ln_1.weight": torch.ones(32)}
    save_file(tensors | wrong, tmp_path / "wrong.safetensors")
    with pytest.raises(
        FileError,
        match=r"resblocks.3.ln_1.weight and 0 others that its configuration does not know",
    ):
        load(str(tmp_path / "wrong.safetensors"), config=tmp_path / "folder")


class Harm:
    def __reduce__(self):
        return (print, ("harm",))


def test_a_pickle_is_opened_only_when_the_user_says_so_and_never_runs(
    file, other_build, tmp_path, capsys
):
    save_folder(other_build, tmp_path / "folder")
    torch.save({"state_dict": load_file(file), "global_step": 7}, tmp_path / "old.ckpt")
    with pytest.raises(FileError, match=r"old.ckpt is a pickle, .* say --allow-pickle"):
        load(str(tmp_path / "old.ckpt"), config=tmp_path / "folder")
    again = load(str(tmp_path / "old.ckpt"), config=tmp_path / "folder", allow_pickle=True)
    assert (again.parts, again.hash) == (other_build.parts, other_build.hash)
    assert torch.equal(picture(again.pipeline), picture(other_build.pipeline))
    torch.save({"state_dict": Harm()}, tmp_path / "bad.ckpt")
    with pytest.raises(FileError, match="cannot be read as a one-file checkpoint"):
        load(str(tmp_path / "bad.ckpt"), config=tmp_path / "folder", allow_pickle=True)
    assert capsys.readouterr().out == ""


def test_a_fused_tensor_of_another_size_is_refused(file, other_build, tmp_path):
    with safe_open(file, framework="pt") as opened:
        header = dict(opened.metadata())
    tensors = load_file(file)
    name = next(n for n in tensors if n.endswith("resblocks.1.attn.in_proj_weight"))
    tensors[name] = tensors[name][:-1]
    save_file(tensors, tmp_path / "x.safetensors", metadata=header)
    with pytest.raises(
        FileError,
        match=r"in_proj_weight of shape \(\d+, \d+\), its configuration says \(\d+, \d+\) for .*[qkv]_proj.weight",
    ):
        load(str(tmp_path / "x.safetensors"))


@pytest.mark.parametrize("build", ["sd2", "sdxl"])
@pytest.mark.parametrize(
    ("predicts", "ends"), [("v_prediction", True), ("v_prediction", False), ("epsilon", False)]
)
def test_what_is_predicted_is_marked_and_comes_back(make_tiny, tmp_path, build, predicts, ends):
    model = make_tiny(build, prediction_type=predicts, rescale_betas_zero_snr=ends)
    save_single_file(model, tmp_path / "m.safetensors")
    with safe_open(tmp_path / "m.safetensors", framework="pt") as opened:
        header, names = opened.metadata(), set(opened.keys())
    assert header["modelspec.prediction_type"] == ("v" if predicts == "v_prediction" else "epsilon")
    assert (
        header["modelspec.architecture"]
        == {"sd2": "stable-diffusion-v2", "sdxl": "stable-diffusion-xl-v1-base"}[build]
    )
    assert ("v_pred" in names, "ztsnr" in names) == (predicts == "v_prediction", ends)
    again = load(str(tmp_path / "m.safetensors"))
    assert (again.prediction, again.pipeline.scheduler.config.rescale_betas_zero_snr) == (
        predicts,
        ends,
    )


def test_a_configuration_that_contradicts_the_file_is_refused_in_one_line(make_tiny, tmp_path):
    """A v-prediction file under an epsilon schedule loads and draws noise: it must not load."""
    for name, schedule in {
        "v": {},
        "eps": {"prediction_type": "epsilon"},
        "snr": {"rescale_betas_zero_snr": True},
    }.items():
        model = make_tiny("sd2", **schedule)
        save_single_file(model, tmp_path / f"{name}.safetensors")
        save_folder(model, tmp_path / name)
    load(str(tmp_path / "v.safetensors"), config=tmp_path / "v")
    for file, folder, words in (
        ("v", "eps", "says that it predicts v_prediction, its configuration says epsilon"),
        ("eps", "v", "says that it predicts epsilon, its configuration says v_prediction"),
        ("snr", "v", "says that its schedule ends in pure noise"),
    ):
        with pytest.raises(FileError, match=words) as caught:
            load(str(tmp_path / f"{file}.safetensors"), config=tmp_path / folder)
        assert "\n" not in str(caught.value)
    bare = {k: v for k, v in load_file(tmp_path / "v.safetensors").items() if k != "v_pred"}
    save_file(bare, tmp_path / "bare.safetensors")  # says nothing: the folder decides
    assert load(str(tmp_path / "bare.safetensors"), config=tmp_path / "eps").prediction == "epsilon"


def test_a_model_that_predicts_what_a_file_cannot_say_is_not_written(make_tiny, tmp_path):
    with pytest.raises(
        ConfigError, match="predicts sample, and one file can say epsilon or v_prediction only"
    ):
        save_single_file(make_tiny("sd2", prediction_type="sample"), tmp_path / "m.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_patch_goes_out_with_the_model(make_tiny, tmp_path):
    for build in ("sd2", "sdxl"):
        model = make_tiny(build)
        names = select_parameters(model.denoiser, "attn1")
        patch = Patch(
            {n: model.denoiser.get_parameter(n) * 3 for n in names},
            {"base": model.hash, "family": model.family},
        )
        before = picture(model.pipeline)
        with patch.apply(model):
            save_single_file(model, tmp_path / f"{build}.safetensors", dtype="fp32")
            edited = picture(model.pipeline)
        assert torch.equal(picture(load(str(tmp_path / f"{build}.safetensors")).pipeline), edited)
        assert (edited - before).abs().max() > 1e-3
        assert torch.equal(picture(model.pipeline), before)


def test_a_stack_draws_with_an_sdxl(make_tiny):
    model = make_tiny("sdxl")
    one, two = generate(
        model,
        [Sample(prompt="a red cube", seed=1), Sample(prompt="a blue ball", seed=1, index=1)],
        GenerationConfig(num_inference_steps=2),
    )
    assert one.size == two.size == (model.size, model.size)
    assert one.tobytes() != two.tobytes()


@pytest.mark.parametrize("name", sorted(tables.EDITS))
def test_no_edit_half_works_on_an_sdxl(name, make_tiny, triplets, cubes):
    """Its denoiser wants more than one text embedding: each edit says so in a line and leaves the model alone."""
    model = make_tiny("sdxl")
    edit: Edit = tables.resolve(tables.EDITS, name, "edit").preset("default", concept=cubes)
    before = {
        k: v.clone()
        for part in model.parts
        for k, v in getattr(model.pipeline, part).state_dict().items()
    }
    with pytest.raises(
        ConfigError, match=r"'sdxl' is an SDXL.*edits and fine-tuning know SD 1.x and 2.x only"
    ) as caught:
        edit.apply(model, triplets if edit.inputs != "words" else None)
    assert "\n" not in str(caught.value)
    after = {
        k: v for part in model.parts for k, v in getattr(model.pipeline, part).state_dict().items()
    }
    assert after.keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in after.items())
    assert model.applied == []
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.denoiser.modules())


def test_the_header_holds_the_small_files_of_both_text_encoders(make_tiny, tmp_path):
    save_single_file(make_tiny("sdxl"), tmp_path / "m.safetensors")
    with safe_open(tmp_path / "m.safetensors", framework="pt") as opened:
        files = json.loads(opened.metadata()[CONFIGS])
    assert {
        "text_encoder_2/config.json",
        "tokenizer_2/vocab.json",
        "tokenizer/merges.txt",
    } <= files.keys()
