"""Choice among the files that hold one component's weights: precision, shards and pickles."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from safegen.core.errors import FileError
from safegen.core.tensor_files import read_header
from safegen.models.families.pipeline_specs import TEXT_ENCODERS

WEIGHT_FOLDERS = ("unet", "transformer", "vae", *TEXT_ENCODERS)
"""Folders of the components with weights."""
FLOAT_NAMES = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}
"""Type in a safetensors header: its name in settings."""
AVERAGES = "model_ema."
"""Prefix of averaged weights in published training checkpoints; they are not read."""
VARIANTS = ("", ".fp16", ".bf16")
"""Precisions in file names, the preferred one first; without a name it is that of training."""
STEMS = {
    "safetensors": ("diffusion_pytorch_model", "model"),
    "bin": ("diffusion_pytorch_model", "pytorch_model"),
}
"""Suffix: names of the weights of diffusers' and of transformers' components."""


@dataclass(frozen=True)
class WeightFiles:
    """Files with the weights of one component."""

    names: tuple[str, ...]
    """Names in the component's folder, the list of the shards among them."""
    variant: str | None
    """Precision in their names, such as `fp16`."""
    is_pickle: bool


def find_weights(
    component: str, names: Iterable[str], *, allow_pickle: bool = False
) -> WeightFiles | None:
    """Return the files that a component is read from, or None if there are none.

    Precisions are preferred in the order of `VARIANTS`, one file to shards, and every safetensors
    file to pickles.

    Args:
        component: name of the component, such as `text_encoder_2`.
        names: names of the files in its folder.
        allow_pickle: also choose .bin files.
    """
    found = sorted(names)
    is_text = component.startswith("text_encoder")
    for suffix, variant in product(("safetensors", "bin")[: 1 + allow_pickle], VARIANTS):
        stem = STEMS[suffix][is_text]
        index = f"{stem}.{suffix}.index{variant}.json"
        shard = re.compile(rf"{stem}{re.escape(variant)}-\d{{5}}-of-\d{{5}}\.{suffix}")
        files = [name for name in found if name == f"{stem}{variant}.{suffix}"]
        if not files and index in found:
            files = [name for name in found if shard.fullmatch(name)]
            files = [*files, index] if files else []
        if files:
            return WeightFiles(tuple(files), variant.lstrip(".") or None, suffix == "bin")
    return None


def stored_dtype(path: Path, config: Path | None = None) -> str | None:
    """Return the type of all weights of a model, as its safetensors files state it.

    Args:
        path: a diffusers folder or a one-file checkpoint.
        config: diffusers folder with the components that the file lacks.

    Returns:
        A key of `DTYPES`; None if there are several types, another one, pickles, or no weights.
    """
    try:
        types = _folder_types(path) if path.is_dir() else _file_types(path)
        types |= set() if config is None else _folder_types(config)
    except (FileError, OSError):  # reading the model says what is wrong
        return None
    return FLOAT_NAMES.get(types.pop()) if len(types) == 1 else None


def _folder_types(folder: Path) -> set[str]:
    types: set[str] = set()
    for component in WEIGHT_FOLDERS:
        if not (folder / component).is_dir():
            continue
        names = [path.name for path in (folder / component).iterdir()]
        files = find_weights(component, names, allow_pickle=True)
        for name in files.names if files else ():
            if not name.endswith(".json"):
                types |= _file_types(folder / component / name)
    return types


def _file_types(path: Path) -> set[str]:
    """Return the types of a file's numbers, without marker tensors: their names have no dot."""
    if path.suffix != ".safetensors":
        return {"pickle"}
    return {
        str(entry.get("dtype"))
        for name, entry in read_header(path).items()
        if name != "__metadata__" and "." in name and not name.startswith(AVERAGES)
        if isinstance(entry, dict) and "F" in str(entry.get("dtype"))
    }
