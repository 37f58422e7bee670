"""Diffusers folders of every family: a round trip bit for bit, and defects of those of flow."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from diffusers import DiffusionPipeline
from real import FLUX_DEV, SD3_MEDIUM, SD35_MEDIUM
from safetensors.torch import load_file, save_file

import tests.tiny
from safegen.core.errors import FileError
from safegen.models.checkpoint.component_schemas import T5Config
from safegen.models.checkpoint.diffusers_folder import save_folder
from safegen.models.checkpoint.folder_schema import check_configs
from safegen.models.loading import load

FOLDERS = (
    "sd3",
    pytest.param("sd35", marks=pytest.mark.slow),
    "flux",
)  # `test_file_families.py` has the others


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return a function that saves a family's tiny model once."""
    root, models = tmp_path_factory.mktemp("families"), {}

    def save(family):
        if family not in models:
            models[family] = tests.tiny.build_model(family)
            save_folder(models[family], root / family)
        return models[family], root / family

    return save


@pytest.fixture
def copy(folders, tmp_path):
    """Return a function that copies a family's folder, to be damaged."""

    def copy_folder(family):
        shutil.copytree(folders(family)[1], tmp_path / family)
        return tmp_path / family

    return copy_folder


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def refusal(path):
    """Return the message of the error that loading raises: one line that names the model."""
    with pytest.raises(FileError) as caught:
        load(path)
    message = str(caught.value)
    assert message.isprintable()
    assert path.name in message
    return message


def state_of(pipe, component):
    state = getattr(pipe, component).state_dict()
    return {name.removeprefix("text_model."): value for name, value in state.items()}


@pytest.mark.parametrize("family", FOLDERS)
def test_a_folder_gives_back_every_weight_and_conditioning(folders, family):
    model, folder = folders(family)
    loaded = load(folder)
    assert loaded.components == model.components
    absent = dict.fromkeys(("text_encoder_3", "tokenizer_3")) if family == "sd3" else {}
    for pipe in (loaded.pipeline, DiffusionPipeline.from_pretrained(folder, **absent)):
        for component in model.components:
            torch.testing.assert_close(
                state_of(pipe, component), state_of(model.pipeline, component), rtol=0, atol=0
            )
    assert loaded.hash == model.hash
    assert loaded.prediction == model.prediction
    texts = ["a red cube", "", "Zzyx blue"]
    ours, theirs = loaded.encode_text(texts), model.encode_text(texts)
    assert torch.equal(ours.hidden, theirs.hidden)
    assert torch.equal(ours.pooled, theirs.pooled)
    assert torch.equal(loaded.noise_schedule.noise, model.noise_schedule.noise)


CLIP = {"model_type": "clip_text_model", "hidden_size": 768, "eos_token_id": 2}
CLIP_G = CLIP | {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32}
T5 = {
    "model_type": "t5",
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
    "is_encoder_decoder": True,
    "torch_dtype": "bfloat16",
}
T5_TOKENIZER = {
    "tokenizer_class": "T5Tokenizer",
    "extra_ids": 100,
    "additional_special_tokens": [f"<extra_id_{i}>" for i in range(100)],
    "model_max_length": 512,
    "legacy": True,
    "sp_model_kwargs": {},
}
VAE = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "latent_channels": 16,
    "layers_per_block": 2,
    "sample_size": 1024,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "latents_mean": None,
    "force_upcast": True,
    "mid_block_add_attention": True,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
FLUX_SHIFT = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "shift": 3.0}
PUBLISHED = {
    "SD 3 medium": ("StableDiffusion3Pipeline", SD3_MEDIUM, {"shift": 3.0}, (CLIP, CLIP_G, T5)),
    "SD 3.5 medium": ("StableDiffusion3Pipeline", SD35_MEDIUM, {"shift": 3}, (CLIP, CLIP_G, T5)),
    "FLUX.1 dev": ("FluxPipeline", FLUX_DEV, FLUX_SHIFT, (CLIP, T5)),
    "FLUX.1 schnell": ("FluxPipeline", FLUX_DEV | {"guidance_embeds": False}, {}, (CLIP, T5)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_configurations_pass(tmp_path, name):
    pipeline, transformer, scheduler, encoders = PUBLISHED[name]
    kind = "FluxTransformer2DModel" if pipeline == "FluxPipeline" else "SD3Transformer2DModel"
    index = {
        "_class_name": pipeline,
        "_diffusers_version": "0.32.0.dev0",
        "transformer": ["diffusers", kind],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "image_encoder": [None, None],
        "feature_extractor": [None, None],
    }
    files = {
        "transformer/config.json": transformer | {"_class_name": kind},
        "vae/config.json": VAE,
        "scheduler/scheduler_config.json": scheduler | {"num_train_timesteps": 1000},
    }
    for number, config in enumerate(encoders, start=1):
        suffix = f"_{number}" if number > 1 else ""
        model = "CLIPTextModelWithProjection" if len(encoders) > 2 else "CLIPTextModel"
        is_t5 = config is T5
        index[f"text_encoder{suffix}"] = ["transformers", "T5EncoderModel" if is_t5 else model]
        tokenizer = "T5TokenizerFast" if is_t5 else "CLIPTokenizer"
        index[f"tokenizer{suffix}"] = ["transformers", tokenizer]
        files[f"text_encoder{suffix}/config.json"] = config
        own = T5_TOKENIZER if is_t5 else {"model_max_length": 77}
        files[f"tokenizer{suffix}/tokenizer_config.json"] = own
    for path, entries in (files | {"model_index.json": index}).items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(json.dumps(entries))
    found = check_configs(tmp_path)
    assert len(found.text_encoders) == len(encoders)
    assert found.denoiser == "transformer"


DEFECTS = {
    "another transformer": ("sd3", "transformer", ["diffusers", "FluxTransformer2DModel"]),
    "a UNet beside it": ("sd3", "unet", ["diffusers", "UNet2DConditionModel"]),
    "no transformer": ("flux", "transformer", [None, None]),
    "T5 of another class": (
        "sd35",
        "text_encoder_3",
        ["transformers", "T5ForConditionalGeneration"],
    ),
    "T5 without tokenizer": ("sd35", "tokenizer_3", [None, None]),
    "a tokenizer without T5": ("sd35", "text_encoder_3", [None, None]),
    "code of the folder": ("flux", "tokenizer_2", ["evil", "T5Tokenizer"]),
    "CLIP in place of T5": ("flux", "text_encoder_2", ["transformers", "CLIPTextModel"]),
    "a third encoder": ("flux", "text_encoder_3", ["transformers", "T5EncoderModel"]),
    "a schedule of diffusion": ("sd3", "scheduler", ["diffusers", "DDIMScheduler"]),
    "a schedule that sets its own steps": (
        "flux",
        "scheduler",
        ["diffusers", "FlowMatchHeunDiscreteScheduler"],
    ),
}


@pytest.mark.parametrize("kind", sorted(DEFECTS))
def test_a_component_of_another_class_is_refused(copy, kind):
    family, component, entry = DEFECTS[kind]
    folder = copy(family)
    change(folder / "model_index.json", **{component: entry})
    message = refusal(folder)
    assert component in message
    assert "model_index.json" in message


NUMBERS = [
    ("sd3", "transformer/config.json", "pos_embed_max_size", 4000),
    ("sd3", "transformer/config.json", "pos_embed_max_size", 10**9),
    ("sd3", "transformer/config.json", "num_layers", 10**12),
    ("sd3", "transformer/config.json", "dual_attention_layers", [10**9]),
    ("sd3", "transformer/config.json", "qk_norm", "evil"),
    ("sd3", "transformer/config.json", "in_channels", 4),
    ("sd3", "scheduler/scheduler_config.json", "shift", 0),
    ("sd3", "scheduler/scheduler_config.json", "invert_sigmas", True),
    ("sd35", "text_encoder_3/config.json", "d_ff", 65536),
    ("sd35", "text_encoder_3/config.json", "num_layers", 10**9),
    ("sd35", "text_encoder_3/config.json", "vocab_size", 2**20),
    ("sd35", "tokenizer_3/tokenizer_config.json", "extra_ids", 10**6),
    ("sd35", "tokenizer_3/tokenizer_config.json", "auto_map", {"AutoTokenizer": "evil.Evil"}),
    ("flux", "transformer/config.json", "axes_dims_rope", [4, 6, 8]),
    ("flux", "transformer/config.json", "num_single_layers", 10**9),
    ("flux", "transformer/config.json", "in_channels", 128),
    ("flux", "scheduler/scheduler_config.json", "max_shift", 10**6),
    ("flux", "scheduler/scheduler_config.json", "max_image_seq_len", 256),
    ("flux", "scheduler/scheduler_config.json", "time_shift_type", "evil"),
]


@pytest.mark.parametrize(("family", "file", "key", "value"), NUMBERS)
def test_a_number_out_of_bounds_is_refused(copy, family, file, key, value):
    folder = copy(family)
    change(folder / file, **{key: value})
    refusal(folder)


@pytest.mark.parametrize(
    ("family", "component"), [("sd3", "transformer"), ("sd35", "text_encoder_3")]
)
def test_missing_and_nan_weights_are_refused(copy, family, component):
    folder = copy(family)
    (path,) = (folder / component).glob("*.safetensors")
    tensors = load_file(path)
    name = min(tensors, key=lambda name: (name == "pos_embed.pos_embed", tensors[name].ndim == 1))
    save_file({k: v for k, v in tensors.items() if k != name}, path)
    assert "lacks" in refusal(folder)
    save_file(tensors | {name: torch.full_like(tensors[name], float("nan"))}, path)
    assert f"NaN or infinite weights in {component}" in refusal(folder)


def test_pickled_weights_of_t5_are_refused(copy):
    folder = copy("sd35")
    (path,) = (folder / "text_encoder_3").glob("*.safetensors")
    torch.save(load_file(path), path.with_name("pytorch_model.bin"))
    path.unlink()
    assert "has pickled weights in text_encoder_3" in refusal(folder)


def test_every_file_that_a_list_of_shards_names_is_checked(copy):
    folder = copy("sd3") / "transformer"
    path = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    name = "proj_out.bias"
    save_file(tensors | {name: torch.zeros(tensors[name].shape).int()}, folder / "x.safetensors")
    listed = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "x.safetensors")}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(listed))
    assert f"got 'I32' in {name}" in refusal(folder.parent)


def test_the_table_of_positions_of_t5_counts_among_its_weights():
    sizes = {"d_model": 1, "d_kv": 1, "d_ff": 1, "num_layers": 1, "vocab_size": 1}
    config = T5Config(num_heads=65536, relative_attention_num_buckets=65536, **sizes)
    assert config.num_weights > 65536**2
