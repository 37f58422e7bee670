"""Configurations of published models: vocabulary, keys, and one-file checkpoints without them."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from real import published
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from safegen.core.errors import FileError
from safegen.models.checkpoint import configs
from safegen.models.checkpoint import key_map as layout
from safegen.models.checkpoint.single_file import CONFIGS_KEY
from safegen.models.checkpoint.single_file_writer import save_single_file
from safegen.models.loading import load

CALL = {
    "prompt": "a red cube",
    "num_inference_steps": 2,
    "guidance_scale": 3.0,
    "height": 64,
    "width": 64,
    "output_type": "np",
}
TWO = ("text_encoder", "text_encoder_2")


def image(pipeline):
    return torch.from_numpy(pipeline(**CALL, generator=torch.Generator().manual_seed(0)).images)


def test_the_vocabulary_is_that_of_clip(tmp_path):
    """The ids are those of OpenAI's tokenizer."""
    configs.write_config_files("sdxl", tmp_path, prediction="epsilon")
    assert (len(configs.merges()), len(configs.vocabulary())) == (48894, 49408)
    first, second = (
        CLIPTokenizer.from_pretrained(tmp_path / name) for name in ("tokenizer", "tokenizer_2")
    )
    assert first("A photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert first("hello world!").input_ids == [49406, 3306, 1002, 256, 49407]
    padded = [t("a cat", padding="max_length").input_ids for t in (first, second)]
    assert [len(ids) for ids in padded] == [77, 77]
    assert [ids[4:] for ids in padded] == [
        [49407] * 73,
        [0] * 73,
    ]  # SDXL's second fills up with "!"


def parts(build, folder):
    """Return the components of a folder's configurations."""
    out = {
        "unet": UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet")),
        "vae": AutoencoderKL.from_config(AutoencoderKL.load_config(folder / "vae")),
    }
    for name, kind in zip(TWO, (CLIPTextModel, CLIPTextModelWithProjection), strict=True):
        if (folder / name).is_dir():
            out[name] = kind(CLIPTextConfig.from_pretrained(folder / name))
    return out


@pytest.mark.parametrize("build", sorted(configs.KEY_PREFIXES))
def test_the_configurations_have_the_published_weight_names(build, tmp_path):
    configs.write_config_files(build, tmp_path, prediction="epsilon")
    with torch.device("meta"):
        made = parts(build, tmp_path)
    names = {}
    for part, module in made.items():
        names |= {
            name: tuple(value.shape)
            for name, value in layout.pack(build, part, module.state_dict()).items()
        }
    theirs = published(build)
    assert configs.detect_architecture(theirs) == build
    spare = (
        "logit_scale",
        "position_ids",
    )  # unused; SD 2.x has an unused projection and last block too
    spare += ("model.text_projection",) if build == "sd2" else ()
    last = ".resblocks.23." if build == "sd2" else "none"
    theirs = {k: v for k, v in theirs.items() if not k.endswith(spare) and last not in k}
    assert names == theirs


def test_partial_models_have_no_architecture():
    assert (
        configs.detect_architecture(
            ["lora_unet_down_blocks_0.alpha", "model.diffusion_model.out.2.bias"]
        )
        is None
    )
    assert (
        configs.detect_architecture(["conditioner.embedders.0.model.ln_final.bias"]) is None
    )  # SDXL's refiner


@pytest.fixture
def small(monkeypatch):
    """Narrow the published models to a few channels."""
    for build in configs.KEY_PREFIXES:
        config, n = configs.UNET[build], len(configs.UNET[build]["block_out_channels"])
        narrow = {
            "block_out_channels": [32] * n,
            "cross_attention_dim": 16 * len(configs.TEXT[build]),
            "attention_head_dim": 4,
        }
        narrow |= {"layers_per_block": 1, "sample_size": 8}
        if build == "sdxl":
            narrow |= {
                "addition_time_embed_dim": 8,
                "projection_class_embeddings_input_dim": 6 * 8 + 16,
                "transformer_layers_per_block": 1,
            }
        monkeypatch.setitem(configs.UNET, build, config | narrow)
        monkeypatch.setitem(
            configs.VAE,
            build,
            configs.VAE[build] | {"block_out_channels": [32] * 4, "layers_per_block": 1},
        )
        text = {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "projection_dim": 16,
        }
        monkeypatch.setitem(
            configs.TEXT, build, tuple(tower | text for tower in configs.TEXT[build])
        )


def theirs(build, folder, header=None, more=()):
    """Return a file of weights only, as other tools write it, and its components."""
    configs.write_config_files(build, folder / "folder", prediction="epsilon")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        made = parts(build, folder / "folder")
    tensors = {}
    for part, module in made.items():
        tensors |= {
            k: v.load().contiguous()
            for k, v in layout.pack(build, part, module.state_dict()).items()
        }
    save_file(tensors | dict(more), folder / "theirs.safetensors", metadata=header)
    return folder / "theirs.safetensors", made


@pytest.mark.parametrize(
    ("build", "header", "marks", "predicts", "ends"),
    [
        ("sd1", None, (), "epsilon", False),
        ("sd1", None, ("v_pred",), "v_prediction", False),
        ("sd2", {"modelspec.prediction_type": "v"}, (), "v_prediction", False),
        ("sd2", {"modelspec.prediction_type": "epsilon"}, (), "epsilon", False),
        ("sd1", None, ("v_pred", "ztsnr"), "v_prediction", True),
        ("sd2", {"modelspec.architecture": "stable-diffusion-v2-768-v"}, (), "v_prediction", False),
        ("sd2", {"modelspec.architecture": "stable-diffusion-v2-512"}, (), "epsilon", False),
        ("sd2", None, ("v_pred", "ztsnr"), "v_prediction", True),
        ("sdxl", None, (), "epsilon", False),
        ("sdxl", {"modelspec.prediction_type": "V_Prediction"}, (), "v_prediction", False),
        ("sdxl", None, ("v_pred", "ztsnr"), "v_prediction", True),
    ],
)
def test_a_file_without_configurations_loads(small, tmp_path, build, header, marks, predicts, ends):
    file, made = theirs(build, tmp_path, header, {name: torch.zeros(1) for name in marks}.items())
    model = load(str(file))
    assert model.components == tuple(
        part for part in ("unet", "vae", "text_encoder", "text_encoder_2") if part in made
    )
    for part, module in made.items():
        state = getattr(model.pipeline, part).state_dict()
        assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    assert (model.prediction, float(model.noise_schedule.signal[-1]) < 1e-2) == (predicts, ends)
    model.pipeline.scheduler.set_timesteps(25)
    assert (
        not ends or int(model.pipeline.scheduler.timesteps[0]) == 999
    )  # generation starts from pure noise
    assert model.pipeline.tokenizer("a cat").input_ids == [49406, 320, 2368, 49407]
    assert image(model.pipeline).isfinite().all()


def test_an_sd2_file_without_a_prediction_type_is_refused(small, tmp_path):
    file, _ = theirs("sd2", tmp_path)
    with pytest.raises(
        FileError,
        match=r"must state whether it predicts epsilon or v.*\(--config, or in a recipe\)",
    ) as caught:
        load(str(file))
    assert "\n" not in str(caught.value)
    assert load(str(file), config=tmp_path / "folder").prediction == "epsilon"


@pytest.mark.parametrize(
    ("build", "header", "marks", "words"),
    [
        (
            "sdxl",
            None,
            {"edm_mean": [4], "edm_std": [4]},
            r"schedule of .* must not be EDM, got the tensor edm_mean",
        ),
        ("sdxl", None, {"edm_vpred.sigma_max": []}, "must not be EDM"),
        (
            "sdxl",
            {"modelspec.prediction_type": "flow"},
            {},
            "prediction of .* must be one of .*, got 'flow'",
        ),
        (
            "sdxl",
            {"modelspec.architecture": "stable-diffusion-xl-turbo-v1"},
            {},
            r"must be SDXL, as its weights are, got 'stable-diffusion-xl-turbo-v1.*--config",
        ),
        (
            "sd1",
            {"modelspec.architecture": "stable-diffusion-v1/inpainting"},
            {},
            r"must be SD 1.x, as its weights are, got 'stable-diffusion-v1/inpainting",
        ),
        (
            "sd1",
            None,
            {"model.diffusion_model.input_blocks.0.0.weight": [32, 9, 3, 3]},
            "must be 4, got 9",
        ),
        (
            "sd1",
            None,
            {"model.diffusion_model.time_embed.cond_proj.weight": [32, 32]},
            r"first model.*cond_proj.weight.*\(--config, or",
        ),
    ],
)
def test_a_variant_is_refused_by_name(small, tmp_path, build, header, marks, words):
    file, _ = theirs(
        build, tmp_path, header, {name: torch.zeros(shape) for name, shape in marks.items()}.items()
    )
    with pytest.raises(FileError, match=words) as caught:
        load(str(file))
    assert "\n" not in str(caught.value)
    assert str(caught.value).count("--config") <= 1


def test_unsupported_files_are_refused_with_a_folder_too(small, tmp_path):
    file, _ = theirs("sdxl", tmp_path, None, {"edm_mean": torch.zeros(4)}.items())
    with pytest.raises(FileError, match="EDM"):
        load(str(file), config=tmp_path / "folder")
    save_file(load_file(file) | {"ztsnr": torch.zeros(1)}, tmp_path / "z.safetensors")
    configs.write_config_files("sd1", tmp_path / "pndm", prediction="epsilon")
    config = json.loads((tmp_path / "pndm/scheduler/scheduler_config.json").read_text()) | {
        "rescale_betas_zero_snr": True
    }
    (tmp_path / "pndm/scheduler/scheduler_config.json").write_text(
        json.dumps(config)
    )  # a key that PNDM does not know
    (tmp_path / "one").mkdir()
    plain, _ = theirs("sd1", tmp_path / "one", None, {"ztsnr": torch.zeros(1)}.items())
    with pytest.raises(FileError, match="must end in pure noise"):
        load(str(plain), config=tmp_path / "pndm")


def test_a_missing_component_is_named(small, tmp_path):
    file, _ = theirs("sd1", tmp_path)
    save_file(
        {k: v for k, v in load_file(file).items() if not k.startswith("first_stage")},
        tmp_path / "no-vae.safetensors",
    )
    with pytest.raises(FileError, match=r"lacks the vae of SD 1.x. Get a complete file"):
        load(str(tmp_path / "no-vae.safetensors"))


def test_text_encoder_keys_of_2022_are_read(small, tmp_path):
    file, made = theirs("sd1", tmp_path)
    old = {
        k.replace("transformer.text_model.", "transformer."): v for k, v in load_file(file).items()
    }
    assert old.keys() != load_file(file).keys()
    save_file(old, tmp_path / "old.safetensors")
    state = load(str(tmp_path / "old.safetensors")).pipeline.text_encoder.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in made["text_encoder"].state_dict().items())


def test_a_header_with_conflicting_file_names_is_refused(small, tmp_path):
    file, _ = theirs("sd1", tmp_path)
    save_file(
        load_file(file),
        tmp_path / "x.safetensors",
        metadata={CONFIGS_KEY: json.dumps({"tokenizer": "x", "tokenizer/a.json": "{}"})},
    )
    with pytest.raises(FileError, match=r"safegen_configs of .* must match pattern.*'tokenizer'"):
        load(str(tmp_path / "x.safetensors"))


def test_a_file_without_a_model_is_refused(tmp_path):
    save_file({"lora_unet_mid.alpha": torch.ones(1)}, tmp_path / "lora.safetensors")
    with pytest.raises(
        FileError, match=r"must hold a whole model in the original layout of SD 1\.x, SD 2\.x, SDXL"
    ):
        load(str(tmp_path / "lora.safetensors"))


def test_our_file_loads_without_a_folder_and_omits_the_clip_vocabulary(small, tmp_path):
    model = load(str(theirs("sdxl", tmp_path)[0]))
    save_single_file(model, tmp_path / "ours.safetensors", dtype="fp32")
    with safe_open(tmp_path / "ours.safetensors", framework="pt") as opener:
        header = opener.metadata()
    assert len(header[CONFIGS_KEY]) < 20_000
    assert {n for n in json.loads(header[CONFIGS_KEY]) if n.startswith("tokenizer")} == {
        "tokenizer/tokenizer_config.json",
        "tokenizer_2/tokenizer_config.json",
    }
    again = load(str(tmp_path / "ours.safetensors"))
    assert torch.equal(image(again.pipeline), image(model.pipeline))
    assert again.pipeline.tokenizer_2.pad_token_id == 0


@pytest.mark.slow
def test_a_redefined_token_is_stored(small, tmp_path):
    """The text of the added token is in CLIP's vocabulary too: "cat" was `cat</w>` before."""
    model = load(str(theirs("sd1", tmp_path)[0]))
    model.pipeline.tokenizer.add_tokens(["cat"])
    ids = model.pipeline.tokenizer("a cat").input_ids
    assert ids != [49406, 320, 2368, 49407]
    save_single_file(model, tmp_path / "ours.safetensors", dtype="fp32")
    assert load(str(tmp_path / "ours.safetensors")).pipeline.tokenizer("a cat").input_ids == ids


@pytest.mark.slow
def test_an_added_token_is_stored(small, tmp_path):
    """Textual inversion adds tokens that CLIP's vocabulary would split."""
    model = load(str(theirs("sd1", tmp_path)[0]))
    model.pipeline.tokenizer.add_tokens(["<my-cat>"])
    model.pipeline.text_encoder.resize_token_embeddings(49409)
    save_single_file(model, tmp_path / "ours.safetensors", dtype="fp32")
    again = load(str(tmp_path / "ours.safetensors"))
    assert torch.equal(image(again.pipeline), image(model.pipeline))
    assert again.pipeline.tokenizer("<my-cat>").input_ids == [49406, 49408, 49407]
    assert set(load_file(tmp_path / "ours.safetensors")) == set(
        load_file(tmp_path / "theirs.safetensors")
    )
