"""Training configuration, the objective interface, and the training result."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, Literal, Protocol, Self, runtime_checkable

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from safegen.core.errors import ConfigError, UnusedSettingWarning, is_out_of_memory
from safegen.core.generation import preferred_precision
from safegen.core.processes import is_accelerate_alone, process_share
from safegen.core.settings import MAX_BATCH, MAX_COUNT, BaseSettings

LogRow = dict[str, float]
Beta = Annotated[float, Field(ge=0, lt=1)]
TrainingCallback = Callable[[int, int, LogRow], bool | None]
"""Function that is called after every update with (updates done, updates in total, log row).

If it returns True, the training ends with this update.
"""
Precision = Literal["auto", "fp32", "bf16", "fp16"]
"""Arithmetic of a forward pass.

`auto` is bf16 if the device computes in it, otherwise fp32, or the dtype of a half-precision model.
"""


def resolve_precision(precision: Precision, net: nn.Module) -> Precision:
    """Return the precision for a network, with `auto` resolved for its device and dtype."""
    if precision != "auto":
        return precision
    weight = next(net.parameters())
    preferred = preferred_precision(str(weight.device))
    if weight.dtype == torch.float32 or preferred == "bf16":
        return preferred
    return "fp16" if weight.dtype == torch.float16 and weight.device.type == "cuda" else "bf16"


class Training(BaseSettings):
    """Settings of the training loop. The defaults are those of the published SafeGen run."""

    updates: int = Field(default=1000, ge=1, le=MAX_COUNT)
    """Number of optimizer updates."""
    batch: int = Field(default=1, ge=1, le=MAX_BATCH)
    """Samples in one forward pass, of all processes together."""
    accumulation: int = Field(default=5, ge=1, le=MAX_BATCH)
    """Forward passes per update."""
    lr: float = Field(default=1e-5, gt=0, le=10)
    """Learning rate of AdamW."""
    warmup: int = Field(default=0, ge=0, le=MAX_COUNT)
    """Updates over which the learning rate rises from zero."""
    decay: Literal["constant", "cosine"] = "constant"
    """Learning rate schedule after warmup; cosine ends at zero."""
    weight_decay: float = Field(default=1e-2, ge=0)
    """Decoupled weight decay of AdamW."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Decay rates of AdamW's moments."""
    clip: float = Field(default=1.0, gt=0)
    """Maximum gradient norm of an update."""
    max_skipped: int = Field(default=0, ge=0, le=MAX_COUNT)
    """Updates in a row that are skipped if a loss or the gradient is not finite.

    The next one raises. With 0 the first raises.
    """
    ema: float = Field(default=0.9999, ge=0, lt=1)
    """Maximum decay of the weight average that becomes the patch; 0 uses the last weights."""
    ema_ramp: bool = True
    """Whether the decay rises to `ema` as (1 + n) / (10 + n) after n updates, as in diffusers.

    If false, the decay is `ema` from the first update.
    """
    precision: Precision = "fp32"
    """Arithmetic of the forward pass; `auto` follows the device. Trained weights stay fp32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of every random draw. The draws of a step depend on the seed and the step only."""
    checkpoint_every: int = Field(default=100, ge=1, le=MAX_COUNT)
    """Updates between checkpoints, if a checkpoint directory is given."""
    validate_every: int = Field(default=0, ge=0, le=MAX_COUNT)
    """Updates between validations, which use the weight average if any; 0 disables them."""
    patience: int = Field(default=0, ge=0, le=MAX_COUNT)
    """Stop after this many validations without a lower loss; 0 disables early stopping."""

    def resolve(self, net: nn.Module) -> Self:
        """Return a copy with `precision` resolved for a network."""
        return self.model_copy(update={"precision": resolve_precision(self.precision, net)})

    def lr_factor(self, update: int) -> float:
        """Return the learning rate of an update, counted from 0, relative to `lr`."""
        if update < self.warmup:
            return (update + 1) / self.warmup
        if self.decay == "constant":
            return 1.0
        rest = max(self.updates - self.warmup, 1)
        return 0.5 * (1 + math.cos(math.pi * (update - self.warmup) / rest))

    def unused_settings(self, *, checkpoints: bool, validation: bool) -> Iterator[tuple[str, str]]:
        """Yield each setting that has no effect, and why.

        Args:
            checkpoints: whether a checkpoint directory is given.
            validation: whether the objective has a validation loss.
        """
        if self.warmup >= self.updates:
            yield "lr", f"in full: warmup {self.warmup} does not end in {self.updates} updates"
        if not self.ema_ramp and not self.ema:
            yield "ema_ramp", "with ema 0"
        if self.validate_every and not validation:
            yield "validate_every", "for an edit without validation samples"
        if self.patience and not (self.validate_every and validation):
            yield "patience", "without validation"
        default = type(self).model_fields["checkpoint_every"].default
        if self.checkpoint_every != default and not checkpoints:
            yield "checkpoint_every", "without a checkpoint directory"
        if is_accelerate_alone():
            yield "num_processes", "in accelerate launch on a CPU. Use torchrun --nproc-per-node N"


SHORT = Training(
    updates=200,
    batch=8,
    accumulation=1,
    lr=5e-4,
    warmup=10,
    decay="cosine",
    weight_decay=0.0,
    ema=0.95,
    precision="auto",
)
"""Training of the miniature model by phrases (ours); it takes a minute or two."""
SHORT_WITH_IMAGES = Training(
    updates=160,
    batch=16,
    accumulation=1,
    lr=2.1e-3,
    warmup=8,
    decay="cosine",
    weight_decay=0.0,
    ema=0.95,
    precision="auto",
)
"""Training of the miniature model with triplets, chosen by our ablation."""
FULL_SIZE_TRAINING = Training(precision="auto")
"""Published SafeGen schedule in the precision of the device."""


def step_seed(seed: int, step: int) -> int:
    """Return the seed of one step's generator: a hash of both, so that steps are independent."""
    return (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) % 2**63


class Objective(Protocol):
    """Batches and losses of one training."""

    @property
    def weights(self) -> Mapping[str, float]:
        """Weight of each loss term in the minimized sum."""
        ...

    def training_step(
        self,
        denoiser: nn.Module,
        micro_step: int,
        generator: torch.Generator,
        share: tuple[int, int],
    ) -> Mapping[str, Tensor]:
        """Return the unweighted losses of this process's samples of one batch by term, (b,) each.

        Args:
            denoiser: the network in training, with new values in the trained parameters.
            micro_step: index of the forward pass, counted over all updates.
            generator: source of all random draws. Draw for the whole batch, then take the share.
            share: (rank, world size). This process computes the samples `[rank::world_size]`.
        """
        ...


@runtime_checkable
class HasValidation(Protocol):
    """An objective with held-out samples, for early stopping."""

    def validation_loss(self, denoiser: nn.Module) -> float:
        """Return the weighted loss on the held-out samples, with fixed draws."""
        ...


@runtime_checkable
class HasMetadata(Protocol):
    """An objective that adds metadata to the patch and to the fingerprint of its checkpoints."""

    metadata: Mapping[str, Any]


@runtime_checkable
class HasState(Protocol):
    """An objective or adversary with tensors, besides the weights, that training changes."""

    @property
    def state(self) -> Mapping[str, Tensor]:
        """Tensors by name, not copies: a checkpoint saves them, resuming writes into them."""
        ...


def training_state(objective: Objective) -> Mapping[str, Tensor]:
    """Return the tensors besides weights that training changes: the objective's or its adversary's.

    They are fp32 and keep their shapes.
    """
    owner = objective if isinstance(objective, HasState) else getattr(objective, "attack", None)
    return owner.state if isinstance(owner, HasState) else {}


@runtime_checkable
class FollowsUpdates(Protocol):
    """An objective that does something after every update, such as logging or ending."""

    @property
    def stop_reason(self) -> str | None:
        """Why the training ends, after a resume too; None if it goes on."""
        ...

    def after_update(self, row: LogRow) -> None:
        """Add figures to the log row of an update."""
        ...


@runtime_checkable
class LimitsCheckpoints(Protocol):
    """An objective that can be resumed after some updates only."""

    @property
    def can_checkpoint(self) -> bool:
        """Whether a checkpoint after this update resumes bit for bit.

        A due checkpoint, and the stop after a signal, wait for the next update that allows it.
        """
        ...


@runtime_checkable
class UsesEma(Protocol):
    """An objective that uses the weight average during training."""

    def set_ema(self, average: Callable[[], Mapping[str, Tensor]]) -> None:
        """Store the function that returns the averaged weights by name."""
        ...


class TrainResult(BaseModel):
    """Result of a training: new weights and the log."""

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True)

    tensors: dict[str, Tensor]
    """Averaged weights by name, fp32."""
    log: list[LogRow]
    """One row per update: update, lr, norm, seconds and each loss term."""
    seconds: float
    """Training time, resumed parts included."""
    stopped_early: bool = False
    stop_reason: str | None = None
    """Why the objective ended the training; see `FollowsUpdates`."""
    processes: int = Field(default_factory=lambda: process_share()[1])
    """Processes that shared the last updates."""

    def to_metadata(self, terms: Iterable[str]) -> dict[str, Any]:
        """Return the metadata for a patch: updates, seconds and the last loss of each term."""
        return {
            "updates": len(self.log),
            "seconds": round(self.seconds, 2),
            "stopped_early": self.stopped_early,
            **({"stop_reason": self.stop_reason} if self.stop_reason else {}),
            **({"processes": self.processes} if self.processes > 1 else {}),
            "losses": {
                name: next(row[name] for row in reversed(self.log) if name in row)
                for name in terms
                if any(name in row for row in self.log)  # a skipped update has no losses
            },
        }


@contextmanager
def memory_errors(config: Training) -> Iterator[None]:
    """Raise a lack of memory as a `ConfigError` that names the settings to change."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise ConfigError(
            f"batch must fit into memory, got {config.batch}. Lower it and raise "
            "training.accumulation, or set training.gradient_checkpointing."
        ) from error


def warn_unused(settings: Iterable[tuple[str, str]]) -> None:
    """Warn of settings without effect, given by name and reason ("alpha", "without rank").

    Warns:
        UnusedSettingWarning: one for each setting.
    """
    for name, reason in settings:
        warnings.warn(f"{name} has no effect {reason}", UnusedSettingWarning, stacklevel=3)
