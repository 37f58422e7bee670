"""Schema of the configuration files in a diffusers folder, which may be of unknown origin.

Sizes are bounded before anything is built from them, and only classes of this list are named, so
that a folder can neither run code nor ask for more memory than its weights take.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Self, TypeVar

import diffusers
from pydantic import BaseModel, Field, model_validator

from safegen.core.documents import check_file, read_json, read_json_object, validate
from safegen.core.errors import FileError
from safegen.core.tensor_files import check_pickle
from safegen.core.text import has_control
from safegen.models.checkpoint.component_schemas import (
    FLOW_SCHEDULERS,
    SCHEDULERS,
    Config,
    FlowSchedulerConfig,
    FluxTransformerConfig,
    Scheduler,
    SchedulerConfig,
    SD3TransformerConfig,
    T5Config,
    TextEncoderConfig,
    TokenizerConfig,
    UNetConfig,
    VaeConfig,
)

UNLOADED = ("safety_checker", "feature_extractor", "image_encoder")
"""Components that are copied and never loaded."""
CLIP_MODELS = ("CLIPTextModel", "CLIPTextModelWithProjection")
CLIP_TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")
T5_MODELS, T5_TOKENIZERS = ("T5EncoderModel",), ("T5Tokenizer", "T5TokenizerFast")
_CLIP = {"text_encoder": CLIP_MODELS, "tokenizer": CLIP_TOKENIZERS}
_SECOND_CLIP = {"text_encoder_2": CLIP_MODELS, "tokenizer_2": CLIP_TOKENIZERS}
LAYOUTS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "StableDiffusionPipeline": {"unet": ("UNet2DConditionModel",), **_CLIP},
    "StableDiffusionXLPipeline": {"unet": ("UNet2DConditionModel",), **_CLIP, **_SECOND_CLIP},
    "StableDiffusion3Pipeline": {
        "transformer": ("SD3Transformer2DModel",),
        **_CLIP,
        **_SECOND_CLIP,
        "text_encoder_3": T5_MODELS,
        "tokenizer_3": T5_TOKENIZERS,
    },
    "FluxPipeline": {
        "transformer": ("FluxTransformer2DModel",),
        **_CLIP,
        "text_encoder_2": T5_MODELS,
        "tokenizer_2": T5_TOKENIZERS,
    },
}
"""Pipeline class: classes of its components besides autoencoder and schedule."""
OPTIONAL = ("text_encoder_3", "tokenizer_3")
"""Components that may be null, together."""
LIBRARIES = {"unet": "diffusers", "transformer": "diffusers"}
"""Libraries of these components; those of others are transformers."""
DENOISER_SCHEMAS: Mapping[str, type[Config]] = {
    "UNet2DConditionModel": UNetConfig,
    "SD3Transformer2DModel": SD3TransformerConfig,
    "FluxTransformer2DModel": FluxTransformerConfig,
}
"""Denoiser class: schema of its configuration."""
Component = tuple[str, str]
NoComponent = tuple[str | None, str | None]
Schema = TypeVar("Schema", bound=BaseModel)


class FolderIndex(Config):
    """model_index.json: the class of the pipeline and of each component."""

    class_name: Literal[
        "StableDiffusionPipeline",
        "StableDiffusionXLPipeline",
        "StableDiffusion3Pipeline",
        "FluxPipeline",
    ] = Field(alias="_class_name")
    unet: Component | None = None
    transformer: Component | None = None
    vae: tuple[Literal["diffusers"], Literal["AutoencoderKL"]]
    scheduler: tuple[Literal["diffusers"], Scheduler]
    text_encoder: Component
    text_encoder_2: Component | None = None
    text_encoder_3: Component | NoComponent = (None, None)
    tokenizer: Component
    tokenizer_2: Component | None = None
    tokenizer_3: Component | NoComponent = (None, None)
    safety_checker: NoComponent = (None, None)
    feature_extractor: NoComponent = (None, None)
    image_encoder: NoComponent = (None, None)
    requires_safety_checker: bool | None = None

    @property
    def denoiser(self) -> str:
        """Name of the component that predicts: `unet` or `transformer`."""
        return next(iter(LAYOUTS[self.class_name]))

    @property
    def is_flow(self) -> bool:
        """Whether its models are trained by flow matching."""
        return self.class_name in FLOW_SCHEDULERS

    def class_of(self, component: str) -> str:
        """Return the class of a component, which is there."""
        return str(getattr(self, component)[1])

    @property
    def text_encoders(self) -> dict[str, str]:
        """Class of each text encoder that is there by component name."""
        names = [name for name in LAYOUTS[self.class_name] if name.startswith("text_encoder")]
        return {name: self.class_of(name) for name in names if any(getattr(self, name))}

    @property
    def absent(self) -> dict[str, None]:
        """Components of the pipeline that are null; diffusers wants them named."""
        names = LAYOUTS[self.class_name]
        return {name: None for name in OPTIONAL if name in names and not any(getattr(self, name))}

    @model_validator(mode="after")
    def _check_components(self) -> Self:
        for name, value in (self.model_extra or {}).items():
            if isinstance(value, list | tuple | dict) and value != [None, None]:
                raise ValueError(f"component {name[:80]!r} is not one of {self.class_name}")
        layout = LAYOUTS[self.class_name]
        for name in sorted({name for entries in LAYOUTS.values() for name in entries}):
            value = getattr(self, name)
            if name not in layout and any(value or ()):
                raise ValueError(f"component {name!r} is not one of {self.class_name}")
            library = LIBRARIES.get(name, "transformers")
            allowed: list[NoComponent] = [(library, kind) for kind in layout.get(name, ())]
            allowed += [(None, None)] if name in OPTIONAL or name not in layout else []
            if (value or (None, None)) not in allowed:
                shown = ["/".join(map(str, entry)) for entry in allowed]
                raise ValueError(
                    f"component {name!r} of {self.class_name} must be {' or '.join(shown)}, got "
                    f"{str(value)[:80]}"
                )
        if any(self.text_encoder_3) != any(self.tokenizer_3):
            raise ValueError("text_encoder_3 and tokenizer_3 must both be there, or neither")
        schedulers = FLOW_SCHEDULERS.get(self.class_name, SCHEDULERS)
        if self.scheduler[1] not in schedulers:
            raise ValueError(
                f"scheduler of {self.class_name} must be one of {', '.join(schedulers)}, got "
                f"{self.scheduler[1]}"
            )
        return self


class ShardIndex(BaseModel):
    """*.index.json: the file of each weight of a component."""

    weight_map: dict[str, str]

    @model_validator(mode="after")
    def _check_files(self) -> Self:
        for file in set(self.weight_map.values()):
            if PurePosixPath(file).name != file or has_control(file):
                raise ValueError(
                    f"weight_map must name files of its own folder, got {file[:80]!r}. "
                    "Do not trust this model"
                )
        return self


def check_configs(folder: Path, *, title: str | None = None) -> FolderIndex:
    """Check the configuration files of a diffusers folder, and return its model_index.json.

    Args:
        folder: the folder.
        title: what messages call it. Default: its path.

    Raises:
        FileError: one is missing, no regular file, no JSON, or breaks its schema.
    """
    if not (folder / "model_index.json").is_file():
        raise FileError(
            f"{title or folder} must be a diffusers folder, got one without model_index.json"
        )
    try:
        index = _read(FolderIndex, folder / "model_index.json")
        schedule = FlowSchedulerConfig if index.is_flow else SchedulerConfig
        kind = index.class_of(index.denoiser)
        for schema, name, class_name in (
            (DENOISER_SCHEMAS[kind], f"{index.denoiser}/config.json", kind),
            (VaeConfig, "vae/config.json", index.vae[1]),
            (schedule, "scheduler/scheduler_config.json", index.scheduler[1]),
        ):
            _check_types(_read(schema, folder / name), class_name, folder / name)
        for encoder, class_name in index.text_encoders.items():
            _check_tokenizer(folder, encoder, class_name)
    except FileError as error:
        if title is None:
            raise
        raise FileError(str(error).replace(str(folder), title)) from error
    return index


def _check_types(config: Config, class_name: str, path: Path) -> None:
    """Check the keys that a schema does not list against the defaults of a class of diffusers."""
    parameters = inspect.signature(getattr(diffusers, class_name).__init__).parameters
    for key, value in (config.model_extra or {}).items():
        if key in parameters and not _has_type(value, parameters[key]):
            raise FileError(
                f"{key} in {str(path)!r} must be of the type of {parameters[key].default!r}, got "
                f"{str(value)[:80]!r}"
            )


def _has_type(value: Any, parameter: inspect.Parameter) -> bool:
    """Return whether a JSON value has the type of a parameter's default, or one of such items."""
    default, annotation = parameter.default, str(parameter.annotation)
    if default is None or (isinstance(value, list) and isinstance(default, list | tuple)):
        return True
    if value is None:  # published folders write null for false
        return isinstance(default, bool) or "None" in annotation
    if isinstance(value, list):
        return "tuple" in annotation and all(_has_type(item, parameter) for item in value)
    return isinstance(value, int | float if isinstance(default, int | float) else type(default))


def _check_tokenizer(folder: Path, encoder: str, class_name: str) -> None:
    """Check the configuration of a text encoder and the files of its tokenizer."""
    config = _read(_text_schema(class_name), folder / encoder / "config.json")
    tokenizer = folder / encoder.replace("text_encoder", "tokenizer")
    for path in sorted(tokenizer.glob("*.json")):
        read_json(path)
    for pattern in ("*.txt", "*.model"):
        for path in tokenizer.glob(pattern):
            check_file(path)
    limit = _read(TokenizerConfig, tokenizer / "tokenizer_config.json").model_max_length
    positions = getattr(config, "max_position_embeddings", None)  # T5's are relative
    if limit is not None and positions is not None and limit > positions:
        raise FileError(
            f"model_max_length in {str(tokenizer)!r} must be at most {positions}, the positions of "
            f"the {encoder}, got {limit}"
        )


def _text_schema(class_name: str) -> type[TextEncoderConfig | T5Config]:
    """Return the schema of a text encoder's configuration."""
    return T5Config if class_name in T5_MODELS else TextEncoderConfig


def check_shards(folder: Path) -> set[str]:
    """Check the regular files and the shard lists in a component's folder.

    Returns:
        The files that lists name: diffusers prefers shards to one file, and takes any name.

    Raises:
        FileError: a file is a pipe or the like, or a list names a file elsewhere.
    """
    listed: set[str] = set()
    for path in sorted(folder.iterdir()):
        if path.name == "adapter_config.json":  # transformers would load the model it names
            raise FileError(
                f"{str(folder)!r} must hold weights, got an adapter of peft. Merge it, or use it "
                "as a LoRA"
            )
        if path.suffix in (".json", ".safetensors"):
            check_file(path)
        if path.suffix == ".bin":
            check_pickle(path)
        if ".index." in path.name and path.suffix == ".json":
            listed |= set(_read(ShardIndex, path).weight_map.values())
    return listed


def check_size(
    folder: Path, class_name: str, files: Sequence[str], *, title: str | None = None
) -> None:
    """Check that a component's files can hold what is allocated before they are read.

    transformers would allocate and initialize missing weights, and diffusers computes the position
    embedding of SD 3, which is stored as well.

    Args:
        folder: folder of a text encoder or a transformer.
        class_name: its class.
        files: names of the files with its weights.
        title: what messages call them. Default: the folder's path.

    Raises:
        FileError: they cannot.
    """
    schema = DENOISER_SCHEMAS.get(class_name) or _text_schema(class_name)
    config: Any = _read(schema, folder / "config.json")
    size = sum(check_file(folder / name) for name in files)
    if config.num_weights > size:
        raise FileError(
            f"{title or repr(str(folder))} must hold the weights that its config.json declares, "
            f"got {size} "
            f"bytes for {config.num_weights} weights. Get a complete copy"
        )


def _read(schema: type[Schema], path: Path) -> Schema:
    return validate(schema, read_json_object(path, constants=True), str(path))
