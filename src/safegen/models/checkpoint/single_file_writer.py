"""Writing of one-file checkpoints for A1111, ComfyUI and InvokeAI."""

from __future__ import annotations

import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from safegen.core.errors import ConfigError
from safegen.core.quiet import silence_libraries
from safegen.core.tensor_files import LazyTensor, write_tensors
from safegen.models.checkpoint import configs
from safegen.models.checkpoint.component_writer import cast_state
from safegen.models.checkpoint.diffusers_folder import remove_local_paths
from safegen.models.checkpoint.key_map import DENOISER_PREFIX, PREFIX, pack
from safegen.models.checkpoint.metadata import METADATA_KEY, CheckpointMetadata
from safegen.models.checkpoint.single_file import (
    CONFIGS_KEY,
    PREDICTION_KEY,
    V_PREDICTION_TENSOR,
    ZERO_SNR_ABAR,
    ZERO_SNR_TENSOR,
)
from safegen.models.families.pipeline_specs import denoiser_name
from safegen.models.model import DTYPES, Model
from safegen.models.patched_weights import hash_stored, patched_encoders

MODELSPEC_NAMES = {
    "sd1": "stable-diffusion-v1",
    "sd2": "stable-diffusion-v2",
    "sdxl": "stable-diffusion-xl-v1-base",
    "sd3": "stable-diffusion-3",
    "flux": "flux-1-dev",
    "flux-schnell": "flux-1-schnell",
}
"""Architecture: its name in the header, after the ModelSpec of Stability AI and kohya."""
IMPLEMENTATIONS = {
    "sd3": "https://github.com/Stability-AI/sd3.5",
    "flux": "https://github.com/black-forest-labs/flux",
}
"""Architecture of a transformer: code of its publisher, which the names are from."""
TRANSFORMERS = {"SD3Transformer2DModel": "sd3", "FluxTransformer2DModel": "flux"}
"""Transformer class: its architecture."""
WRITE_FOLDER = "Write a folder: safegen export --format diffusers."


def save_single_file(
    model: Model, path: Path, *, dtype: str = "fp16", metadata: CheckpointMetadata | None = None
) -> None:
    """Write a model as one safetensors file in the layout of its publisher.

    The file of SD 3 and FLUX holds the transformer alone, with names without a prefix: for ComfyUI,
    it belongs in `models/diffusion_models`.

    Args:
        model: the model, with or without patches on it.
        path: the new file.
        dtype: type of the weights in the file: fp16 (what most web UIs want), bf16 or fp32.
        metadata: provenance for the header, completed by the hash of the weights as stored.
            Default: none is written.

    Raises:
        FileError: `path` exists or cannot be written.
        ConfigError: the dtype is unknown or cannot hold a weight, or the layout has no place for a
            weight, for what the model predicts, or for the text encoder that a patch changes.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    architecture = architecture_of(model.pipeline)
    tensors: dict[str, Tensor | LazyTensor] = {**_marker_tensors(model)}
    is_flow = model.denoiser_name == "transformer"
    if is_flow:
        _check_text_encoders(model, metadata)
    header = _header(model, architecture, path.stem)
    for component in [model.denoiser_name] if is_flow else PREFIX[architecture]:
        state = cast_state(getattr(model.pipeline, component).state_dict(), component, dtype)
        if component == model.denoiser_name and metadata is not None:
            encoders = patched_encoders(model, metadata)
            stored = metadata.model_copy(
                update={
                    "weights": model.hash_denoiser(dtype),
                    "components": hash_stored(model, encoders, DTYPES[dtype]),
                }
            )
            header[METADATA_KEY] = json.dumps(stored.to_json(), sort_keys=True)
        try:
            packed = pack(architecture, component, state)
        except ValueError as error:
            raise ConfigError(
                f"{model.name!r} cannot be written as one file: {error}. {WRITE_FOLDER}"
            ) from error
        tensors |= packed
    if is_flow:
        tensors = {name.removeprefix(DENOISER_PREFIX): value for name, value in tensors.items()}
    write_tensors(path, tensors, header)


def architecture_of(pipeline: Any) -> str:
    """Return a pipeline's architecture, a key of `PREFIX`. SD 2.x has linear projections."""
    denoiser = getattr(pipeline, denoiser_name(pipeline))
    if (kind := type(denoiser).__name__) in TRANSFORMERS:
        return TRANSFORMERS[kind]
    if hasattr(pipeline, "text_encoder_2"):
        return "sdxl"
    return "sd2" if denoiser.config.use_linear_projection else "sd1"


def _check_text_encoders(model: Model, metadata: CheckpointMetadata | None) -> None:
    """Check that no patch changes a text encoder, which a transformer's file has no place for."""
    if patched := patched_encoders(model, metadata):
        raise ConfigError(
            f"{model.name!r} cannot be written as one file: a patch changes {min(patched)}, and "
            f"the file would hold the transformer alone. {WRITE_FOLDER}"
        )


def _marker_tensors(model: Model) -> dict[str, Tensor]:
    """Return ComfyUI's marker tensors of v-prediction and of a schedule that ends in pure noise."""
    if model.denoiser_name == "transformer":
        return {}
    if model.prediction not in ("epsilon", "v_prediction"):
        raise ConfigError(
            "prediction of a one-file checkpoint must be epsilon or v_prediction, got "
            f"{model.prediction}. Write a folder"
        )
    names = [V_PREDICTION_TENSOR] if model.prediction == "v_prediction" else []
    names += (
        [ZERO_SNR_TENSOR]
        if float(model.pipeline.scheduler.alphas_cumprod[-1]) < ZERO_SNR_ABAR
        else []
    )
    return {name: torch.zeros(1) for name in names}


def _header(model: Model, architecture: str, title: str) -> dict[str, str]:
    """Return the header: ModelSpec entries, and those of a whole pipeline its configurations."""
    header = {"format": "pt", "modelspec.sai_model_spec": "1.0.0", "modelspec.title": title}
    if architecture in ("sd3", "flux"):
        is_schnell = architecture == "flux" and not model.denoiser.config.guidance_embeds
        key = "flux-schnell" if is_schnell else architecture
        return header | {
            "modelspec.architecture": MODELSPEC_NAMES[key],
            "modelspec.implementation": IMPLEMENTATIONS[architecture],
        }
    return header | {
        "modelspec.architecture": MODELSPEC_NAMES[architecture],
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        PREDICTION_KEY: "v" if model.prediction == "v_prediction" else "epsilon",
        CONFIGS_KEY: json.dumps(_config_files(model)),
    }


def _config_files(model: Model) -> dict[str, str]:
    """Return a pipeline's configuration files by path, without CLIP's published vocabulary."""
    pipeline = model.pipeline
    with tempfile.TemporaryDirectory() as tmp, silence_libraries():
        folder = Path(tmp)
        pipeline.save_config(folder)
        pipeline.unet.save_config(folder / "unet")
        pipeline.vae.save_config(folder / "vae")
        for suffix in ("", "_2") if hasattr(pipeline, "text_encoder_2") else ("",):
            encoder, tokenizer = f"text_encoder{suffix}", f"tokenizer{suffix}"
            config = copy.deepcopy(getattr(pipeline, encoder).config)
            config.dtype = "float32"  # not the type that the model happens to be loaded in
            config.save_pretrained(folder / encoder)
            getattr(pipeline, tokenizer).save_pretrained(folder / tokenizer)
            if not configs.remove_vocabulary(folder / tokenizer):
                configs.save_vocabulary(folder / tokenizer)
        pipeline.scheduler.save_pretrained(folder / "scheduler")
        remove_local_paths(folder)
        return {
            path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8")
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
