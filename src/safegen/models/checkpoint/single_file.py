"""One-file checkpoints in the original Stable Diffusion layout: what A1111, ComfyUI and InvokeAI open. SD 1.x, 2.x and XL, in and out."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.models.clip.configuration_clip import CLIPTextConfig
from transformers.models.clip.modeling_clip import CLIPTextModel, CLIPTextModelWithProjection

from safegen.core.errors import ConfigError, FileError
from safegen.core.files import atomic_write
from safegen.models.checkpoint import configs as builds
from safegen.models.checkpoint.diffusers_folder import (
    forget_places,
    parse_metadata,
    save_vocabulary,
)
from safegen.models.checkpoint.key_map import PREFIX, original_names, pack, unpack
from safegen.models.model import (
    DTYPES,
    FAMILIES,
    XL,
    Model,
    finish_loading,
    first_line,
    silence_libraries,
    weight_digests,
)

CONFIGS = "safegen_configs"
"""Key of the header that holds the small files of a pipeline (configurations, vocabulary), so that the file opens by itself."""
ARCHITECTURES = {
    "sd1": "stable-diffusion-v1",
    "sd2": "stable-diffusion-v2",
    "sdxl": "stable-diffusion-xl-v1-base",
}
"""Build: what the header calls it, after the ModelSpec of Stability AI."""
V_PRED, ZTSNR, SPEC = "v_pred", "ztsnr", "modelspec.prediction_type"
"""Tensors that ComfyUI looks for, and the header's key: that a file predicts v, and that its schedule ends in pure noise."""
PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}
"""What the header may say of it, in small letters, and what the library calls that."""
SAID: dict[str, dict[str, str | None]] = {
    "sd1": {"stable-diffusion-v1": None},
    "sd2": {
        "stable-diffusion-v2": None,
        "stable-diffusion-v2-512": "epsilon",
        "stable-diffusion-v2-768-v": "v_prediction",
    },
    "sdxl": {"stable-diffusion-xl-v1-base": None},
}
"""Build: what headers call it, ours and those of other tools, and what that says of the prediction."""
PURE = 1e-4
"""Abar below which a latent is taken for pure noise.

The published schedules end at 4.7e-3, rescaled ones at 6e-8 or 0.
"""
EDM = ("edm_mean", "edm_std", "edm_vpred.")
"""How tensors begin that mark the schedule of Playground 2.5 and CosXL."""
OLD, TODAY = "cond_stage_model.transformer.", "cond_stage_model.transformer.text_model."
"""How the text encoder's weights of SD 1.x begin in merges of 2022, and in the published file."""
TOKENIZERS = ("tokenizer", "tokenizer_2")
PICKLES = {".ckpt", ".pt", ".pth", ".bin"}


def save_single_file(
    model: Model, out: Path, *, dtype: str = "fp16", facts: Mapping[str, Any] | None = None
) -> None:
    """Write a model as one safetensors file in the original layout.

    Args:
        model: an SD 1.x, 2.x or XL model, with or without patches on it.
        out: the new file.
        dtype: type of the weights in the file: fp16 (what most web UIs want), bf16 or fp32.
        facts: what else the header says, but for the hashes of what is written: the provenance of
            the edit.

    Raises:
        FileError: `out` exists or cannot be written.
        ConfigError: no such dtype, weights that the dtype cannot hold or the layout has no place
            for, or a prediction that it cannot say.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    build, tensors, known = build_of(model.pipeline), _markers(model), []
    for part in PREFIX[build]:
        state = {}
        for name, value in getattr(model.pipeline, part).state_dict().items():
            state[name] = value.detach().cpu().to(DTYPES[dtype])
            if not bool(state[name].isfinite().all()):
                raise ConfigError(f"{part}.{name} does not fit into {dtype}; choose bf16 or fp32")
        known += weight_digests(state) if facts and part == "unet" else []
        try:
            tensors |= {
                name: value.contiguous() for name, value in pack(build, part, state).items()
            }
        except ValueError as error:
            raise ConfigError(
                f"{model.name!r} cannot be written as one file: {error}; write a folder: safegen apply"
            ) from error
    header = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": ARCHITECTURES[build],
    }
    header |= {
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": out.stem,
    }
    header |= {SPEC: "v" if model.prediction == "v_prediction" else "epsilon"} | _small_files(model)
    if facts:
        header["safegen"] = json.dumps(dict(facts) | {"weights": known}, sort_keys=True)
    with atomic_write(out) as tmp:
        try:
            save_file(tensors, tmp, metadata=header)
        except SafetensorError as error:
            raise FileError(f"{out} cannot be written: {error}") from error


def build_of(pipeline: Any) -> str:
    """Return which layout a pipeline has in one file, a key of `layout.PREFIX`: SD 2.x is told by its linear projections."""
    if hasattr(pipeline, "text_encoder_2"):
        return "sdxl"
    return "sd2" if pipeline.unet.config.use_linear_projection else "sd1"


def _markers(model: Model) -> dict[str, Tensor]:
    """Return the tensors that say what weights cannot: prediction of v, and a schedule that ends in pure noise.

    Raises:
        ConfigError: the model predicts something that files of this layout cannot say.
    """
    if model.prediction not in ("epsilon", "v_prediction"):
        raise ConfigError(
            f"{model.name!r} predicts {model.prediction}, and one file can say epsilon or v_prediction only; write a folder"
        )
    out = {V_PRED: torch.zeros(1)} if model.prediction == "v_prediction" else {}
    return out | ({ZTSNR: torch.zeros(1)} if float(model.alphas_cumprod()[-1]) < PURE else {})


def _small_files(model: Model) -> dict[str, str]:
    """Return the header's entry of a pipeline's small files, but for CLIP's vocabulary, which we bring."""
    with tempfile.TemporaryDirectory() as folder, silence_libraries():
        here, pipe = Path(folder), model.pipeline
        pipe.save_config(here)
        pipe.unet.save_config(here / "unet")
        pipe.vae.save_config(here / "vae")
        for tail in _tails(pipe):
            getattr(pipe, f"text_encoder{tail}").config.save_pretrained(
                here / f"text_encoder{tail}"
            )
            getattr(pipe, f"tokenizer{tail}").save_pretrained(here / f"tokenizer{tail}")
            if not builds.forget_vocabulary(here / f"tokenizer{tail}"):
                save_vocabulary(here / f"tokenizer{tail}")
        pipe.scheduler.save_pretrained(here / "scheduler")
        forget_places(here)
        files = {
            p.relative_to(here).as_posix(): p.read_text(encoding="utf-8")
            for p in sorted(here.rglob("*"))
            if p.is_file()
        }
    return {CONFIGS: json.dumps(files)}


def _tails(pipeline: Any) -> tuple[str, ...]:
    """Return how the names of a pipeline's text encoders and tokenizers end."""
    return ("", "_2") if hasattr(pipeline, "text_encoder_2") else ("",)


def load_single_file(
    path: Path,
    *,
    config: Path | None = None,
    dtype: str = "fp32",
    device: str = "cpu",
    allow_pickle: bool = False,
) -> Model:
    """Open a one-file checkpoint of SD 1.x, 2.x or XL. Nothing is fetched.

    Args:
        path: .safetensors, or with `allow_pickle` .ckpt.
        config: a diffusers folder of the same family, whose configurations and vocabulary are used.
            Without, those in the header of a file that we wrote, or those of the published build
            that the weights' names tell.
        dtype: fp32, bf16 or fp16.
        device: a torch device.
        allow_pickle: also open pickles. They are read as weights only, which runs no code of
            theirs, as far as torch keeps that promise.

    Raises:
        FileError: not readable, of no family that is read, or with configurations that contradict
            what the file says it predicts; or none is given and an SD 2.x file does not say what it
            predicts.
    """
    tensors, header = _read(path, allow_pickle)
    if strange := sorted(k for k in tensors if k.startswith(EDM)):
        raise FileError(
            f"{path} is trained on the EDM schedule (it has {strange[0]}), which is not read; draw with a model that is not"
        )
    with tempfile.TemporaryDirectory() as folder:
        if config is not None:
            way = "name the folder of this very model (--config, or in a recipe)"
        elif CONFIGS in header:
            way = "the file was changed after it was written; make it again"
            config = Path(folder)
            _unpack(header[CONFIGS], config, path)
        else:
            config = Path(folder)
            build = _bring(tensors, header, config, path)
            way = f"the configuration is that of the published {build}: name the model's own diffusers folder (--config, or in a recipe)"
        if not (config / "model_index.json").is_file():
            raise FileError(f"{config} is not a diffusers folder: it has no model_index.json")
        pipeline = _assemble(tensors, config, path, way)
        _agree(pipeline.scheduler, tensors, header, path)
        with silence_libraries():
            pipeline.to(dtype=DTYPES[dtype])
    model = finish_loading(str(path), pipeline, device)
    model.set_metadata(parse_metadata(header.get("safegen", "{}")))
    return model


def _read(path: Path, allow_pickle: bool) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return a file's tensors and header.

    Raises:
        FileError: it cannot be read, or is a pickle that was not asked for.
    """
    if path.suffix in PICKLES and not allow_pickle:
        raise FileError(
            f"{path} is a pickle, which can run code of whoever made it; get it as safetensors, or say --allow-pickle if you trust it"
        )
    header: dict[str, str] = {}
    try:
        if path.suffix in PICKLES:
            found = torch.load(path, map_location="cpu", weights_only=True)
            found = found.get("state_dict", found)
            tensors = {k: v for k, v in found.items() if isinstance(v, Tensor)}
        else:
            with safe_open(path, framework="pt") as file:
                tensors, header = (
                    {k: file.get_tensor(k) for k in file.keys()},
                    file.metadata() or {},
                )
    except Exception as error:  # torch's unpickler raises a dozen kinds
        raise FileError(
            f"{path} cannot be read as a one-file checkpoint: {first_line(error)}"
        ) from error
    if not any(k.startswith(TODAY) for k in tensors):
        tensors = {
            TODAY + k.removeprefix(OLD) if k.startswith(OLD) else k: v for k, v in tensors.items()
        }
    return tensors, header


def _unpack(text: str, folder: Path, path: Path) -> None:
    try:
        files = {name: str(value) for name, value in json.loads(text).items()}
    except (json.JSONDecodeError, AttributeError) as error:
        raise FileError(
            f"{path} is damaged: its header's {CONFIGS} is not JSON; name a folder instead (--config, or in a recipe)"
        ) from error
    for name, value in files.items():
        place = folder / name
        if not place.resolve().is_relative_to(folder.resolve()):
            raise FileError(
                f"{path} is not to be trusted: its header names the file {name!r}, outside its folder"
            )
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(value, encoding="utf-8")
        except OSError as error:  # one name is a file and a folder
            raise FileError(
                f"{path} is damaged: its header's {CONFIGS} cannot be laid out ({error.strerror}: {name!r})"
            ) from error
    for tokenizer in TOKENIZERS:
        if tokenizer in {name.partition("/")[0] for name in files}:
            builds.add_vocabulary(folder / tokenizer)


def _bring(
    tensors: Mapping[str, Tensor], header: Mapping[str, str], folder: Path, path: Path
) -> str:
    """Write the small files of the published build that a file's names tell, and return what it is called.

    Raises:
        FileError: they tell none, a part is missing, it says or shows that it is a variant
            (inpainting, few steps), or it is an SD 2.x, of which there are two kinds, and does not
            say which.
    """
    build = builds.detect_architecture(tensors)
    if build is None:
        raise FileError(
            f"{path} holds no whole model in the original layout of {', '.join(builds.TITLES.values())} (refiners are none); "
            "a LoRA goes beside a model: --lora"
        )
    for part, prefix in PREFIX[build].items():
        if not any(name.startswith(prefix) for name in tensors):
            raise FileError(
                f"{path} lacks a whole part of {builds.TITLES[build]}, the {part}; get a file that holds it"
            )
    channels = (
        tensors[first].shape[1]
        if (first := PREFIX[build]["unet"] + "input_blocks.0.0.weight") in tensors
        else 4
    )
    if channels != 4:
        raise FileError(
            f"{path} takes {channels} channels, as inpainting and depth models do; those that draw from text alone are read"
        )
    named = header.get("modelspec.architecture", "").lower()
    if named and named not in SAID[build]:
        raise FileError(
            f"{path} says that it is a {named}, and its weights are {builds.TITLES[build]}'s, whose published schedule may not be its own; "
            "name the model's own diffusers folder (--config, or in a recipe)"
        )
    said = _predicts(tensors, header, path)
    if said is None and build == "sd2":
        raise FileError(
            f"{path} does not say whether it predicts epsilon or v, and SD 2.x has both kinds; "
            "name a diffusers folder of the same kind, whose small files go with it (--config, or in a recipe)"
        )
    builds.write_small_files(build, folder, prediction=said or "epsilon", zero_snr=ZTSNR in tensors)
    return builds.TITLES[build]


def _predicts(tensors: Mapping[str, Tensor], header: Mapping[str, str], path: Path) -> str | None:
    """Return what a file says that it predicts, if it does.

    Raises:
        FileError: it says something that is not read.
    """
    if V_PRED in tensors:
        return "v_prediction"
    said = header.get(SPEC, "").lower()
    if said and said not in PREDICTIONS:
        raise FileError(
            f"{path} says that it predicts {said!r}; models of {', '.join(PREDICTIONS)} are read"
        )
    return PREDICTIONS.get(said) or SAID["sd2"].get(
        header.get("modelspec.architecture", "").lower()
    )


def _agree(
    scheduler: Any, tensors: Mapping[str, Tensor], header: Mapping[str, str], path: Path
) -> None:
    """Refuse configurations under which the file's weights would mean something else.

    Raises:
        FileError: they predict otherwise, or their schedule does not end in pure noise where the file
            says so.
    """
    said, own = _predicts(tensors, header, path), str(scheduler.config["prediction_type"])
    if said not in (None, own):
        raise FileError(
            f"{path} says that it predicts {said}, its configuration says {own}; name a folder of a model that does: config"
        )
    if ZTSNR in tensors and float(scheduler.alphas_cumprod[-1]) >= PURE:
        raise FileError(
            f"{path} says that its schedule ends in pure noise (ztsnr), its configuration's does not (rescale_betas_zero_snr, of a "
            "scheduler that knows it); name a folder whose scheduler does: config"
        )


def _assemble(tensors: Mapping[str, Tensor], config: Path, path: Path, way: str) -> Any:
    """Return a pipeline built from configurations, with the file's weights in it.

    Raises:
        FileError: they do not go together; `way` says what the user can do about it.
    """
    try:
        index = json.loads((config / "model_index.json").read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or not UTF-8
        raise FileError(
            f"the small files in {config} cannot be used: model_index.json is not JSON ({first_line(error)})"
        ) from error
    family = index.get("_class_name")
    if family not in FAMILIES:
        raise FileError(
            f"{config} is a {family}; one-file checkpoints of {' and '.join(FAMILIES)} are read"
        )
    try:
        with silence_libraries():
            with init_empty_weights(
                include_buffers=False
            ):  # nothing is drawn only to be overwritten
                parts: dict[str, Any] = {
                    "unet": UNet2DConditionModel.from_config(
                        UNet2DConditionModel.load_config(config / "unet")
                    ),
                    "vae": AutoencoderKL.from_config(AutoencoderKL.load_config(config / "vae")),
                    "text_encoder": CLIPTextModel(
                        CLIPTextConfig.from_pretrained(config / "text_encoder")
                    ),
                }
                if family == XL:
                    parts["text_encoder_2"] = CLIPTextModelWithProjection(
                        CLIPTextConfig.from_pretrained(config / "text_encoder_2")
                    )
            build = (
                "sdxl"
                if family == XL
                else "sd2"
                if parts["unet"].config.use_linear_projection
                else "sd1"
            )
            for part, module in parts.items():
                _fill(build, part, module.float(), tensors, path, way)
            kind, options = FAMILIES[family]
            return kind.from_pretrained(config, **parts, **options, local_files_only=True)
    except FileError:
        raise
    except Exception as error:  # diffusers and transformers raise a dozen kinds; all mean that this folder cannot be used
        raise FileError(
            f"the small files in {config} cannot be used: {first_line(error)}"
        ) from error


def _fill(
    build: str, part: str, module: nn.Module, tensors: Mapping[str, Tensor], path: Path, way: str
) -> None:
    """Put the file's weights into a part: all of them, and no other shape but what the layout has otherwise.

    Raises:
        FileError: one is missing, of another shape, or there are more of that part.
    """
    state = module.state_dict()
    names = original_names(build, part, state)
    found = {}
    for name, to in names.items():
        if to not in tensors:
            raise FileError(f"{path} has no {to}, which its configuration wants; {way}")
        value = unpack(build, part, name, tensors[to], state[name].shape)
        if value.shape != state[name].shape:
            raise FileError(
                f"{path} has {to} of shape {tuple(tensors[to].shape)}, its configuration says {tuple(state[name].shape)} for {name}; {way}"
            )
        found[name] = value.to(
            state[name].dtype, copy=True
        ).contiguous()  # out of the file, whose alignment decides how sums are rounded
    prefix = PREFIX[build][part]
    more = {k for k in tensors if k.startswith(prefix)} - set(names.values())
    more = {k for k in more if not _idle(build, part, k.removeprefix(prefix), module)}
    if more:
        raise FileError(
            f"{path} has {min(more)} and {len(more) - 1} others that its configuration does not know; {way}"
        )
    module.load_state_dict(found, assign=True)


def _idle(build: str, part: str, name: str, module: Any) -> bool:
    """Return whether a text encoder's tensor decides no picture.

    Buffers; the logit scale; and of SD 2.x the projection and the block after the last that is
    read: it draws with the one before the last.
    """
    if name in ("embeddings.position_ids", "logit_scale", "attn_mask"):
        return True
    last = (
        f"transformer.resblocks.{module.config.num_hidden_layers}."
        if (build, part) == ("sd2", "text_encoder")
        else None
    )
    return last is not None and (name == "text_projection" or name.startswith(last))
