"""Schema of the configuration files in a diffusers folder, which may be of unknown origin.

Sizes are bounded before anything is built from them, and only classes of this list are named, so
that a folder can neither run code nor ask for more memory than its weights take.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, Self, TypeVar

import diffusers
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, Strict, model_validator
from transformers.tokenization_utils_base import LARGE_INTEGER

from safegen.core.documents import check_file, read_json, read_json_object, validate
from safegen.core.errors import FileError
from safegen.core.tensor_files import check_pickle
from safegen.core.text import has_control

UNLOADED = ("safety_checker", "feature_extractor", "image_encoder")
"""Components that are copied and never loaded."""
SCHEDULERS = sorted({s.name for s in KarrasDiffusionSchedulers} | {"LCMScheduler", "TCDScheduler"})
"""Schedule classes of diffusers that fit these pipelines."""
MAX_NUMBER = 2**20
"""Largest number in a configuration file, either sign."""


def _check_scheduler(name: str) -> str:
    if name not in SCHEDULERS:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULERS)}, got {name[:80]!r}")
    return name


Count = Annotated[int, Strict(), Field(ge=1, le=65536)]
Blocks = Annotated[tuple[Count, ...], Field(min_length=1, max_length=8)]
Depth = Annotated[int, Strict(), Field(ge=1, le=64)]
Names = Annotated[tuple[str, ...], Field(min_length=1, max_length=8)]
Side = Annotated[int, Strict(), Field(ge=1, le=4096)]
Epsilon = Annotated[float, Strict(), Field(gt=0, le=1)]
Beta = Annotated[float, Strict(), Field(ge=0, le=1)]
Scheduler = Annotated[str, AfterValidator(_check_scheduler)]
NoComponent = tuple[str | None, str | None]
Schema = TypeVar("Schema", bound=BaseModel)


class Config(BaseModel):
    """A configuration file. Keys that are not listed are passed on, with numbers in bounds.

    Those of diffusers' classes must also have the type of the default value.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    auto_map: None = None
    """Code of the file's author; never run."""
    quantization_config: None = None

    @model_validator(mode="before")
    @classmethod
    def _check_numbers(cls, value: Any) -> Any:
        for number in _numbers(value):
            if not abs(number) <= MAX_NUMBER:  # NaN too
                shown = str(number) if len(str(number)) <= 40 else f"{str(number)[:40]}..."
                raise ValueError(f"numbers must be at most {MAX_NUMBER}, got {shown}")
        return value


class UNetConfig(Config):
    """unet/config.json."""

    class_name: Literal["UNet2DConditionModel"] = Field("UNet2DConditionModel", alias="_class_name")
    sample_size: Side
    in_channels: Count = 4
    out_channels: Count = 4
    block_out_channels: Blocks
    layers_per_block: Depth | Annotated[tuple[Depth, ...], Field(max_length=8)] = 2
    down_block_types: Names
    up_block_types: Names
    cross_attention_dim: Count | Blocks
    attention_head_dim: Count | Blocks = 8
    transformer_layers_per_block: (
        Depth | Annotated[tuple[Depth | tuple[Depth, ...], ...], Field(max_length=8)]
    ) = 1
    reverse_transformer_layers_per_block: None = None
    norm_num_groups: Count | None = 32
    norm_eps: Epsilon = 1e-5
    dropout: Beta = 0.0


class VaeConfig(Config):
    """vae/config.json."""

    class_name: Literal["AutoencoderKL"] = Field("AutoencoderKL", alias="_class_name")
    sample_size: Side = 32
    latent_channels: Count = 4
    block_out_channels: Blocks
    down_block_types: Names
    up_block_types: Names
    layers_per_block: Depth = 1
    norm_num_groups: Count = 32
    scaling_factor: Annotated[float, Strict(), Field(gt=0, le=1000)] = 0.18215
    shift_factor: Annotated[float, Strict()] | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None


class TextEncoderConfig(Config):
    """text_encoder/config.json."""

    hidden_size: Count = 512
    intermediate_size: Count = 2048
    num_hidden_layers: Depth = 12
    num_attention_heads: Count = 8
    max_position_embeddings: Side = 77
    vocab_size: Annotated[int, Strict(), Field(ge=1, le=MAX_NUMBER)] = 49408
    layer_norm_eps: Epsilon = 1e-5

    @property
    def num_weights(self) -> int:
        """Number of the weights in its matrices."""
        width = self.hidden_size
        block = 4 * width * width + 2 * width * self.intermediate_size
        return self.num_hidden_layers * block + self.vocab_size * width


class SchedulerConfig(Config):
    """scheduler/scheduler_config.json."""

    class_name: Scheduler | None = Field(None, alias="_class_name")
    num_train_timesteps: Annotated[int, Strict(), Field(ge=1, le=100_000)] = 1000
    beta_start: Beta = 0.0001
    beta_end: Beta = 0.02
    trained_betas: tuple[Beta, ...] | None = None
    steps_offset: Annotated[int, Strict(), Field(ge=0, le=1000)] = 0
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = "epsilon"

    @model_validator(mode="before")
    @classmethod
    def _remove_infinity(cls, value: Any) -> Any:
        """Remove the default of DPM-Solver, the one infinite number that diffusers writes."""
        if isinstance(value, dict) and value.get("lambda_min_clipped") == -math.inf:
            return {k: v for k, v in value.items() if k != "lambda_min_clipped"}
        return value


class TokenizerConfig(Config):
    """tokenizer/tokenizer_config.json."""

    model_max_length: Side | None = None
    """None: no limit is stated, and the tokenizer gets that of the text encoder."""

    @model_validator(mode="before")
    @classmethod
    def _read_no_limit(cls, value: Any) -> Any:
        """Replace the number by which transformers means no limit, 1e30, by None."""
        limit = value.get("model_max_length") if isinstance(value, dict) else None
        if isinstance(limit, int | float) and limit > LARGE_INTEGER:
            return value | {"model_max_length": None}
        return value


class FolderIndex(Config):
    """model_index.json: the class of the pipeline and of each component."""

    class_name: Literal["StableDiffusionPipeline", "StableDiffusionXLPipeline"] = Field(
        alias="_class_name"
    )
    unet: tuple[Literal["diffusers"], Literal["UNet2DConditionModel"]]
    vae: tuple[Literal["diffusers"], Literal["AutoencoderKL"]]
    scheduler: tuple[Literal["diffusers"], Scheduler]
    text_encoder: tuple[
        Literal["transformers"], Literal["CLIPTextModel", "CLIPTextModelWithProjection"]
    ]
    text_encoder_2: (
        tuple[Literal["transformers"], Literal["CLIPTextModel", "CLIPTextModelWithProjection"]]
        | None
    ) = None
    tokenizer: tuple[Literal["transformers"], Literal["CLIPTokenizer", "CLIPTokenizerFast"]]
    tokenizer_2: (
        tuple[Literal["transformers"], Literal["CLIPTokenizer", "CLIPTokenizerFast"]] | None
    ) = None
    safety_checker: NoComponent = (None, None)
    feature_extractor: NoComponent = (None, None)
    image_encoder: NoComponent = (None, None)
    requires_safety_checker: bool | None = None

    @property
    def text_encoders(self) -> dict[str, str]:
        """Class of each text encoder by component name."""
        classes: dict[str, str] = {"text_encoder": self.text_encoder[1]}
        if self.text_encoder_2:
            classes["text_encoder_2"] = self.text_encoder_2[1]
        return classes

    @model_validator(mode="after")
    def _check_components(self) -> Self:
        for name, value in (self.model_extra or {}).items():
            if isinstance(value, list | tuple | dict) and value != [None, None]:
                raise ValueError(f"component {name[:80]!r} is not one of {self.class_name}")
        is_xl = self.class_name == "StableDiffusionXLPipeline"
        if is_xl != (self.text_encoder_2 is not None) or is_xl != (self.tokenizer_2 is not None):
            needed = "is required" if is_xl else "is not one"
            raise ValueError(f"text_encoder_2 with tokenizer_2 {needed} of {self.class_name}")
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
        for schema, name, class_name in (
            (UNetConfig, "unet/config.json", index.unet[1]),
            (VaeConfig, "vae/config.json", index.vae[1]),
            (SchedulerConfig, "scheduler/scheduler_config.json", index.scheduler[1]),
        ):
            _check_types(_read(schema, folder / name), class_name, folder / name)
        for encoder in index.text_encoders:
            _check_tokenizer(folder, encoder)
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


def _check_tokenizer(folder: Path, encoder: str) -> None:
    """Check the configuration of a text encoder and the files of its tokenizer."""
    config = _read(TextEncoderConfig, folder / encoder / "config.json")
    tokenizer = folder / encoder.replace("text_encoder", "tokenizer")
    for path in sorted(tokenizer.glob("*.json")):
        read_json(path)
    for path in tokenizer.glob("*.txt"):
        check_file(path)
    limit = _read(TokenizerConfig, tokenizer / "tokenizer_config.json").model_max_length
    if limit is not None and limit > config.max_position_embeddings:
        raise FileError(
            f"model_max_length in {str(tokenizer)!r} must be at most "
            f"{config.max_position_embeddings}, the positions of the {encoder}, got {limit}"
        )


def check_shards(folder: Path) -> None:
    """Check the regular files and the shard lists in a component's folder.

    Raises:
        FileError: a file is a pipe or the like, or a list names a file elsewhere.
    """
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
        if path.name.endswith(".index.json"):
            _read(ShardIndex, path)


def check_size(folder: Path) -> None:
    """Check that a text encoder's files can hold the weights that its configuration declares.

    transformers would allocate and initialize the missing ones.

    Raises:
        FileError: they cannot.
    """
    config = _read(TextEncoderConfig, folder / "config.json")
    size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    if config.num_weights > size:
        raise FileError(
            f"{str(folder)!r} must hold the weights that its config.json declares, got {size} "
            f"bytes for {config.num_weights} weights. Get a complete copy"
        )


def _read(schema: type[Schema], path: Path) -> Schema:
    return validate(schema, read_json_object(path, constants=True), str(path))


def _numbers(value: Any) -> Iterator[int | float]:
    """Yield every number in a JSON value."""
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _numbers(item)
    elif isinstance(value, int | float):
        yield value
