"""Models of the Hugging Face hub: fetched when a user names one with `hub:`, and never otherwise."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import constants, snapshot_download

from safegen.core.errors import FileError

HUB = "hub:"
_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_SMALL = (
    "model_index.json",
    "safegen.json",
    "scheduler/*",
    "tokenizer*/*",
    "unet/config.json",
    "vae/config.json",
    "text_encoder*/config.json",
)
_STEMS = ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder*/model")
"""Weights as a pipeline opens them by default: no half-precision variants, no averages that only trainers want."""
_PICKLED = (
    "unet/diffusion_pytorch_model",
    "vae/diffusion_pytorch_model",
    "text_encoder*/pytorch_model",
)


def looks_like_hub(name: str) -> bool:
    """Return whether a name could be one of the hub's, owner/name."""
    return bool(_NAME.fullmatch(name))


def fetch(name: str, *, allow_pickle: bool = False) -> Path:
    """Return the folder of a diffusers model of the hub; what is in the cache already is not fetched again, and offline nothing is.

    Args:
        name: `hub:owner/name`.
        allow_pickle: also fetch weights stored as pickles.

    Raises:
        FileError: no such name, or it is neither cached nor to be fetched.
    """
    repo = name.removeprefix(HUB)
    if not looks_like_hub(repo):
        raise FileError(f"a model of the hub is named hub:owner/name, got {name!r}")
    kinds = {"safetensors": _STEMS} | ({"bin": _PICKLED} if allow_pickle else {})
    tails = (".{}", "-*-of-*.{}", ".{}.index.json")
    weights = [
        stem + tail.format(end) for end, stems in kinds.items() for stem in stems for tail in tails
    ]
    try:
        return Path(snapshot_download(repo, allow_patterns=[*_SMALL, *weights]))
    except Exception as error:  # the hub's client and what lies below it raise a dozen kinds; all mean that it is not to be had
        line = next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
        if constants.HF_HUB_OFFLINE:
            line = "HF_HUB_OFFLINE is set, so it is not asked"
        raise FileError(
            f"{name} is not in the cache ({constants.HF_HUB_CACHE}) and the hub does not give it: {line}; "
            "fetch it where there is a network, or name a diffusers folder or a one-file checkpoint"
        ) from error
