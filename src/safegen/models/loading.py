"""Loading of models by name, from a diffusers folder, a one-file checkpoint, or the hub."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from safegen.core.device import AUTO, resolve_device, resolve_dtype
from safegen.core.errors import ConfigError, FileError, check_keywords, first_line
from safegen.core.files import exists
from safegen.core.hub import HUB, check_model_name, fetch_snapshot
from safegen.core.quiet import silence_libraries
from safegen.core.registry import MODELS, TRIPLETS, resolve
from safegen.core.tensor_files import read_header
from safegen.models.checkpoint.diffusers_folder import read_folder
from safegen.models.checkpoint.metadata import PATCH_FORMAT, CheckpointMetadata
from safegen.models.checkpoint.single_file_reader import read_single_file
from safegen.models.checkpoint.weight_files import WEIGHT_FOLDERS, find_weights, stored_dtype
from safegen.models.model import DTYPES, Model, Pipeline, components_of
from safegen.models.text_encoder import text_encoder_names
from safegen.models.wrapping import pipeline_model, register_model, text_to_image

LORA_ENDINGS = (".lora_down.weight", ".lora_A.weight")
"""Endings of a key in a LoRA file."""
_SMALL_FILES = (
    "model_index.json",
    "safegen.json",
    "scheduler/*",
    "tokenizer*/*",
    "unet/config.json",
    "transformer/config.json",
    "vae/config.json",
    "text_encoder*/config.json",
)


@check_keywords
def load(
    name: str | Path | DiffusionPipeline,
    *,
    dtype: str | torch.dtype = "fp32",
    device: str | torch.device = AUTO,
    allow_pickle: bool = False,
    config: str | Path | None = None,
) -> Model:
    """Return a model: from a diffusers folder, a one-file checkpoint, the hub, or a pipeline.

    Args:
        name: `mini`, a folder with a model_index.json, a .safetensors (or .ckpt) file, or
            `hub:owner/name`. Only the last downloads anything. A text-to-image pipeline of
            diffusers is used as it is: on its device, without a copy.
        dtype: type of the weights: fp32, bf16 or fp16, or torch's name or object for it; `auto` is
            that of the files if all their weights have one, else fp32.
        device: a torch device, such as `cuda:1`; `auto` is the accelerator if there is one, else
            the CPU.
        allow_pickle: also open weights stored as pickles (.bin, .ckpt), which can run code.
        config: for a one-file checkpoint, a diffusers folder of the same family with the
            configuration files that the checkpoint lacks, and the components. SD 3 and FLUX
            need it.

    Raises:
        ConfigError: `config` is given for something other than a one-file checkpoint, torch cannot
            use the device, or a pipeline is of another family or given with options.
        UnknownNameError: `name` is neither a known model nor a path, or the dtype is unknown.
        FileError: a file is missing, pickled, damaged or has NaN weights, or the hub's model is not
            available.

    Example:
        >>> model = safegen.load("mini", dtype="bf16")
        >>> model.dtype
        'bf16'
    """
    if isinstance(name, DiffusionPipeline):
        if (dtype, device, config) != ("fp32", AUTO, None):
            raise ConfigError(
                "dtype, device and config must not be given with a pipeline, which is loaded "
                "already. Use pipe.to(...)."
            )
        return _wrap_pipeline(name)
    if not isinstance(name, str | Path):
        raise ConfigError(
            "model must be a name, a path or a diffusers pipeline, got "
            f"{type(name).__name__}. Use one of them."
        )
    name = f"{'' if name.is_absolute() else './'}{name}" if isinstance(name, Path) else name
    check_is_model(name)
    wanted = None if dtype == AUTO else resolve_dtype(dtype)
    device = resolve_device(device)
    check_device(device)
    if name not in MODELS and exists(name, file=True):
        source = None if config is None else Path(config)
        stored = stored_dtype(Path(name), source)
        pipeline, metadata = read_single_file(
            Path(name),
            config=source,
            dtype=DTYPES[wanted or stored or "fp32"],
            allow_pickle=allow_pickle,
        )
        return finish_loading(name, pipeline, device, metadata=metadata, stored_dtype=stored)
    if config is not None:
        raise ConfigError(f"config must go with a one-file checkpoint, got {name!r}. Leave it out")
    folder = _find_folder(name, allow_pickle)
    stored = stored_dtype(folder)
    torch_dtype = DTYPES[wanted or stored or "fp32"]
    pipeline, metadata = read_folder(name, folder, dtype=torch_dtype, allow_pickle=allow_pickle)
    return finish_loading(
        name, pipeline, device, folder=folder, metadata=metadata, stored_dtype=stored
    )


def find_dtype(
    name: str, *, allow_pickle: bool = False, config: str | Path | None = None
) -> str | None:
    """Return the type of all weights in a model's files, without loading them.

    Args:
        name: see `load`. A model of the hub is fetched.
        allow_pickle: see `load`.
        config: see `load`.

    Returns:
        A key of `DTYPES`; None if there are several types, or pickles.

    Raises:
        UserError: see `load`.
    """
    check_is_model(name)
    if name not in MODELS and exists(name, file=True):
        return stored_dtype(Path(name), None if config is None else Path(config))
    return stored_dtype(_find_folder(name, allow_pickle))


def check_is_model(name: str) -> None:
    """Check that a name is not that of a patch, a LoRA or triplets, as after swapped arguments.

    Only the header of a file is read. Other names are checked by `load`.

    Raises:
        FileError: it is one of these.
    """
    path, option = Path(name), ""
    source = name.partition(":")[0]
    if ":" in name and source in TRIPLETS and not exists(name):
        option = "triplets, which go with --triplets"
    elif path.suffix == ".safetensors" and exists(path, file=True):
        header = read_header(path)
        metadata = header.get("__metadata__")
        if isinstance(metadata, dict) and metadata.get("format") == PATCH_FORMAT:
            option = "a safegen patch, which goes with --patch"
        elif any(key.endswith(LORA_ENDINGS) for key in header):
            option = "a LoRA, which goes with --lora"
    elif exists(path / "manifest.jsonl") and exists(path / "unsafe"):
        option = "a folder of triplets, which goes with --triplets"
    if option:
        raise FileError(
            f"MODEL must be a model, got {name!r}: {option}. Did you swap the arguments? MODEL "
            "comes first."
        )


def check_device(device: str) -> None:
    """Check that torch can use a device, before anything is loaded.

    Raises:
        ConfigError: torch does not know it or cannot use it on this machine, or it is `meta`.
    """
    try:
        is_meta = torch.empty(1, device=device).is_meta
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"device must be one that torch can use here (cpu, cuda, mps ...), got {device!r}: "
            f"{first_line(error)}"
        ) from error
    if is_meta:
        raise ConfigError(
            f"device must be one that holds values, got {device!r}. Name cpu, or an accelerator"
        )


def finish_loading(
    name: str,
    pipeline: Pipeline,
    device: str,
    *,
    folder: Path | None = None,
    metadata: CheckpointMetadata | None = None,
    stored_dtype: str | None = None,
) -> Model:
    """Return a pipeline as a model: checked, on its device, without gradients and progress bars.

    Raises:
        FileError: a weight is missing, or NaN or infinite.
    """
    _check_weights(name, pipeline)
    _limit_tokenizers(pipeline)
    if device != "cpu":  # where it is; diffusers would warn of fp16
        pipeline.to(device)
    pipeline.set_progress_bar_config(disable=True)
    _freeze(pipeline)
    model = Model(name, pipeline, folder, metadata, stored_dtype=stored_dtype)
    register_model(model)
    return model


def _wrap_pipeline(pipe: DiffusionPipeline) -> Model:
    """Return the model of a loaded pipeline, its weights checked and without gradients."""
    model = pipeline_model(text_to_image(pipe))
    _check_weights(model.name, model.pipeline)
    _limit_tokenizers(model.pipeline)
    _freeze(model.pipeline)
    return model


def _freeze(pipeline: Pipeline) -> None:
    """Turn off gradients and dropout of a pipeline's components."""
    for component in components_of(pipeline):
        getattr(pipeline, component).eval().requires_grad_(False)


def _check_weights(name: str, pipeline: Pipeline) -> None:
    """Check that a pipeline has all its weights, and that they are finite."""
    for component in components_of(pipeline):
        for key, value in getattr(pipeline, component).state_dict().items():
            if value.is_meta:
                raise FileError(
                    f"the model {name!r} lacks weights in {component}: {key} first. Get a complete "
                    "copy"
                )
            if value.is_floating_point() and not bool(value.isfinite().all()):
                raise FileError(
                    f"the model {name!r} has NaN or infinite weights in {component}.{key}. Get an "
                    "undamaged copy"
                )


def _limit_tokenizers(pipeline: Pipeline) -> None:
    """Give tokenizers without a limit, stated as 1e30 or not at all, that of their encoder."""
    for encoder in text_encoder_names(pipeline):
        positions = getattr(pipeline, encoder).config.to_dict().get("max_position_embeddings")
        if positions is not None:  # T5 has none: its positions are relative
            tokenizer = getattr(pipeline, encoder.replace("text_encoder", "tokenizer"))
            tokenizer.model_max_length = min(tokenizer.model_max_length, positions)


def _find_folder(name: str, allow_pickle: bool) -> Path:
    """Return the diffusers folder that a name stands for, downloaded if it is the hub's."""
    if name in MODELS:
        folder: Path = resolve(MODELS, name, "model")()
        return folder
    if name.startswith(HUB):
        with silence_libraries():
            return fetch_snapshot(name, select=partial(hub_patterns, allow_pickle=allow_pickle))
    check_model_name(name)
    return Path(name)


def hub_patterns(names: Iterable[str], *, allow_pickle: bool) -> list[str]:
    """Return the patterns of a repository's files that are downloaded for a model.

    Of each component's weights that is one precision, in one file or in shards (`find_weights`).

    Args:
        names: paths of all its files.
        allow_pickle: also fetch weights that are only there as pickles.
    """
    folders: dict[str, list[str]] = {}
    for path in names:
        folder, _, name = path.rpartition("/")
        folders.setdefault(folder, []).append(name)
    weights = {
        folder: find_weights(folder, folders.get(folder, ()), allow_pickle=allow_pickle)
        for folder in WEIGHT_FOLDERS
    }
    chosen = [
        f"{folder}/{name}" for folder, files in weights.items() if files for name in files.names
    ]
    return [*_SMALL_FILES, *chosen]
