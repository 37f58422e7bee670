"""One-file checkpoints in the original Stable Diffusion layout: what A1111, ComfyUI and InvokeAI open. SD 1.x, in and out."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.models.clip.configuration_clip import CLIPTextConfig
from transformers.models.clip.modeling_clip import CLIPTextModel

from safegen.errors import BadFile, BadSetting
from safegen.files import fresh_file
from safegen.models.layout import PREFIX, original_names, to_original
from safegen.models.model import DTYPES, Model, finish_loading, first_line, forget_places, save_vocabulary, silence

CONFIGS = "safegen_configs"
"""Key of the header that holds the small files of a pipeline (configurations, vocabulary), so that the file opens by itself."""
LARGEST = 256 * 1024
"""Bytes of small files that the header may hold; the vocabulary of a full-size model is larger and stays out."""
PICKLES = {".ckpt", ".pt", ".pth", ".bin"}


def save_single_file(model: Model, out: Path, *, dtype: str = "fp16", facts: Mapping[str, Any] | None = None) -> None:
    """Write a model as one safetensors file in the original layout.

    Args:
        model: an SD 1.x model, with or without patches on it.
        out: the new file.
        dtype: type of the weights in the file: fp16 (what most web UIs want), bf16 or fp32.
        facts: what else the header says: the provenance of the edit.

    Raises:
        BadFile: `out` exists or cannot be written.
        BadSetting: no such dtype, weights that the dtype cannot hold, or a model of SD 2.x's build.
    """
    if model.denoiser.config.use_linear_projection:
        raise BadSetting(
            f"{model.name!r} is of SD 2.x's build, whose text encoder lies otherwise in one file, and that is not written; "
            "write a folder: safegen apply"
        )
    if dtype not in DTYPES:
        raise BadSetting(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    tensors: dict[str, Tensor] = {}
    for part in PREFIX:
        state = getattr(model.pipeline, part).state_dict()
        for name, to in original_names(part, state).items():
            value = to_original(part, name, state[name].detach().cpu()).to(DTYPES[dtype]).contiguous()
            if not bool(value.isfinite().all()):
                raise BadSetting(f"{part}.{name} does not fit into {dtype}; choose bf16 or fp32")
            tensors[to] = value
    header = {"format": "pt"} | _small_files(model)
    if facts:
        header["safegen"] = json.dumps(dict(facts), sort_keys=True)
    with fresh_file(out) as tmp:
        try:
            save_file(tensors, tmp, metadata=header)
        except SafetensorError as error:
            raise BadFile(f"{out} cannot be written: {error}") from error


def _small_files(model: Model) -> dict[str, str]:
    """Return the header's entry of a pipeline's small files; none when they are too large together."""
    with tempfile.TemporaryDirectory() as folder, silence():
        here, pipe = Path(folder), model.pipeline
        pipe.save_config(here)
        pipe.unet.save_config(here / "unet")
        pipe.vae.save_config(here / "vae")
        pipe.text_encoder.config.save_pretrained(here / "text_encoder")
        pipe.tokenizer.save_pretrained(here / "tokenizer")
        save_vocabulary(here / "tokenizer")
        pipe.scheduler.save_pretrained(here / "scheduler")
        forget_places(here)
        files = {p.relative_to(here).as_posix(): p.read_text(encoding="utf-8") for p in sorted(here.rglob("*")) if p.is_file()}
    text = json.dumps(files)
    return {CONFIGS: text} if len(text) <= LARGEST else {}


def load_single_file(
    path: Path, *, config: Path | None = None, dtype: str = "fp32", device: str = "cpu", allow_pickle: bool = False
) -> Model:
    """Open a one-file checkpoint of the SD 1.x family. Nothing is fetched.

    Args:
        path: .safetensors, or with `allow_pickle` .ckpt.
        config: a diffusers folder of the same family, whose configurations and vocabulary are used; a file that we wrote may have its own.
        dtype: fp32, bf16 or fp16.
        device: a torch device.
        allow_pickle: also open pickles. They are read as weights only, which runs no code of theirs, as far as torch keeps that promise.

    Raises:
        BadFile: not readable, of another family, or without configurations.
    """
    tensors, header = _read(path, allow_pickle)
    with tempfile.TemporaryDirectory() as folder:
        if config is None:
            if CONFIGS not in header:
                raise BadFile(
                    f"{path} has weights only; name a diffusers folder of the same family, whose small files go with it (--config)"
                )
            config = Path(folder)
            _unpack(header[CONFIGS], config, path)
        if not (config / "model_index.json").is_file():
            raise BadFile(f"{config} is not a diffusers folder: it has no model_index.json")
        pipeline = _assemble(tensors, config, path)
    return finish_loading(str(path), pipeline.to(dtype=DTYPES[dtype]), device)


def _read(path: Path, allow_pickle: bool) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return a file's tensors and header.

    Raises:
        BadFile: it cannot be read, or is a pickle that was not asked for.
    """
    if path.suffix in PICKLES and not allow_pickle:
        raise BadFile(
            f"{path} is a pickle, which can run code of whoever made it; get it as safetensors, or say --allow-pickle if you trust it"
        )
    try:
        if path.suffix in PICKLES:
            found = torch.load(path, map_location="cpu", weights_only=True)
            found = found.get("state_dict", found)
            return {k: v for k, v in found.items() if isinstance(v, Tensor)}, {}
        with safe_open(path, framework="pt") as file:
            return {k: file.get_tensor(k) for k in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except Exception as error:  # torch's unpickler raises a dozen kinds
        raise BadFile(f"{path} cannot be read as a one-file checkpoint: {first_line(error)}") from error


def _unpack(text: str, folder: Path, path: Path) -> None:
    try:
        files = {name: str(value) for name, value in json.loads(text).items()}
    except (json.JSONDecodeError, AttributeError) as error:
        raise BadFile(f"{path} is damaged: its header's {CONFIGS} is not JSON; name a folder instead (--config)") from error
    for name, value in files.items():
        place = folder / name
        if not place.resolve().is_relative_to(folder.resolve()):
            raise BadFile(f"{path} is not to be trusted: its header names the file {name!r}, outside its folder")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(value, encoding="utf-8")


def _assemble(tensors: Mapping[str, Tensor], config: Path, path: Path) -> StableDiffusionPipeline:
    """Return a pipeline built from configurations, with the file's weights in it."""
    try:
        index = json.loads((config / "model_index.json").read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or not UTF-8
        raise BadFile(f"the small files in {config} cannot be used: model_index.json is not JSON ({first_line(error)})") from error
    if index.get("_class_name") != "StableDiffusionPipeline":
        raise BadFile(f"{config} is a {index.get('_class_name')}; one-file checkpoints of StableDiffusionPipeline are read")
    try:
        with silence():
            parts = {
                "unet": UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(config / "unet")),
                "vae": AutoencoderKL.from_config(AutoencoderKL.load_config(config / "vae")),
                "text_encoder": CLIPTextModel(CLIPTextConfig.from_pretrained(config / "text_encoder")),
            }
            for part, module in parts.items():
                _fill(part, module.float(), tensors, path)
            return StableDiffusionPipeline.from_pretrained(
                config, **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False, local_files_only=True
            )
    except BadFile:
        raise
    except Exception as error:  # diffusers and transformers raise a dozen kinds; all mean that this folder cannot be used
        raise BadFile(f"the small files in {config} cannot be used: {first_line(error)}") from error


def _fill(part: str, module: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Put the file's weights into a part: all of them, and no other shape but a 1x1 convolution for a matrix.

    Raises:
        BadFile: one is missing, of another shape, or there are more of that part.
    """
    state = module.state_dict()
    names = original_names(part, state)
    found = {}
    for name, to in names.items():
        if to not in tensors:
            raise BadFile(f"{path} has no {to}; it is of another family than its configuration")
        value = tensors[to]
        if part == "vae" and value.ndim == 4 and state[name].ndim == 2:
            value = value[:, :, 0, 0]
        if value.shape != state[name].shape:
            raise BadFile(f"{path} has {to} of shape {tuple(value.shape)}, its configuration says {tuple(state[name].shape)}")
        found[name] = value.to(state[name].dtype)
    more = {k for k in tensors if k.startswith(PREFIX[part])} - set(names.values()) - {PREFIX[part] + "embeddings.position_ids"}
    if more:
        raise BadFile(
            f"{path} has {min(more)} and {len(more) - 1} others that its configuration does not know; name the right folder: config"
        )
    module.load_state_dict(found)
