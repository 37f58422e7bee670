"""Crafted folders and one-file checkpoints: one line, no code, no memory, no leftovers."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
import warnings
import zipfile

import diffusers
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from safegen.core.errors import FileError, SafegenError
from safegen.models.checkpoint.configs import write_config_files
from safegen.models.checkpoint.diffusers_folder import save_folder
from safegen.models.checkpoint.folder_schema import check_configs
from safegen.models.checkpoint.single_file import CONFIGS_KEY
from safegen.models.checkpoint.single_file_writer import save_single_file
from safegen.models.loading import load

CONFIGS = {
    "index": "model_index.json",
    "unet": "unet/config.json",
    "vae": "vae/config.json",
    "text": "text_encoder/config.json",
    "schedule": "scheduler/scheduler_config.json",
    "tokenizer": "tokenizer/tokenizer_config.json",
}


@pytest.fixture
def folder(tiny_folder, tmp_path):
    """Return a copy of the tiny model's folder, to be damaged."""
    shutil.copytree(tiny_folder, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture(scope="module")
def file(tiny_model, tmp_path_factory):
    out = tmp_path_factory.mktemp("single") / "tiny.safetensors"
    save_single_file(tiny_model, out, dtype="fp32")
    return out


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def refusal(path, **options):
    """Return the message of the error that loading raises: one line that names the model."""
    with pytest.raises(FileError) as caught:
        load(path, **options)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 1500
    assert path.name in message
    return message


# ------------------------------------------------------------ classes and code

COMPONENTS = {
    "code in the folder": ("unet", ["evil", "Evil"]),
    "any module of Python": ("scheduler", ["antigravity", "fly"]),
    "a loader": ("scheduler", ["torch", "load"]),
    "another denoiser": ("unet", ["diffusers", "FluxTransformer2DModel"]),
    "another autoencoder": ("vae", ["diffusers", "AutoencoderTiny"]),
    "another text encoder": ("text_encoder", ["transformers", "T5EncoderModel"]),
    "an automatic class": ("tokenizer", ["transformers", "AutoTokenizer"]),
    "a schedule of another family": ("scheduler", ["diffusers", "FlowMatchEulerDiscreteScheduler"]),
    "a component more": ("helper", ["evil", "Evil"]),
    "no class": ("unet", [None, None]),
    "three entries": ("unet", ["diffusers", "UNet2DConditionModel", "x"]),
    "one entry": ("unet", ["diffusers"]),
    "escape codes": ("vae", ["diffusers", "\x1b[31m"]),
    "a custom pipeline": ("_class_name", ["pipeline", "StableDiffusionPipeline"]),
    "a second text encoder": ("text_encoder_2", ["transformers", "CLIPTextModel"]),
}


@pytest.mark.parametrize("kind", sorted(COMPONENTS))
def test_a_component_of_another_class_is_refused_and_runs_no_code(folder, kind):
    component, entry = COMPONENTS[kind]
    code = f"open({str(folder / 'ran')!r}, 'w').close()\nclass Evil: pass\n"
    for path in ("pipeline.py", "evil.py", "unet/evil.py", "helper/evil.py"):
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text(code)
    change(folder / "model_index.json", **{component: entry})
    message = refusal(folder)
    assert "model_index.json" in message
    assert component in message
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("config", ["unet", "vae", "text", "schedule", "tokenizer"])
@pytest.mark.parametrize("key", ["auto_map", "quantization_config"])
def test_a_configuration_that_asks_for_code_is_refused(folder, config, key):
    change(folder / CONFIGS[config], **{key: {"AutoModel": "evil.Evil"}})
    assert key in refusal(folder)


def test_an_adapter_that_names_another_model_is_refused(folder, tiny_folder):
    config = {"peft_type": "LORA", "base_model_name_or_path": str(tiny_folder / "text_encoder")}
    (folder / "text_encoder" / "adapter_config.json").write_text(json.dumps(config))
    assert "got an adapter of peft" in refusal(folder)


def test_an_image_encoder_is_not_loaded(folder):
    change(
        folder / "model_index.json", image_encoder=["transformers", "CLIPVisionModelWithProjection"]
    )
    assert load(folder).pipeline.image_encoder is None


SCHEDULES = [
    "PNDMScheduler",
    "EulerAncestralDiscreteScheduler",
    "LCMScheduler",
    "UniPCMultistepScheduler",
]


@pytest.mark.parametrize("architecture", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_published_configurations_pass(tmp_path, architecture, schedule):
    """Entries of the published folders of SD 1.5, SD Turbo and SDXL that ours lack."""
    write_config_files(architecture, tmp_path, prediction="epsilon")
    change(
        tmp_path / "model_index.json",
        _diffusers_version="0.6.0",
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        feature_extractor=["transformers", "CLIPFeatureExtractor"],
        image_encoder=[None, None],
        add_watermarker=None,
        scheduler=["diffusers", schedule],
        tokenizer=["transformers", "CLIPTokenizerFast"],
    )
    change(tmp_path / CONFIGS["unet"], _class_name="UNet2DConditionModel", num_class_embeds=None)
    change(tmp_path / CONFIGS["vae"], force_upcast=True, latents_mean=None, _name_or_path="../vae")
    change(tmp_path / CONFIGS["text"], architectures=["CLIPTextModel"], torch_dtype="float16")
    change(tmp_path / CONFIGS["schedule"], _class_name=schedule, trained_betas=None)
    token = {"__type": "AddedToken", "content": "<|startoftext|>", "lstrip": False}
    change(tmp_path / CONFIGS["tokenizer"], bos_token=token, name_or_path="openai/clip")
    index = check_configs(tmp_path)
    assert len(index.text_encoders) == (2 if architecture == "sdxl" else 1)
    assert index.scheduler[1] == schedule


# ------------------------------------------------------------ sizes and numbers

NUMBERS = [
    ("unet", "layers_per_block", 10**12),
    ("unet", "transformer_layers_per_block", 10**12),
    ("unet", "transformer_layers_per_block", [10**9, 10**9]),
    ("unet", "block_out_channels", [10**9, 10**9]),
    ("unet", "sample_size", 10**6),
    ("unet", "sample_size", None),
    ("unet", "norm_eps", -1.0),
    ("unet", "time_embedding_dim", 2**63),
    ("vae", "layers_per_block", 10**12),
    ("vae", "scaling_factor", 0),
    ("vae", "scaling_factor", float("nan")),
    ("vae", "scaling_factor", "x"),
    ("text", "num_hidden_layers", 10**12),
    ("text", "max_position_embeddings", 10**12),
    ("text", "hidden_size", 65536),
    ("schedule", "num_train_timesteps", 10**12),
    ("schedule", "trained_betas", [0.1, 2.0]),
    ("schedule", "beta_end", 7),
    ("schedule", "prediction_type", "x"),
    ("tokenizer", "model_max_length", 10**12),
    ("unet", "sample_size", 10**400),
    ("unet", "time_embedding_dim", 10**400),
    ("schedule", "beta_start", -(10**400)),
    ("schedule", "flow_shift", float("-inf")),
    ("schedule", "lambda_min_clipped", float("inf")),
    ("schedule", "lambda_min_clipped", float("nan")),
    ("unet", "lambda_min_clipped", float("-inf")),
    ("tokenizer", "model_max_length", 33),
]


@pytest.mark.parametrize(("config", "key", "value"), NUMBERS)
def test_a_size_out_of_bounds_is_refused_before_anything_is_built(folder, config, key, value):
    change(folder / CONFIGS[config], **{key: value})
    refusal(folder)


def test_missing_layers_of_a_text_encoder_are_not_allocated(folder):
    change(folder / CONFIGS["text"], num_hidden_layers=60, intermediate_size=65536)
    assert "must hold the weights that its config.json declares" in refusal(folder)


# ------------------------------------------------------------ files


def pipe(path):
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def loop(path):
    path.unlink(missing_ok=True)
    path.symlink_to(path.name)


def endless(path):
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


FILES = [*CONFIGS.values(), "tokenizer/tokenizer.json", "tokenizer/merges.txt", "safegen.json"]
FILES += ["unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"]


@pytest.mark.parametrize("kind", [pipe, loop, endless])
@pytest.mark.parametrize("name", FILES)
def test_no_file_of_a_folder_is_waited_for(folder, name, kind):
    if (name, kind) == ("safegen.json", loop):  # counts as absent
        return
    kind(folder / name)
    refusal(folder)


@pytest.mark.parametrize("name", [*CONFIGS.values(), "tokenizer/tokenizer.json"])
@pytest.mark.parametrize(
    "text", ["", "[]", "null", "{", "\0", '{"a":' * 10**5, "[" * 10**5, "1" + "0" * 400]
)
def test_a_damaged_configuration_is_refused(folder, name, text):
    (folder / name).write_text(text)
    refusal(folder)


SHARDS = {
    "a file outside": "../outside.safetensors",
    "a file of the machine": "/etc/passwd",
    "escape codes": "\x1b[31m",
    "a number": 3,
}


@pytest.mark.parametrize("kind", sorted(SHARDS))
@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_a_shard_list_that_leaves_its_folder_is_refused(folder, component, kind):
    (weights,) = (folder / component).glob("*.safetensors")
    tensors = load_file(weights)
    save_file(tensors, folder / "outside.safetensors", metadata={"format": "pt"})
    save_file(tensors, weights.with_stem(f"{weights.stem}-00001-of-00001"))
    weights.unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, SHARDS[kind])}
    weights.with_name(f"{weights.name}.index.json").write_text(json.dumps(index))
    assert "index.json" in refusal(folder)


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("dtype", ["int8", "bool", "complex64", "float8_e4m3fn"])
def test_weights_of_other_types_are_refused(folder, component, dtype):
    (weights,) = (folder / component).glob("*.safetensors")
    tensors = {k: v.to(getattr(torch, dtype)) for k, v in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    assert "weights in" in refusal(folder)


@pytest.mark.parametrize("kind", [pipe, loop, endless])
def test_an_unloaded_component_is_copied_only_if_it_is_of_regular_files(folder, tmp_path, kind):
    (folder / "safety_checker").mkdir()
    kind(folder / "safety_checker" / "config.json")
    change(folder / "model_index.json", safety_checker=["stable_diffusion", "Checker"])
    with pytest.raises(SafegenError, match="safety_checker"):
        save_folder(load(folder), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_link_to_a_file_of_the_machine_is_not_copied_into_an_export(folder, tmp_path):
    (tmp_path / "secret").write_text("{}")
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker" / "config.json").symlink_to(tmp_path / "secret")
    change(folder / "model_index.json", safety_checker=["stable_diffusion", "Checker"])
    with pytest.raises(FileError, match=r"must lie in its folder, got .*config.json', a link to"):
        save_folder(load(folder), tmp_path / "out")


# ------------------------------------------------------------ one file


def with_header(file, out, **entries):
    """Write a one-file checkpoint again with other header entries."""
    with safe_open(file, framework="pt") as opener:
        header = dict(opener.metadata()) | entries
    save_file(load_file(file), out, metadata=header)
    return out


HEADERS = {
    "climbing": '{"../../out.txt": "x"}',
    "absolute": '{"/tmp/out.txt": "x"}',
    "code": '{"unet/evil.py": "x"}',
    "a pickle": '{"scheduler/x.bin": "x"}',
    "deep folders": json.dumps({"a/" * 1500 + "b.json": "x"}),
    "many files": json.dumps({f"f{i}.json": "x" for i in range(51)}),
    "a long name": json.dumps({"n" * 300 + ".json": "x"}),
    "no name": '{"": "x"}',
    "a null byte": '{"a\\u0000.json": "x"}',
    "a surrogate": '{"model_index.json": "\\ud800"}',
    "no text": '{"model_index.json": 3}',
    "a list": "[]",
    "nothing": "{}",
    "deep JSON": '{"a":' * 10**5,
    "a file and a folder": '{"unet.json": "x", "unet.json/a.json": "x"}',
}


@pytest.mark.parametrize("kind", sorted(HEADERS))
def test_configurations_in_a_header_are_checked_and_nothing_is_left(
    file, tmp_path, monkeypatch, kind
):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    path = with_header(file, tmp_path / "x.safetensors", **{CONFIGS_KEY: HEADERS[kind]})
    with pytest.raises(FileError) as caught:
        load(path)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1500
    assert sorted(p.name for p in tmp_path.iterdir()) == ["temporary", "x.safetensors"]
    assert not any((tmp_path / "temporary").iterdir())


def test_loading_a_file_leaves_nothing_in_the_temporary_folder(file, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    load(file)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("config", "key", "value"), NUMBERS[:4] + NUMBERS[12:16])
def test_sizes_in_a_header_are_bounded_too(file, tmp_path, config, key, value):
    with safe_open(file, framework="pt") as opener:
        files = json.loads(opener.metadata()[CONFIGS_KEY])
    files[CONFIGS[config]] = json.dumps(json.loads(files[CONFIGS[config]]) | {key: value})
    path = with_header(file, tmp_path / "x.safetensors", **{CONFIGS_KEY: json.dumps(files)})
    with pytest.raises(FileError):
        load(path)


@pytest.mark.parametrize("dtype", ["int8", "bool", "complex64", "float8_e4m3fn"])
def test_one_file_with_weights_of_other_types_is_refused(file, tiny_folder, tmp_path, dtype):
    path = tmp_path / "x.safetensors"
    save_file({k: v.to(getattr(torch, dtype)) for k, v in load_file(file).items()}, path)
    assert "must be fp64, fp32, fp16 or bf16" in refusal(path, config=tiny_folder)


@pytest.mark.parametrize("kind", [pipe, loop, endless])
def test_no_one_file_checkpoint_is_waited_for(tmp_path, kind):
    kind(tmp_path / "x.ckpt")
    with pytest.raises(SafegenError) as caught:
        load(tmp_path / "x.ckpt", allow_pickle=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["x.ckpt", "x.pt", "x.pth", "x.bin", "x.CKPT"])
def test_a_pickle_is_refused_by_any_name(tmp_path, name):
    torch.save({"state_dict": {}}, tmp_path / name)
    refusal(tmp_path / name)


def test_a_compressed_pickle_is_refused(folder, tmp_path):
    """torch would inflate 256 MB of zeros from a few hundred kilobytes."""
    torch.save({"state_dict": {"x": torch.zeros(2**26)}}, tmp_path / "plain.ckpt")
    small = tmp_path / "x.ckpt"
    with (
        zipfile.ZipFile(tmp_path / "plain.ckpt") as plain,
        zipfile.ZipFile(small, "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for entry in plain.namelist():
            bomb.writestr(entry, plain.read(entry))
    assert small.stat().st_size < 10**6
    assert "must not be compressed" in refusal(small, allow_pickle=True)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    shutil.move(small, folder / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(FileError, match="must not be compressed"):
        load(folder, allow_pickle=True)


def test_a_damaged_archive_is_refused(folder):
    path = folder / "unet" / "diffusion_pytorch_model.bin"
    path.write_bytes(b"PK\x05\x06" + b"\xff" * 18)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(FileError, match="is damaged") as caught:
        load(folder, allow_pickle=True)
    assert str(caught.value).isprintable()


# ------------------------------------------------------------ anything

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.just(10**400)
    | st.floats()
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


@settings(
    max_examples=80,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_configuration_is_read_or_refused(tiny_folder, tmp_path, data):
    copy = tmp_path / "configs"
    if not copy.exists():
        shutil.copytree(tiny_folder, copy, ignore=shutil.ignore_patterns("*.safetensors"))
    name = data.draw(st.sampled_from(sorted(CONFIGS.values())))
    entries = json.loads((tiny_folder / name).read_text())
    key = data.draw(st.sampled_from(sorted(entries)) | st.text(max_size=8))
    value = data.draw(JSON)
    message = ""
    try:
        (copy / name).write_text(json.dumps(entries | {key: value}))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            check_configs(copy)
    except FileError as error:
        message = str(error)
    finally:
        shutil.copy(tiny_folder / name, copy / name)
    assert message.isprintable()
    assert len(message) < 1500


def test_an_sdxl_folder_is_read(make_tiny, tmp_path):
    model = make_tiny("sdxl")
    save_folder(model, tmp_path / "sdxl")
    assert load(tmp_path / "sdxl").hash == model.hash
    change(tmp_path / "sdxl/model_index.json", text_encoder_2=[None, None])
    assert "text_encoder_2" in refusal(tmp_path / "sdxl")


# ------------------------------------------------------------ what diffusers and transformers write


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"])
def test_a_model_with_a_schedule_of_dpm_solver_is_read_and_exported(make_model, tmp_path, name):
    """diffusers writes its default `lambda_min_clipped` as -Infinity, which is no JSON."""
    model = make_model()
    model.pipeline.scheduler = getattr(diffusers, name).from_config(model.pipeline.scheduler.config)
    save_folder(model, tmp_path / "folder")
    assert "-Infinity" in (tmp_path / "folder" / CONFIGS["schedule"]).read_text()
    again = load(tmp_path / "folder")
    save_single_file(again, tmp_path / "file.safetensors", dtype="fp32")
    for found in (again, load(tmp_path / "file.safetensors")):
        assert type(found.pipeline.scheduler).__name__ == name
        assert found.pipeline.scheduler.config.lambda_min_clipped == -math.inf
        assert found.hash == model.hash
        found.pipeline("a house", num_inference_steps=2, output_type="np")


LIMITS = {"a float": 1e30, "an integer": int(1e30), "400 digits": 10**400, "null": None}


@pytest.mark.parametrize("kind", sorted(LIMITS))
def test_a_tokenizer_without_a_limit_gets_that_of_the_text_encoder(folder, tiny_model, kind):
    """transformers writes 1e30 for no limit."""
    change(folder / CONFIGS["tokenizer"], model_max_length=LIMITS[kind])
    model = load(folder)
    assert model.pipeline.tokenizer.model_max_length == 32
    assert torch.equal(
        model.encode_text(["a house"]).hidden, tiny_model.encode_text(["a house"]).hidden
    )


TYPES = [
    ("schedule", "timestep_spacing", "evil"),
    ("schedule", "timestep_spacing", 3),
    ("schedule", "clip_sample", "false"),
    ("unet", "freq_shift", "q"),
    ("unet", "freq_shift", None),
    ("unet", "freq_shift", [1]),
    ("unet", "flip_sin_to_cos", "q"),
    ("unet", "only_cross_attention", ["q"]),
    ("unet", "act_fn", 3),
    ("vae", "force_upcast", "no"),
]


@pytest.mark.parametrize(("config", "key", "value"), TYPES)
def test_a_setting_of_another_type_is_refused_before_it_is_used(
    folder, tiny_model, tmp_path, config, key, value
):
    change(folder / CONFIGS[config], **{key: value})
    refusal(folder)
    path = tmp_path / "one.safetensors"
    save_single_file(tiny_model, path, dtype="fp32")
    with safe_open(path, framework="pt") as opened:
        header = opened.metadata()
    texts = json.loads(header[CONFIGS_KEY])
    texts[CONFIGS[config]] = json.dumps(json.loads(texts[CONFIGS[config]]) | {key: value})
    save_file(load_file(path), path, metadata=header | {CONFIGS_KEY: json.dumps(texts)})
    assert tempfile.gettempdir() not in refusal(path).replace(str(path), "")


def test_null_for_false_and_a_list_of_switches_are_read(folder):
    """SDXL's published folder has the first."""
    change(folder / CONFIGS["unet"], upcast_attention=None, only_cross_attention=[False, False])
    change(folder / CONFIGS["vae"], force_upcast=None)
    assert load(folder).pipeline.unet.config.upcast_attention is None
