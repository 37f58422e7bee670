"""Choice among the files that hold one component's weights: precision, shards and pickles."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product

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
