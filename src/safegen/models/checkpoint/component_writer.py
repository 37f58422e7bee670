"""Writing of a pipeline's components: weights in a chosen type, one tensor in memory at a time."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor, nn

from safegen.core.errors import ConfigError
from safegen.core.tensor_files import LazyTensor, stream_tensors
from safegen.models.checkpoint.weight_files import STEMS
from safegen.models.model import DTYPES

MAX_SHARD_SIZE = {False: "10GB", True: "50GB"}
"""Largest file of weights, by whether the component is a text encoder: the libraries' defaults."""
INDEX_SUFFIX = ".index.json"


def cast_state(
    state: Mapping[str, Tensor], component: str, dtype: str | None
) -> dict[str, LazyTensor]:
    """Return weights in a type, cast to it when they are written or hashed.

    Their `load` raises ConfigError if the type cannot hold a value.

    Args:
        state: weights by name.
        component: name of the component, for messages.
        dtype: key of `DTYPES`; None keeps the types.
    """

    def cast(name: str, values: list[Tensor]) -> Tensor:
        value = values[0].detach()
        if dtype is None or not value.is_floating_point() or value.dtype == DTYPES[dtype]:
            return value
        result = value.to(DTYPES[dtype])
        if not (result.is_meta or bool(result.isfinite().all())):
            raise ConfigError(
                f"dtype must hold all weights, got {dtype}, which overflows in {component}.{name}. "
                "Use bf16 or fp32"
            )
        return result

    return {name: LazyTensor.of([value], partial(cast, name)) for name, value in state.items()}


def save_component(
    module: nn.Module,
    folder: Path,
    *,
    dtype: str | None = None,
    max_shard_size: int | str | None = None,
) -> None:
    """Write configuration and weights of a component as `save_pretrained` does.

    Names of a text encoder's weights are those that earlier releases of transformers read, too.

    Args:
        module: denoiser, autoencoder or text encoder of a pipeline.
        folder: the new folder.
        dtype: type of the weights, a key of `DTYPES`. Default: that of each weight.
        max_shard_size: largest file, such as `10GB`. Default: that of the component's library.

    Raises:
        ConfigError: the type cannot hold a weight.
        OSError: a file cannot be written.
    """
    component: Any = getattr(module, "_orig_mod", module)  # of torch.compile
    folder.mkdir()
    is_text = folder.name.startswith("text_encoder")
    if is_text:
        config = copy.deepcopy(component.config)
        stored = component.dtype if dtype is None else DTYPES[dtype]
        config.dtype = str(stored).removeprefix("torch.")
        config.architectures = [type(component).__name__]
        config.save_pretrained(folder)
    else:
        component.save_config(folder)
    tensors = cast_state(_stored_state(component), folder.name, dtype)
    stem = STEMS["safetensors"][is_text]
    empty = {n: torch.empty(t.shape, dtype=t.dtype, device="meta") for n, t in tensors.items()}
    split = split_torch_state_dict_into_shards(
        empty,
        filename_pattern=f"{stem}{{suffix}}.safetensors",
        max_shard_size=max_shard_size or MAX_SHARD_SIZE[is_text],
    )
    for file, names in split.filename_to_tensors.items():
        stream_tensors(folder / file, {n: tensors[n] for n in names}, {"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True)
        (folder / f"{stem}.safetensors{INDEX_SUFFIX}").write_text(text + "\n", encoding="utf-8")


def _stored_state(component: nn.Module) -> dict[str, Tensor]:
    """Return a component's weights by their names in published folders.

    T5's table of embeddings has a second name, which files leave out. Releases of transformers name
    weights of a CLIP without projection with or without `text_model.`; files have it.
    """
    state = component.state_dict()
    if "shared.weight" in state:
        state.pop("encoder.embed_tokens.weight", None)
    if hasattr(component, "embeddings"):
        return {f"text_model.{name}": value for name, value in state.items()}
    return dict(state)
