"""Diffusers folders: reading with strict checks, and writing what old and new releases open."""

from __future__ import annotations

import json
import shutil
from collections.abc import Container, Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from safegen.core.documents import check_file, read_bytes
from safegen.core.errors import FileError, first_line
from safegen.core.files import exists, staged_directory
from safegen.core.quiet import silence_libraries
from safegen.core.tensor_files import read_header
from safegen.models.checkpoint import configs
from safegen.models.checkpoint.component_writer import save_component
from safegen.models.checkpoint.folder_schema import (
    UNLOADED,
    FolderIndex,
    check_configs,
    check_shards,
    check_size,
)
from safegen.models.checkpoint.metadata import METADATA_FILE, CheckpointMetadata, parse_metadata
from safegen.models.checkpoint.weight_files import WeightFiles, find_weights
from safegen.models.model import DTYPES, Model, Pipeline
from safegen.models.patched_weights import hash_stored, patched_encoders

SDXL = "StableDiffusionXLPipeline"
_NO_IMAGE = {"feature_extractor": None, "image_encoder": None}
PIPELINES: dict[str, tuple[str, dict[str, Any]]] = {
    "StableDiffusionPipeline": (
        "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion:StableDiffusionPipeline",
        dict.fromkeys(UNLOADED) | {"requires_safety_checker": False},
    ),
    SDXL: (
        "diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl:"
        "StableDiffusionXLPipeline",
        _NO_IMAGE,
    ),
    "StableDiffusion3Pipeline": (
        "diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3:"
        "StableDiffusion3Pipeline",
        _NO_IMAGE,
    ),
    "FluxPipeline": ("diffusers.pipelines.flux.pipeline_flux:FluxPipeline", _NO_IMAGE),
}
"""Pipeline class by name in model_index.json, and the arguments that skip unloaded components."""
COMPONENTS = {
    "UNet2DConditionModel": "diffusers.models.unets.unet_2d_condition:UNet2DConditionModel",
    "SD3Transformer2DModel": "diffusers.models.transformers.transformer_sd3:SD3Transformer2DModel",
    "FluxTransformer2DModel": (
        "diffusers.models.transformers.transformer_flux:FluxTransformer2DModel"
    ),
    "AutoencoderKL": "diffusers.models.autoencoders.autoencoder_kl:AutoencoderKL",
    "CLIPTextModel": "transformers.models.clip.modeling_clip:CLIPTextModel",
    "CLIPTextModelWithProjection": (
        "transformers.models.clip.modeling_clip:CLIPTextModelWithProjection"
    ),
    "T5EncoderModel": "transformers.models.t5.modeling_t5:T5EncoderModel",
}
"""Class of a component with weights by the name in model_index.json."""
MODEL_DTYPES = ("F64", "F32", "F16", "BF16")
"""Types of weights in safetensors files of whole models; all are converted to the wanted one."""


def read_folder(
    name: str,
    folder: Path,
    *,
    dtype: torch.dtype,
    allow_pickle: bool,
    components: Mapping[str, nn.Module] | None = None,
) -> tuple[Pipeline, CheckpointMetadata | None]:
    """Return the pipeline in a diffusers folder, and its metadata if safegen wrote it.

    Args:
        name: what the user called it, for messages.
        folder: the folder.
        dtype: type of the weights.
        allow_pickle: also open pickled weights.
        components: components that are loaded already; the folder may lack their weights.

    Raises:
        FileError: it is no diffusers folder of a known pipeline, lacks weights, or has files that
            are pickled or damaged.
    """
    index, weights = _check_folder(name, folder, allow_pickle, loaded=components or {})
    cls, options = pipeline_class(index.class_name)
    text = ""
    if exists(folder / METADATA_FILE):
        text = read_bytes(folder / METADATA_FILE).decode("utf-8", errors="replace")
    try:
        with silence_libraries():
            components = dict(components or {}) | {
                component: _load_component(
                    folder / component, index.class_of(component), files, dtype
                )
                for component, files in weights.items()
            }
            pipeline: Pipeline = cls.from_pretrained(
                str(folder), **options, **index.absent, **components, local_files_only=True
            )
            check_schedule(pipeline.scheduler)
    except FileError as error:
        raise FileError(f"the model {name!r} {error}") from error
    except Exception as error:  # diffusers and safetensors raise a dozen types
        raise FileError(f"the model {name!r} cannot be read: {first_line(error)}") from error
    return pipeline, parse_metadata(text)


def pipeline_class(name: str) -> tuple[Any, dict[str, Any]]:
    """Return a pipeline class of `PIPELINES`, and the arguments that skip unloaded components."""
    return _import(PIPELINES[name][0]), PIPELINES[name][1]


def component_class(name: str) -> Any:
    """Return a class of `COMPONENTS`."""
    return _import(COMPONENTS[name])


def _import(target: str) -> Any:
    module, _, attribute = target.partition(":")
    return getattr(import_module(module), attribute)


def check_schedule(scheduler: Any) -> None:
    """Compute the steps of a schedule, with a copy, so that its settings fail here if they do.

    Raises:
        Exception: the error of diffusers, if they do.
    """
    copy = type(scheduler).from_config(scheduler.config)
    shift = {"mu": copy.config.max_shift} if copy.config.get("use_dynamic_shifting") else {}
    copy.set_timesteps(min(10, copy.config.num_train_timesteps), **shift)


def _check_folder(
    name: str, folder: Path, allow_pickle: bool, *, loaded: Container[str]
) -> tuple[FolderIndex, dict[str, WeightFiles]]:
    """Check a model folder before anything is built.

    Returns:
        Its model_index.json, and the files of each component that has weights, without those that
        are loaded already.
    """
    try:
        index = check_configs(folder)
    except FileError as error:
        raise FileError(f"the model {name!r} cannot be read: {error}") from error
    weights = {}
    for component in (index.denoiser, "vae", *index.text_encoders):
        if component in loaded:
            continue
        path = folder / component
        files = find_weights(component, [file.name for file in path.iterdir()], allow_pickle=True)
        if files is None:
            raise FileError(f"{name} cannot be read: there is no .safetensors file in {path}")
        if files.is_pickle and not allow_pickle:
            raise FileError(
                f"{name} has pickled weights in {component}, which can run code. Get it as "
                "safetensors, or pass --allow-pickle if you trust it"
            )
        _check_weight_types(path, {*files.names, *check_shards(path)})
        if component not in ("unet", "vae"):
            check_size(path, index.class_of(component), files.names)
        weights[component] = files
    return index, weights


def _check_weight_types(folder: Path, files: Iterable[str]) -> None:
    """Check the headers of a component's weights: all but buffers are floating point."""
    for path in (folder / name for name in sorted(files) if name.endswith(".safetensors")):
        if not path.exists():
            continue
        for key, entry in read_header(path).items():
            dtype = entry.get("dtype") if isinstance(entry, dict) else None
            is_weight = key != "__metadata__" and not key.endswith("position_ids")
            if is_weight and dtype not in MODEL_DTYPES:
                raise FileError(
                    f"weights in {str(path)!r} must be {', '.join(MODEL_DTYPES)}, got {dtype!r} "
                    f"in {key}. Get the model in another precision"
                )


def _load_component(
    folder: Path, class_name: str, files: WeightFiles, dtype: torch.dtype
) -> nn.Module:
    """Return a component with weights.

    A pipeline would silently initialize a text encoder's missing weights at random, and asks for
    one precision of all components.
    """
    component, report = component_class(class_name).from_pretrained(
        str(folder),
        dtype=dtype,
        variant=files.variant,
        use_safetensors=not files.is_pickle,
        output_loading_info=True,
        local_files_only=True,
    )
    if missing := sorted(report["missing_keys"]):
        raise FileError(
            f"lacks {len(missing)} weights in {folder.name}, first {missing[0]}. Get a complete "
            "copy"
        )
    module: nn.Module = component
    return module


def save_folder(
    model: Model,
    path: str | Path,
    *,
    dtype: str | None = None,
    card: str | None = None,
    metadata: CheckpointMetadata | None = None,
) -> None:
    """Write a diffusers folder that `from_pretrained` of old and new releases opens.

    Current libraries write four things that earlier ones cannot read, which are converted: text
    encoder keys without `text_model.`, a tokenizer without vocab.json and merges.txt, and the new
    names of the image processor and of T5's tokenizer.

    Args:
        model: the model, with or without patches on it.
        path: the new folder.
        dtype: type of the weights: fp32, fp16 or bf16. Default: they stay as they are.
        card: text of its README.md. Default: none is written.
        metadata: content of its safegen.json, completed by the hash of the weights. Default: none
            is written.

    Raises:
        FileError: `path` exists or cannot be written.
        ConfigError: the type cannot hold a weight.
    """
    with staged_directory(Path(path)) as tmp:
        try:
            with silence_libraries():
                _save_pipeline(model, tmp, dtype)
        except Exception as error:
            if isinstance(error, SafetensorError) or type(error) is Exception:
                # tokenizers raises a plain Exception on a full disk
                raise FileError(f"{path} cannot be written: {error}") from error
            raise
        for tokenizer in tmp.glob("tokenizer*"):
            configs.save_vocabulary(tokenizer)
        remove_local_paths(tmp)
        index = tmp / "model_index.json"
        entries = json.loads(index.read_text(encoding="utf-8")) | _copy_unloaded(model, tmp)
        text = json.dumps(entries, indent=2).replace("CLIPImageProcessorPil", "CLIPImageProcessor")
        text = text.replace('"T5Tokenizer"', '"T5TokenizerFast"')  # the former needs spiece.model
        index.write_text(text + "\n", encoding="utf-8")
        if card is not None:
            (tmp / "README.md").write_text(card, encoding="utf-8")
        if metadata is not None:
            components = hash_stored(
                model, patched_encoders(model, metadata), DTYPES.get(dtype or "")
            )
            metadata = metadata.model_copy(
                update={"weights": model.hash_denoiser(dtype), "components": components}
            )
            text = json.dumps(metadata.to_json(), indent=1, sort_keys=True)
            (tmp / METADATA_FILE).write_text(text + "\n", encoding="utf-8")


def _save_pipeline(model: Model, folder: Path, dtype: str | None) -> None:
    """Write a pipeline's components and its model_index.json."""
    for name, part in model.pipeline.components.items():
        if name in model.components:
            save_component(part, folder / name, dtype=dtype)
        elif part is not None:
            part.save_pretrained(folder / name)
    model.pipeline.save_config(folder)


def _copy_unloaded(model: Model, target: Path) -> Mapping[str, Any]:
    """Copy the `UNLOADED` components and return their entries of model_index.json."""
    if model.folder is None or not (model.folder / "model_index.json").is_file():
        return {}
    index = check_configs(model.folder)
    entries = {
        component: getattr(index, component)
        for component in UNLOADED
        if (model.folder / component).is_dir() and getattr(index, component)[0]
    }
    for component in entries:
        for path in (model.folder / component).rglob("*"):
            if not path.is_dir():
                check_file(path)
            _check_inside(path, model.folder)
        shutil.copytree(model.folder / component, target / component, dirs_exist_ok=True)
    return entries | ({"requires_safety_checker": True} if "safety_checker" in entries else {})


def _check_inside(path: Path, folder: Path) -> None:
    """Check that a file to copy is of the model, not linked from elsewhere on this machine."""
    roots = [folder.resolve()]
    if roots[0].parent.name == "snapshots":  # of the hub's cache, where files link to blobs
        roots.append(roots[0].parents[1] / "blobs")
    if not any(path.resolve().is_relative_to(root) for root in roots):
        raise FileError(
            f"files of a model must lie in its folder, got {str(path)!r}, a link to "
            f"{str(path.resolve())!r}. Copy the file if it belongs there"
        )


def remove_local_paths(folder: Path) -> None:
    """Remove `_name_or_path`, a path on the writer's machine, from a folder's configurations."""
    for path in folder.rglob("*.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(config, dict) and config.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
