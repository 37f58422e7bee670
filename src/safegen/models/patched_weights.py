"""Weights that a patch can change, by the names that patches have for them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from safegen.core.hashing import HashMemory, hash_tensors
from safegen.core.tensor_files import LazyTensor
from safegen.models.families.pipeline_specs import TEXT_ENCODERS, denoiser_name
from safegen.models.selectors import weights_by_name
from safegen.models.text_encoder import text_encoder_names

if TYPE_CHECKING:
    from safegen.models.checkpoint.metadata import CheckpointMetadata
    from safegen.models.model import Model

WEIGHTS = "weights"
"""Name of the denoiser among the parts of a model that patches change."""


_TEXT_CONFIG = ("num_attention_heads", "hidden_act")
UNHASHED_CONFIG = {
    "vae": ("scaling_factor", "shift_factor"),
    "unet": ("attention_head_dim", "num_attention_heads", "sample_size"),
    "transformer": (
        "attention_head_dim",
        "num_attention_heads",
        "sample_size",
        "guidance_embeds",
        "axes_dims_rope",
    ),
    **dict.fromkeys(TEXT_ENCODERS, _TEXT_CONFIG),
}
"""Settings of a pipeline's components that decide an image and are visible in no weight."""
_T5_CONFIG = ("relative_attention_max_distance", "layer_norm_epsilon", "feed_forward_proj")


def component_of(name: str) -> str | None:
    """Return the text encoder that a weight in a patch is of; None for one of the denoiser."""
    component = name.partition(".")[0]
    return component if component in TEXT_ENCODERS else None


def pipeline_weights(pipe: Any) -> dict[str, nn.Parameter]:
    """Return the weights of a pipeline that a patch can change, by their names in patches.

    Those of the denoiser have its parameters' names. Those of a text encoder have the component's
    name before the one in published folders, such as
    `text_encoder.text_model.final_layer_norm.weight`.
    """
    weights = weights_by_name(getattr(pipe, denoiser_name(pipe)))
    for component in text_encoder_names(pipe):
        weights |= encoder_weights(getattr(pipe, component), component)
    return weights


def encoder_weights(encoder: nn.Module, component: str) -> dict[str, nn.Parameter]:
    """Return the weights of a text encoder by their names in patches.

    Releases of transformers name those of a CLIP without projection with or without `text_model.`.
    """
    is_flat = hasattr(encoder, "embeddings")
    prefix = f"{component}.text_model." if is_flat else f"{component}."
    return {prefix + name: value for name, value in weights_by_name(encoder).items()}


def restore(parameter: Tensor, value: Tensor) -> None:
    """Copy a value back into a parameter.

    A textual inversion may have added rows to token embeddings since; they stay.
    """
    parameter[: len(value)].copy_(value) if value.ndim else parameter.copy_(value)


def hash_parts(model: Model, names: Iterable[str]) -> dict[str, str]:
    """Return the SHA-256 of the values in fp32, without patches, of each part of a model.

    Args:
        model: the model.
        names: names of weights in patches; the parts that they are of are hashed.

    Returns:
        Hashes by name of the text encoder, if the model has it; the denoiser is `WEIGHTS`.
    """
    parts = {component_of(name) or WEIGHTS for name in names}
    before = _unpatched_values(model)
    hashes = {WEIGHTS: model.hash} if WEIGHTS in parts else {}
    for part in parts.intersection(text_encoder_names(model.pipeline)):
        weights = encoder_weights(getattr(model.pipeline, part), part)
        values = {n: before.get(id(p), p) for n, p in weights.items()}
        hashes[part] = _hash_values(model, part, values)
    return dict(sorted(hashes.items()))


def hash_components(model: Model, names: Iterable[str]) -> dict[str, str]:
    """Return the hashes of text encoders alone; see `hash_parts`."""
    return hash_parts(model, filter(component_of, names))


def patched_encoders(model: Model, metadata: CheckpointMetadata | None) -> set[str]:
    """Return the text encoders that a patch on a model, or one in its metadata, changes."""
    stated = metadata.patched_components if metadata is not None else set()
    names = (name for applied in model.applied_patches for name in applied.before)
    return stated | {component for name in names if (component := component_of(name))}


def hash_stored(
    model: Model, components: Iterable[str], dtype: torch.dtype | None = None
) -> dict[str, str]:
    """Return the hashes of text encoders as they are now and stored in a type, patches included."""
    return {
        part: _hash_values(model, part, encoder_weights(getattr(model.pipeline, part), part), dtype)
        for part in components
    }


def _hash_values(
    model: Model, component: str, values: Mapping[str, Tensor], dtype: torch.dtype | None = None
) -> str:
    """Return the hash of a text encoder's values; its name, and LoRAs beside it, do not count."""
    own = {n.removeprefix(f"{component}."): v for n, v in values.items() if ".lora_" not in n}
    return hash_rounded(model.hash_memory, own, dtype)


def hash_rounded(
    memory: HashMemory, values: Mapping[str, Tensor], dtype: torch.dtype | None
) -> str:
    """Return the hash in fp32 of values, rounded to a type first unless it is None."""
    if dtype is None or all(value.dtype == dtype for value in values.values()):
        return memory.hash(values, dtype=torch.float32)
    rounded = {
        name: LazyTensor.of([value], lambda v: v[0].detach().to(dtype))
        for name, value in values.items()
    }
    return hash_tensors(rounded, dtype=torch.float32)


def unpatched_state(model: Model, component: str) -> dict[str, Tensor]:
    """Return the state of a component as it is without patches on the model."""
    before = _unpatched_values(model)
    state = getattr(model.pipeline, component).state_dict(keep_vars=True)
    return {name: before.get(id(value), value) for name, value in state.items()}


def _unpatched_values(model: Model) -> dict[int, Tensor]:
    """Return the values before the first patch of each weight that one changes, by its id.

    Models may share a denoiser, and so its patches, and have other text encoders.
    """
    before: dict[int, Tensor] = {}
    for applied in reversed(model.applied_patches):
        weights = pipeline_weights(applied.model.pipeline)
        for name, value in applied.before.items():
            if name in weights and weights[name].shape == value.shape:
                before[id(weights[name])] = value
    return before


@contextmanager
def undone_patches(model: Model) -> Iterator[None]:
    """Take all patches off a model inside the block, and put them on again bit for bit."""
    patches = list(model.applied_patches)
    changed = [
        (weights[name], weights[name].detach().clone())
        for applied in patches
        for weights in [pipeline_weights(applied.model.pipeline)]
        for name in applied.before
    ]
    try:
        for applied in reversed(patches):
            applied.undo()
        yield
    finally:
        with torch.no_grad():
            for parameter, value in changed:
                parameter.copy_(value)
        model.applied_patches[:] = patches


def _is_t5(pipe: Any, component: str) -> bool:
    return type(getattr(pipe, component)).__name__.startswith("T5")


def describe_parts(model: Model) -> dict[str, Any]:
    """Return hashes and settings of all parts of a pipeline, without patches; by part."""
    pipeline, encoders = model.pipeline, text_encoder_names(model.pipeline)
    tokenizers = [getattr(pipeline, e.replace("text_encoder", "tokenizer")) for e in encoders]
    schedule = {k: v for k, v in pipeline.scheduler.config.items() if not k.startswith("_")}
    return {
        model.denoiser_name: model.hash,
        "dtype": model.dtype,
        "weights": {
            name: model.hash_memory.hash(unpatched_state(model, name))
            for name in model.components
            if name != model.denoiser_name
        },
        "scheduler": [type(pipeline.scheduler).__name__, {k: str(v) for k, v in schedule.items()}],
        "tokenizers": [
            [t.get_vocab(), t.pad_token_id, t.model_max_length, t.padding_side] for t in tokenizers
        ],
        "configs": {
            f"{name}.{key}": str(getattr(getattr(pipeline, name).config, key, None))
            for name in model.components
            for key in UNHASHED_CONFIG[name] + (_T5_CONFIG if _is_t5(pipeline, name) else ())
        },
        "empty_prompt": str(pipeline.config.get("force_zeros_for_empty_prompt")),
    }
