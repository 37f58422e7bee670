"""Reading of SD 3's and FLUX's one-file checkpoints, which lack tokenizers and often much more.

Stability AI publishes a transformer with autoencoder, and with or without text encoders, Black
Forest Labs a transformer alone. A diffusers folder has the rest.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn

from safegen.core.errors import FileError
from safegen.core.quiet import silence_libraries
from safegen.models.checkpoint.diffusers_folder import component_class, read_folder
from safegen.models.checkpoint.folder_schema import FolderIndex, check_configs, check_size
from safegen.models.checkpoint.key_map import DENOISER_PREFIX, PREFIX
from safegen.models.checkpoint.metadata import METADATA_KEY, CheckpointMetadata, parse_metadata
from safegen.models.checkpoint.single_file import SingleFile, load_weights
from safegen.models.model import Pipeline

FIRST_TENSORS = {
    "sd3": "joint_blocks.0.x_block.attn.qkv.weight",
    "flux": "double_blocks.0.img_attn.qkv.weight",
}
"""Architecture: a tensor of its transformer, by which the layout is known."""
TITLES = {"sd3": "SD 3", "flux": "FLUX"}
CLASSES = {"sd3": "StableDiffusion3Pipeline", "flux": "FluxPipeline"}
"""Architecture: class of its pipelines."""
VAE_PREFIX = "vae."
"""Prefix of the autoencoder's weights in files that ComfyUI wrote of FLUX."""


def transformer_in(checkpoint: SingleFile) -> str | None:
    """Return the architecture of the transformer in a file, a key of `CLASSES`, if it has one."""
    for architecture, name in FIRST_TENSORS.items():
        if name in checkpoint.tensors or DENOISER_PREFIX + name in checkpoint.tensors:
            return architecture
    return None


def read_transformer_file(
    checkpoint: SingleFile,
    architecture: str,
    *,
    config: Path | None,
    dtype: torch.dtype,
    allow_pickle: bool,
) -> tuple[Pipeline, CheckpointMetadata | None]:
    """Return the pipeline of a transformer's file and a folder, and its metadata if it has some.

    Components that the file has are read from it, others from the folder.

    Args:
        checkpoint: the file.
        architecture: key of `CLASSES`.
        config: diffusers folder of the same model.
        dtype: type of the weights.
        allow_pickle: also open pickled weights of the folder.

    Raises:
        FileError: there is no folder, it is of another family, or the file does not fit it.
    """
    path, title = checkpoint.path, TITLES[architecture]
    if config is None:
        raise FileError(
            f"{path} must come with a diffusers folder of {title}, which has the tokenizers and "
            "the components that the file lacks. Name it (--config, or in a recipe)"
        )
    index = check_configs(config)
    if index.class_name != CLASSES[architecture]:
        raise FileError(
            f"config must be a folder of {title}, as {path} is, got a {index.class_name} in "
            f"{str(config)!r}"
        )
    checkpoint = replace(checkpoint, tensors=_with_prefixes(checkpoint, architecture))
    components = {}
    for component, prefix in PREFIX[architecture].items():
        if any(name.startswith(prefix) for name in checkpoint.tensors):
            if component not in (index.denoiser, "vae", *index.text_encoders):
                raise FileError(
                    f"{path} has the {component} of {title}, which {str(config)!r} lacks. Name a "
                    "folder that has it"
                )
            components[component] = _read_component(
                checkpoint, architecture, component, config, index, dtype
            )
    pipeline, _ = read_folder(
        str(config), config, dtype=dtype, allow_pickle=allow_pickle, components=components
    )
    return pipeline, parse_metadata(checkpoint.header.get(METADATA_KEY, ""))


def _with_prefixes(checkpoint: SingleFile, architecture: str) -> dict[str, Any]:
    """Return a file's tensors with the prefixes that files of whole models have."""
    is_bare = FIRST_TENSORS[architecture] in checkpoint.tensors
    renamed = {}
    for name, value in checkpoint.tensors.items():
        if name.startswith(VAE_PREFIX):
            renamed[PREFIX[architecture]["vae"] + name.removeprefix(VAE_PREFIX)] = value
        else:
            renamed[DENOISER_PREFIX + name if is_bare else name] = value
    return renamed


def _read_component(
    checkpoint: SingleFile,
    architecture: str,
    component: str,
    config: Path,
    index: FolderIndex,
    dtype: torch.dtype,
) -> nn.Module:
    """Return one component with the weights in the file and the configuration in the folder."""
    if component != "vae":
        path = str(checkpoint.path.absolute())
        check_size(config / component, index.class_of(component), [path], title=path)
    kind = component_class(index.class_of(component))
    hint = f"Name the folder of this very model, not {str(config)!r} (--config, or in a recipe)"
    try:
        # buffers of text encoders are in no file, and SD 3's position embedding is in each
        with silence_libraries(), init_empty_weights(include_buffers=component == "transformer"):
            if component.startswith("text_encoder"):
                module = kind(kind.config_class.from_pretrained(config / component))
            else:
                module = kind.from_config(kind.load_config(config / component))
    except Exception as error:  # diffusers and transformers raise a dozen types
        reason = " ".join(str(error).split())[:300]
        raise FileError(f"{component} of {str(config)!r} cannot be built: {reason}") from error
    module.to(dtype)  # before the weights are read: FLUX in fp32 takes 48 GB
    in_fp32 = set(getattr(module, "_keep_in_fp32_modules", None) or ())
    for name, value in module.named_parameters():
        if dtype == torch.float16 and in_fp32 & set(name.split(".")):
            value.data = value.data.float()
    load_weights(checkpoint, architecture, component, module, hint)
    if component.startswith("text_encoder"):
        module.tie_weights()  # T5's table of embeddings has two names
    result: nn.Module = module
    return result
