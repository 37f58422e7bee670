"""Configuration files and vocabulary of the published models, which one-file checkpoints lack."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from transformers.models.clip.tokenization_clip import CLIPTokenizer

CROSS_ATTENTION, PLAIN = (
    ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"),
    ("DownBlock2D", "UpBlock2D"),
)
KEY_PREFIXES = {
    "sdxl": ("conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."),
    "sd2": ("cond_stage_model.model.",),
    "sd1": ("cond_stage_model.transformer.",),
}
"""Architecture: prefixes of its text encoders' weights in one file; all are there."""
TITLES = {"sd1": "SD 1.x", "sd2": "SD 2.x", "sdxl": "SDXL"}

_SD1 = {
    "sample_size": 64,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "down_block_types": [*[CROSS_ATTENTION[0]] * 3, PLAIN[0]],
    "up_block_types": [PLAIN[1], *[CROSS_ATTENTION[1]] * 3],
}
UNET: dict[str, dict[str, Any]] = {
    "sd1": _SD1,
    "sd2": _SD1
    | {
        "cross_attention_dim": 1024,
        "attention_head_dim": [5, 10, 20, 20],
        "use_linear_projection": True,
    },
    "sdxl": {
        "sample_size": 128,
        "block_out_channels": [320, 640, 1280],
        "layers_per_block": 2,
        "cross_attention_dim": 2048,
        "attention_head_dim": [5, 10, 20],
        "down_block_types": [PLAIN[0], CROSS_ATTENTION[0], CROSS_ATTENTION[0]],
        "use_linear_projection": True,
        "up_block_types": [CROSS_ATTENTION[1], CROSS_ATTENTION[1], PLAIN[1]],
        "transformer_layers_per_block": [1, 2, 10],
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
"""Architecture: configuration of its UNet, where it differs from diffusers' default."""

SD2_V: dict[str, Any] = {"sample_size": 96, "upcast_attention": True}
"""Differences of the SD 2.x UNet that predicts v: 768 pixels, not 512."""

_VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "latent_channels": 4,
    "layers_per_block": 2,
    "sample_size": 512,
}
VAE: dict[str, dict[str, Any]] = {
    "sd1": _VAE | {"scaling_factor": 0.18215},
    "sd2": _VAE | {"scaling_factor": 0.18215},
    "sdxl": _VAE | {"scaling_factor": 0.13025, "sample_size": 1024},
}
"""Architecture: configuration of its autoencoder."""


def _clip_config(width: int, layers: int, heads: int, act: str, projection: int) -> dict[str, Any]:
    return {
        "model_type": "clip_text_model",
        "vocab_size": 49408,
        "max_position_embeddings": 77,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
        "hidden_act": act,
        "projection_dim": projection,
        "layer_norm_eps": 1e-5,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
    }


_CLIP = _clip_config(768, 12, 12, "quick_gelu", 768)
TEXT: dict[str, tuple[dict[str, Any], ...]] = {
    "sd1": (_CLIP,),  # CLIP ViT-L/14
    "sd2": (_clip_config(1024, 23, 16, "gelu", 1024),),  # OpenCLIP ViT-H/14 without its last block
    "sdxl": (_CLIP, _clip_config(1280, 32, 20, "gelu", 1280)),  # and OpenCLIP ViT-bigG/14
}
"""Architecture: configurations of its text encoders."""
END_TOKEN, FIRST_TOKEN = "<|endoftext|>", "!"
PAD_TOKENS: dict[str, tuple[str, ...]] = {
    "sd1": (END_TOKEN,),
    "sd2": (FIRST_TOKEN,),
    "sdxl": (END_TOKEN, FIRST_TOKEN),
}
"""Architecture: padding tokens of its tokenizers."""

_NOISE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "steps_offset": 1,
}
SCHEDULER: dict[str, dict[str, Any]] = {
    "sd1": _NOISE
    | {"_class_name": "PNDMScheduler", "set_alpha_to_one": False, "skip_prk_steps": True},
    "sd2": _NOISE
    | {"_class_name": "DDIMScheduler", "set_alpha_to_one": False, "clip_sample": False},
    "sdxl": _NOISE | {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"},
}
"""Architecture: configuration of its schedule, without the prediction type."""
TOKENIZER = {
    "tokenizer_class": "CLIPTokenizer",
    "model_max_length": 77,
    "bos_token": "<|startoftext|>",
    "eos_token": END_TOKEN,
    "unk_token": END_TOKEN,
    "do_lower_case": True,
    "add_prefix_space": False,
    "errors": "replace",
}
"""Configuration of CLIP's tokenizer, without the padding token."""
PIPELINE_CLASSES = {
    "sd1": "StableDiffusionPipeline",
    "sd2": "StableDiffusionPipeline",
    "sdxl": "StableDiffusionXLPipeline",
}


def detect_architecture(names: Iterable[str]) -> str | None:
    """Return the architecture of the weights in one file by their names, a key of `KEY_PREFIXES`.

    None if there is no such architecture.
    """
    names = list(names)
    for architecture, prefixes in KEY_PREFIXES.items():
        if all(any(name.startswith(prefix) for name in names) for prefix in prefixes):
            return architecture
    return None


def write_config_files(
    architecture: str, folder: Path, *, prediction: str, zero_snr: bool = False
) -> None:
    """Write the configuration files and vocabularies of a published model to a folder.

    Args:
        architecture: a key of `KEY_PREFIXES`.
        folder: the folder, created if it does not exist.
        prediction: `epsilon` or `v_prediction`.
        zero_snr: whether the schedule is rescaled to end in pure noise.
    """
    suffixes = ("", "_2")[: len(TEXT[architecture])]
    sd2_v = (architecture, prediction) == ("sd2", "v_prediction")
    scheduler = _scheduler_config(architecture, prediction, zero_snr)
    files = {
        "model_index.json": _model_index(architecture, scheduler["_class_name"], suffixes),
        "unet/config.json": UNET[architecture] | (SD2_V if sd2_v else {}),
        "vae/config.json": VAE[architecture],
        "scheduler/scheduler_config.json": scheduler,
    }
    for suffix, text, pad in zip(
        suffixes, TEXT[architecture], PAD_TOKENS[architecture], strict=True
    ):
        files[f"text_encoder{suffix}/config.json"] = text
        files[f"tokenizer{suffix}/tokenizer_config.json"] = TOKENIZER | {"pad_token": pad}
    for name, entries in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
    for suffix in suffixes:
        add_vocabulary(folder / f"tokenizer{suffix}")


def _scheduler_config(architecture: str, prediction: str, zero_snr: bool) -> dict[str, Any]:
    if not zero_snr:
        return SCHEDULER[architecture] | {"prediction_type": prediction}
    # PNDM cannot be rescaled; arXiv:2305.08891 starts from the last timestep
    return SCHEDULER["sd2" if architecture == "sd1" else architecture] | {
        "prediction_type": prediction,
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
    }


def _model_index(architecture: str, scheduler: str, suffixes: Sequence[str]) -> dict[str, Any]:
    """Return the content of model_index.json: component classes and pipeline options."""
    index: dict[str, Any] = {
        "_class_name": PIPELINE_CLASSES[architecture],
        "scheduler": ("diffusers", scheduler),
        "unet": ("diffusers", "UNet2DConditionModel"),
        "vae": ("diffusers", "AutoencoderKL"),
        "text_encoder": ("transformers", "CLIPTextModel"),
        "feature_extractor": (None, None),
    }
    index |= {f"tokenizer{suffix}": ("transformers", "CLIPTokenizer") for suffix in suffixes}
    if architecture == "sdxl":
        return index | {
            "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
            "image_encoder": (None, None),
            "force_zeros_for_empty_prompt": True,
        }
    return index | {"safety_checker": (None, None), "requires_safety_checker": False}


@cache
def merges() -> tuple[str, ...]:
    """Return CLIP's 48,894 byte pairs in merge order (openai/CLIP, MIT license)."""
    packed = Path(__file__).with_name("clip_merges.txt.gz").read_bytes()
    return tuple(gzip.decompress(packed).decode("utf-8").splitlines())


@cache
def vocabulary() -> dict[str, int]:
    """Return CLIP's 49,408 token ids: bytes, bytes that end a word, merged pairs, start and end."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = 256 - len(printable)  # each is represented by a printable character
    letters = [chr(n) for n in printable] + [chr(256 + i) for i in range(others)]
    words = [letter + "</w>" for letter in letters]
    pairs = [pair.replace(" ", "") for pair in merges()]
    tokens = [*letters, *words, *pairs, "<|startoftext|>", END_TOKEN]
    return {token: index for index, token in enumerate(tokens)}


def remove_vocabulary(folder: Path) -> bool:
    """Delete the vocabulary of a saved tokenizer if it is CLIP's, which `add_vocabulary` restores.

    Returns:
        Whether it was CLIP's. If not, the folder is left as it was.
    """
    path = folder / "tokenizer.json"
    text = path.read_text(encoding="utf-8")
    if json.loads(text)["model"]["vocab"] != vocabulary():
        return False
    path.unlink()
    add_vocabulary(folder)
    restored = CLIPTokenizer.from_pretrained(folder).backend_tokenizer.to_str()
    for name in ("vocab.json", "merges.txt"):
        (folder / name).unlink()
    if _token_rules(restored) != _token_rules(text):
        path.write_text(text, encoding="utf-8")
        return False
    return True


def _token_rules(tokenizer: str) -> Any:
    """Return the entries of a tokenizer.json that decide token ids."""
    entries = json.loads(tokenizer)
    entries["model"]["merges"] = [
        pair if isinstance(pair, str) else " ".join(pair) for pair in entries["model"]["merges"]
    ]
    return {k: v for k, v in entries.items() if k not in ("version", "truncation", "padding")}


def add_vocabulary(folder: Path) -> None:
    """Write CLIP's vocabulary to a tokenizer's folder that has none."""
    if not any((folder / name).is_file() for name in ("vocab.json", "tokenizer.json")):
        _write_vocabulary(folder, vocabulary(), merges())


def save_vocabulary(folder: Path) -> None:
    """Write vocab.json and merges.txt beside a tokenizer.json, for releases that need them.

    T5's tokenizer has no such files.
    """
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    if "merges" not in model:
        return
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    _write_vocabulary(folder, model["vocab"], pairs)


def _write_vocabulary(folder: Path, tokens: Mapping[str, int], pairs: Sequence[str]) -> None:
    text = json.dumps(tokens, ensure_ascii=False)
    (folder / "vocab.json").write_text(text, encoding="utf-8")
    text = "\n".join(["#version: 0.2", *pairs]) + "\n"
    (folder / "merges.txt").write_text(text, encoding="utf-8")
