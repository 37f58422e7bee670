"""Reading of one-file checkpoints in the layouts of the models' publishers."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
from accelerate import init_empty_weights
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from pydantic import BaseModel, Field
from transformers.models.clip.configuration_clip import CLIPTextConfig
from transformers.models.clip.modeling_clip import CLIPTextModel, CLIPTextModelWithProjection

from safegen.core.documents import parse_json, validate
from safegen.core.errors import FileError
from safegen.core.files import writing
from safegen.core.quiet import silence_libraries
from safegen.models.checkpoint import configs
from safegen.models.checkpoint.diffusers_folder import SDXL, check_schedule, pipeline_class
from safegen.models.checkpoint.folder_schema import check_configs
from safegen.models.checkpoint.key_map import PREFIX
from safegen.models.checkpoint.metadata import METADATA_KEY, CheckpointMetadata, parse_metadata
from safegen.models.checkpoint.single_file import (
    CONFIGS_KEY,
    EDM_PREFIXES,
    HEADER_PREDICTIONS,
    ZERO_SNR_ABAR,
    ZERO_SNR_TENSOR,
    SingleFile,
    load_weights,
    open_single_file,
)
from safegen.models.checkpoint.transformer_file import read_transformer_file, transformer_in
from safegen.models.model import Pipeline

FILE_NAME = r"^[A-Za-z0-9_-]{1,40}(/[A-Za-z0-9_-]{1,40})?\.(json|txt)$"
"""Pattern of the configuration files in a header; none lies elsewhere than one folder deep."""
NAME_FOLDER = "Name the model's own diffusers folder (--config, or in a recipe)"


class HeaderConfigs(BaseModel):
    """Configuration files in a checkpoint's header: text by name."""

    files: dict[Annotated[str, Field(pattern=FILE_NAME)], str] = Field(max_length=50)


def read_single_file(
    path: Path,
    *,
    config: Path | None = None,
    dtype: torch.dtype = torch.float32,
    allow_pickle: bool = False,
) -> tuple[Pipeline, CheckpointMetadata | None]:
    """Return the pipeline in a one-file checkpoint, and its metadata if safegen wrote it.

    Nothing is downloaded.

    Args:
        path: .safetensors, or with `allow_pickle` .ckpt.
        config: a diffusers folder of the same family, for its configuration files and vocabulary;
            that of SD 3 and FLUX also for components that the file lacks, and required.
            Default: those in the header of a file that safegen wrote, or those of the published
            model with these weight names.
        dtype: type of the weights.
        allow_pickle: also open pickles. They are opened with `weights_only=True`, in which torch
            runs no code of the file.

    Raises:
        FileError: the file cannot be read, has an unknown architecture, or contradicts its
            configuration; or it is an SD 2.x that does not state what it predicts.
    """
    checkpoint = open_single_file(path, allow_pickle)
    if (architecture := transformer_in(checkpoint)) is not None:
        return read_transformer_file(
            checkpoint, architecture, config=config, dtype=dtype, allow_pickle=allow_pickle
        )
    if edm := sorted(name for name in checkpoint.tensors if name.startswith(EDM_PREFIXES)):
        raise FileError(
            f"schedule of {path} must not be EDM, got the tensor {edm[0]}. Use another model"
        )
    with tempfile.TemporaryDirectory() as tmp:
        title = None if config is not None else f"header of {path}"
        if config is not None:
            hint = "Name the folder of this very model (--config, or in a recipe)"
        else:
            config = Path(tmp)
            if CONFIGS_KEY in checkpoint.header:
                hint = "The file was changed after it was written; export it again"
                _write_header_configs(checkpoint, config)
            else:
                published = _write_published_configs(checkpoint, config)
                hint = f"The configuration is that of the published {published}. {NAME_FOLDER}"
        class_name = check_configs(config, title=title).class_name
        try:
            pipeline = _build_pipeline(checkpoint, config, class_name, hint, dtype)
        except FileError:
            raise
        except Exception as error:  # diffusers and transformers raise a dozen types
            reason = " ".join(str(error).split()).replace(str(config), title or str(config))
            raise FileError(
                f"the configuration files in {title or config} cannot be used: {reason[:300]}"
            ) from error
        _check_scheduler(checkpoint, pipeline.scheduler)
    return pipeline, parse_metadata(checkpoint.header.get(METADATA_KEY, ""))


def _write_header_configs(checkpoint: SingleFile, folder: Path) -> None:
    """Write the configuration files in a checkpoint's header to a folder."""
    source = f"{CONFIGS_KEY} of {checkpoint.path}"
    entries = parse_json(checkpoint.header[CONFIGS_KEY], source)
    files = validate(HeaderConfigs, {"files": entries}, source).files
    for name, text in files.items():
        target = folder / name
        with writing(target):
            target.parent.mkdir(exist_ok=True)
            target.write_text(text, encoding="utf-8")
    for tokenizer in {"tokenizer", "tokenizer_2"} & {name.partition("/")[0] for name in files}:
        configs.add_vocabulary(folder / tokenizer)


def _write_published_configs(checkpoint: SingleFile, folder: Path) -> str:
    """Write the configuration files of the published model with these names; return its title."""
    path, tensors = checkpoint.path, checkpoint.tensors
    architecture = configs.detect_architecture(tensors)
    if architecture is None:
        raise FileError(
            f"{path} must hold a whole model in the original layout of "
            f"{', '.join(configs.TITLES.values())}, got other weights. "
            "A refiner is not read; a LoRA goes with --lora"
        )
    title = configs.TITLES[architecture]
    for component, prefix in PREFIX[architecture].items():
        if not any(name.startswith(prefix) for name in tensors):
            raise FileError(f"{path} lacks the {component} of {title}. Get a complete file")
    conv_in = tensors.get(PREFIX[architecture]["unet"] + "input_blocks.0.0.weight")
    channels = None if conv_in is None else conv_in.shape[1] if len(conv_in.shape) > 1 else 0
    if channels not in (None, 4):
        raise FileError(
            f"input channels of {path} must be 4, got {channels}. "
            "Inpainting and depth models are not read"
        )
    stated = checkpoint.architecture_name
    if stated and stated not in HEADER_PREDICTIONS[architecture]:
        raise FileError(
            f"architecture in the header of {path} must be {title}, as its weights are, got "
            f"{stated[:80]!r}. {NAME_FOLDER}"
        )
    prediction = checkpoint.prediction
    if prediction is None and architecture == "sd2":
        raise FileError(
            f"{path} must state whether it predicts epsilon or v, since SD 2.x has both kinds. "
            f"{NAME_FOLDER}"
        )
    configs.write_config_files(
        architecture,
        folder,
        prediction=prediction or "epsilon",
        zero_snr=ZERO_SNR_TENSOR in tensors,
    )
    return title


def _check_scheduler(checkpoint: SingleFile, scheduler: Any) -> None:
    """Check that the configured schedule is the one that a file states."""
    configured = str(scheduler.config["prediction_type"])
    if checkpoint.prediction not in (None, configured):
        raise FileError(
            f"prediction in the configuration must be {checkpoint.prediction}, which "
            f"{checkpoint.path} states, got {configured}. {NAME_FOLDER}"
        )
    if (
        ZERO_SNR_TENSOR in checkpoint.tensors
        and float(scheduler.alphas_cumprod[-1]) >= ZERO_SNR_ABAR
    ):
        raise FileError(
            "schedule in the configuration must end in pure noise (rescale_betas_zero_snr), which "
            f"{checkpoint.path} states. {NAME_FOLDER}"
        )


def _build_pipeline(
    checkpoint: SingleFile, config: Path, class_name: str, hint: str, dtype: torch.dtype
) -> Pipeline:
    """Return a pipeline built from configuration files, with a file's weights in it."""
    with silence_libraries():
        components = _empty_components(config, class_name)
        linear = components["unet"].config.use_linear_projection
        architecture = "sdxl" if class_name == SDXL else "sd2" if linear else "sd1"
        for component, module in components.items():
            load_weights(checkpoint, architecture, component, module.to(dtype), hint)
        cls, options = pipeline_class(class_name)
        pipeline: Pipeline = cls.from_pretrained(
            config, **components, **options, local_files_only=True
        )
        check_schedule(pipeline.scheduler)
    return pipeline


def _empty_components(config: Path, class_name: str) -> dict[str, Any]:
    """Return a pipeline's components on the meta device: their weights come from the file."""
    with init_empty_weights(include_buffers=False):
        components: dict[str, Any] = {
            "unet": UNet2DConditionModel.from_config(
                UNet2DConditionModel.load_config(config / "unet")
            ),
            "vae": AutoencoderKL.from_config(AutoencoderKL.load_config(config / "vae")),
            "text_encoder": CLIPTextModel(CLIPTextConfig.from_pretrained(config / "text_encoder")),
        }
        if class_name == SDXL:
            components["text_encoder_2"] = CLIPTextModelWithProjection(
                CLIPTextConfig.from_pretrained(config / "text_encoder_2")
            )
    return components
