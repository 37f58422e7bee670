"""The published builds' small files (configurations, schedule, CLIP's vocabulary), for one-file checkpoints, which bring weights alone."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from transformers.models.clip.tokenization_clip import CLIPTokenizer

CROSS, PLAIN = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"), ("DownBlock2D", "UpBlock2D")
KEY_PREFIXES = {
    "sdxl": ("conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."),
    "sd2": ("cond_stage_model.model.",),
    "sd1": ("cond_stage_model.transformer.",),
}
"""Build: how the names of its text encoders' weights begin in one file, all of them there."""
TITLES = {"sd1": "SD 1.x", "sd2": "SD 2.x", "sdxl": "SDXL"}

_SD1 = {
    "sample_size": 64,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "down_block_types": [*[CROSS[0]] * 3, PLAIN[0]],
    "up_block_types": [PLAIN[1], *[CROSS[1]] * 3],
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
        "down_block_types": [PLAIN[0], CROSS[0], CROSS[0]],
        "use_linear_projection": True,
        "up_block_types": [CROSS[1], CROSS[1], PLAIN[1]],
        "transformer_layers_per_block": [1, 2, 10],
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
"""Build: its UNet's configuration, where that is not the library's default."""

SD2_V: dict[str, Any] = {"sample_size": 96, "upcast_attention": True}
"""What SD 2.x has otherwise where it predicts v: 768 pixels, not 512."""

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
"""Build: its autoencoder's configuration."""


def _tower(width: int, layers: int, heads: int, act: str, projection: int) -> dict[str, Any]:
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


_CLIP = _tower(768, 12, 12, "quick_gelu", 768)
TEXT: dict[str, tuple[dict[str, Any], ...]] = {
    "sd1": (_CLIP,),  # CLIP ViT-L/14
    "sd2": (_tower(1024, 23, 16, "gelu", 1024),),  # OpenCLIP ViT-H/14 without its last block
    "sdxl": (_CLIP, _tower(1280, 32, 20, "gelu", 1280)),  # and OpenCLIP ViT-bigG/14
}
"""Build: its text encoders' configurations."""
END, FIRST = "<|endoftext|>", "!"
PADS: dict[str, tuple[str, ...]] = {"sd1": (END,), "sd2": (FIRST,), "sdxl": (END, FIRST)}
"""Build: what its tokenizers fill a text up with."""

_NOISE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "steps_offset": 1,
}
SCHEDULE: dict[str, dict[str, Any]] = {
    "sd1": _NOISE
    | {"_class_name": "PNDMScheduler", "set_alpha_to_one": False, "skip_prk_steps": True},
    "sd2": _NOISE
    | {"_class_name": "DDIMScheduler", "set_alpha_to_one": False, "clip_sample": False},
    "sdxl": _NOISE | {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"},
}
"""Build: its schedule's configuration, but for what is predicted."""
FAMILY = {
    "sd1": "StableDiffusionPipeline",
    "sd2": "StableDiffusionPipeline",
    "sdxl": "StableDiffusionXLPipeline",
}


def detect_architecture(names: Iterable[str]) -> str | None:
    """Return the build whose weights have these names in one file, a key of `SIGNS`.

    None where it is none of them.
    """
    found = {
        sign
        for name in names
        for signs in KEY_PREFIXES.values()
        for sign in signs
        if name.startswith(sign)
    }
    return next((build for build, signs in KEY_PREFIXES.items() if found.issuperset(signs)), None)


def write_small_files(build: str, folder: Path, *, prediction: str, zero_snr: bool = False) -> None:
    """Write what a diffusers folder of a published build has beside its weights.

    Args:
        build: a key of `SIGNS`.
        folder: where to; made when missing.
        prediction: `epsilon` or `v_prediction`.
        zero_snr: whether the schedule is rescaled to end in pure noise.
    """
    tails = ("", "_2")[: len(TEXT[build])]
    unet = UNET[build] | (SD2_V if (build, prediction) == ("sd2", "v_prediction") else {})
    known = {"unet": unet, "vae": VAE[build]} | {
        f"text_encoder{tail}": text for tail, text in zip(tails, TEXT[build], strict=True)
    }
    schedule = SCHEDULE[build] | {"prediction_type": prediction}
    if zero_snr:  # PNDM cannot; the last timestep is drawn from, as arXiv:2305.08891 asks
        kind = SCHEDULE["sd2" if build == "sd1" else build]
        schedule = kind | {
            "prediction_type": prediction,
            "rescale_betas_zero_snr": True,
            "timestep_spacing": "trailing",
        }
    library = {
        "scheduler": ("diffusers", schedule["_class_name"]),
        "unet": ("diffusers", "UNet2DConditionModel"),
    }
    library |= {
        "vae": ("diffusers", "AutoencoderKL"),
        "text_encoder": ("transformers", "CLIPTextModel"),
    }
    library |= {f"tokenizer{tail}": ("transformers", "CLIPTokenizer") for tail in tails}
    more: dict[str, Any] = {
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
    }
    if build == "sdxl":
        library["text_encoder_2"] = ("transformers", "CLIPTextModelWithProjection")
        more = {
            "feature_extractor": [None, None],
            "image_encoder": [None, None],
            "force_zeros_for_empty_prompt": True,
        }
    files = {f"{part}/config.json": config for part, config in known.items()} | {
        "scheduler/scheduler_config.json": schedule
    }
    for tail, pad in zip(tails, PADS[build], strict=True):
        files[f"tokenizer{tail}/tokenizer_config.json"] = {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": 77,
            "bos_token": "<|startoftext|>",
            "eos_token": END,
            "unk_token": END,
            "pad_token": pad,
            "do_lower_case": True,
            "add_prefix_space": False,
            "errors": "replace",
        }
    files["model_index.json"] = {"_class_name": FAMILY[build], **library, **more}
    for name, facts in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    for tail in tails:
        add_vocabulary(folder / f"tokenizer{tail}")


@cache
def merges() -> tuple[str, ...]:
    """Return CLIP's byte pairs in the order in which they are merged, 48,894 (openai/CLIP, MIT licence)."""
    packed = Path(__file__).with_name("clip_merges.txt.gz").read_bytes()
    return tuple(gzip.decompress(packed).decode("utf-8").splitlines())


@cache
def vocabulary() -> dict[str, int]:
    """Return CLIP's 49,408 tokens with their numbers: bytes, bytes that end a word, merged pairs, start and end."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    rest = [n for n in range(256) if n not in printable]  # each is written as a letter that prints
    signs = [chr(n) for n in printable] + [chr(256 + i) for i in range(len(rest))]
    pairs = [pair.replace(" ", "") for pair in merges()]
    return {
        token: n
        for n, token in enumerate(
            [*signs, *(s + "</w>" for s in signs), *pairs, "<|startoftext|>", END]
        )
    }


def forget_vocabulary(folder: Path) -> bool:
    """Delete what a saved tokenizer can do without: all but its configuration, if with CLIP's vocabulary it is the same again.

    Returns:
        whether that was so; else the folder is as it was.
    """
    path = folder / "tokenizer.json"
    text = path.read_text(encoding="utf-8")
    if json.loads(text)["model"]["vocab"] != vocabulary():
        return False
    path.unlink()
    add_vocabulary(folder)
    again = _told(CLIPTokenizer.from_pretrained(folder).backend_tokenizer.to_str())
    for name in ("vocab.json", "merges.txt"):
        (folder / name).unlink()
    if again != _told(text):
        path.write_text(text, encoding="utf-8")
        return False
    return True


def _told(tokenizer: str) -> Any:
    """Return what decides a tokenizer's numbers.

    How it fills up and cuts is in its configuration.
    """
    told = json.loads(tokenizer)
    told["model"]["merges"] = [
        pair if isinstance(pair, str) else " ".join(pair) for pair in told["model"]["merges"]
    ]
    return {
        name: value
        for name, value in told.items()
        if name not in ("version", "truncation", "padding")
    }


def add_vocabulary(folder: Path) -> None:
    """Write CLIP's vocabulary into a tokenizer's folder, if it has none."""
    if not any((folder / name).is_file() for name in ("vocab.json", "tokenizer.json")):
        (folder / "vocab.json").write_text(
            json.dumps(vocabulary(), ensure_ascii=False), encoding="utf-8"
        )
        (folder / "merges.txt").write_text(
            "\n".join(["#version: 0.2", *merges()]) + "\n", encoding="utf-8"
        )
