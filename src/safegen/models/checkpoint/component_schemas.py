"""Schemas of the configuration files of a pipeline's components, which may be of unknown origin."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, Strict, model_validator
from transformers.tokenization_utils_base import LARGE_INTEGER

SCHEDULERS = sorted({s.name for s in KarrasDiffusionSchedulers} | {"LCMScheduler", "TCDScheduler"})
"""Schedule classes of diffusers that fit diffusion models."""
FLOW_SCHEDULERS = {
    "StableDiffusion3Pipeline": (
        "FlowMatchEulerDiscreteScheduler",
        "FlowMatchHeunDiscreteScheduler",
        "FlowMatchLCMScheduler",
    ),
    "FluxPipeline": ("FlowMatchEulerDiscreteScheduler", "FlowMatchLCMScheduler"),
}
"""Pipeline class of flow matching: its schedule classes. FLUX's sets the steps, Heun's cannot."""
MAX_NUMBER = 2**20
"""Largest number in a configuration file, either sign."""


def _check_scheduler(name: str) -> str:
    known = [*SCHEDULERS, *FLOW_SCHEDULERS["StableDiffusion3Pipeline"]]
    if name not in known:
        raise ValueError(f"schedule must be one of {', '.join(known)}, got {name[:80]!r}")
    return name


Count = Annotated[int, Strict(), Field(ge=1, le=65536)]
Blocks = Annotated[tuple[Count, ...], Field(min_length=1, max_length=8)]
Depth = Annotated[int, Strict(), Field(ge=1, le=64)]
Names = Annotated[tuple[str, ...], Field(min_length=1, max_length=8)]
Side = Annotated[int, Strict(), Field(ge=1, le=4096)]
Epsilon = Annotated[float, Strict(), Field(gt=0, le=1)]
Beta = Annotated[float, Strict(), Field(ge=0, le=1)]
Scheduler = Annotated[str, AfterValidator(_check_scheduler)]
Shift = Annotated[float, Field(strict=True, gt=0, le=100)]


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


class TransformerConfig(Config):
    """transformer/config.json, what SD 3 and FLUX have in common."""

    patch_size: Annotated[int, Strict(), Field(ge=1, le=16)] = 1
    in_channels: Count = 16
    out_channels: Count | None = None
    num_layers: Depth
    attention_head_dim: Count
    num_attention_heads: Count
    joint_attention_dim: Count
    pooled_projection_dim: Count

    @property
    def num_weights(self) -> int:
        """Number of the values that are allocated before any file is read."""
        return 0


class SD3TransformerConfig(TransformerConfig):
    """transformer/config.json of SD 3."""

    class_name: Literal["SD3Transformer2DModel"] = Field(
        "SD3Transformer2DModel", alias="_class_name"
    )
    sample_size: Side = 128
    caption_projection_dim: Count
    pos_embed_max_size: Side = 96
    dual_attention_layers: Annotated[
        tuple[Annotated[int, Strict(), Field(ge=0, le=64)], ...], Field(max_length=64)
    ] = ()
    qk_norm: Literal["rms_norm"] | None = None

    @property
    def num_weights(self) -> int:
        """Number of the values of its position embedding, which diffusers computes."""
        return self.pos_embed_max_size**2 * self.attention_head_dim * self.num_attention_heads


class FluxTransformerConfig(TransformerConfig):
    """transformer/config.json of FLUX."""

    class_name: Literal["FluxTransformer2DModel"] = Field(
        "FluxTransformer2DModel", alias="_class_name"
    )
    in_channels: Count = 64
    num_single_layers: Depth
    axes_dims_rope: tuple[Count, Count, Count] = (16, 56, 56)

    @model_validator(mode="after")
    def _check_rotations(self) -> Self:
        if sum(self.axes_dims_rope) != self.attention_head_dim:
            raise ValueError(
                f"axes_dims_rope must add up to attention_head_dim, {self.attention_head_dim}, got "
                f"{list(self.axes_dims_rope)}"
            )
        return self


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
    """text_encoder/config.json of CLIP."""

    hidden_size: Count = 512
    intermediate_size: Count = 2048
    num_hidden_layers: Depth = 12
    num_attention_heads: Count = 8
    max_position_embeddings: Side = 77
    vocab_size: Annotated[int, Strict(), Field(ge=1, le=MAX_NUMBER)] = 49408
    layer_norm_eps: Epsilon = 1e-5
    projection_dim: Count = 512

    @property
    def num_weights(self) -> int:
        """Number of the weights in its matrices."""
        width = self.hidden_size
        block = 4 * width * width + 2 * width * self.intermediate_size
        return self.num_hidden_layers * block + self.vocab_size * width


class T5Config(Config):
    """text_encoder_2/config.json of FLUX and text_encoder_3/config.json of SD 3."""

    d_model: Count = 512
    d_kv: Count = 64
    d_ff: Count = 2048
    num_layers: Depth = 6
    num_heads: Count = 8
    vocab_size: Annotated[int, Strict(), Field(ge=1, le=MAX_NUMBER)] = 32128
    relative_attention_num_buckets: Count = 32
    relative_attention_max_distance: Count = 128
    layer_norm_epsilon: Epsilon = 1e-6

    @property
    def num_weights(self) -> int:
        """Number of the weights in its matrices, and of its positions in attention."""
        block = 4 * self.d_model * self.num_heads * self.d_kv + 2 * self.d_model * self.d_ff
        positions = self.relative_attention_num_buckets * self.num_heads
        return self.num_layers * block + self.vocab_size * self.d_model + positions


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


class FlowSchedulerConfig(Config):
    """scheduler/scheduler_config.json of flow matching."""

    class_name: Scheduler | None = Field(None, alias="_class_name")
    num_train_timesteps: Annotated[int, Strict(), Field(ge=1, le=100_000)] = 1000
    shift: Shift = 1.0
    base_shift: Annotated[float, Strict(), Field(ge=-10, le=10)] | None = 0.5
    max_shift: Annotated[float, Strict(), Field(ge=-10, le=10)] | None = 1.15
    base_image_seq_len: Count = 256
    max_image_seq_len: Count = 4096
    shift_terminal: Annotated[float, Strict(), Field(ge=0, lt=1)] | None = None
    invert_sigmas: Literal[False] = False

    @model_validator(mode="after")
    def _check_lengths(self) -> Self:
        if self.base_image_seq_len >= self.max_image_seq_len:
            raise ValueError(
                "max_image_seq_len must be more than base_image_seq_len, "
                f"{self.base_image_seq_len}, got {self.max_image_seq_len}"
            )
        return self


class TokenizerConfig(Config):
    """tokenizer/tokenizer_config.json."""

    extra_ids: Annotated[int, Strict(), Field(ge=0, le=1000)] = 0
    """Tokens of T5 that mark masked text."""

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


def _numbers(value: Any) -> Iterator[int | float]:
    """Yield every number in a JSON value."""
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _numbers(item)
    elif isinstance(value, int | float):
        yield value
