"""What the training loop is told, what a method brings to it, and what it finds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, Protocol, Self, runtime_checkable

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from safegen.core.generation import preferred_precision

LogRow = dict[str, float]
TrainingCallback = Callable[[int, int, LogRow], None]
"""Called after every update with (updates done, updates in all, the row of the log)."""
Precision = Literal["auto", "fp32", "bf16", "fp16"]
"""Arithmetic of a forward pass.

Auto is bf16 where the device computes in it, else fp32, or what the network is held in.
"""


def resolve_precision(precision: Precision, net: nn.Module) -> Precision:
    """Return a precision with `auto` decided for a network where it stands."""
    if precision != "auto":
        return precision
    weight = next(net.parameters())
    native = preferred_precision(str(weight.device))
    if weight.dtype == torch.float32 or native == "bf16":
        return native
    return "fp16" if weight.dtype == torch.float16 and weight.device.type == "cuda" else "bf16"


class Training(BaseModel):
    """How the loop trains. Defaults are the published SafeGen run's, less its inert flags."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    updates: int = Field(default=1000, ge=1)
    """Optimiser updates."""
    batch: int = Field(default=1, ge=1)
    """Samples in one forward pass."""
    accumulation: int = Field(default=5, ge=1)
    """Forward passes in one update."""
    lr: float = Field(default=1e-5, gt=0)
    """Learning rate of AdamW."""
    warmup: int = Field(default=0, ge=0)
    """Updates over which the learning rate rises from zero."""
    decay: Literal["constant", "cosine"] = "constant"
    """What the learning rate does after warm-up; cosine ends at zero."""
    weight_decay: float = Field(default=1e-2, ge=0)
    """AdamW's decoupled weight decay."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's moment decays."""
    clip: float = Field(default=1.0, gt=0)
    """Largest norm of an update's gradient."""
    ema: float = Field(default=0.9999, ge=0, lt=1)
    """Largest decay of the weight average that becomes the patch; 0 takes the last weights."""
    ema_ramp: bool = True
    """Whether the decay rises to `ema`, as (1 + n) / (10 + n) after n updates (diffusers').

    Else it is `ema` from the first update on.
    """
    precision: Precision = "fp32"
    """Arithmetic of the forward pass, `auto` to let the device decide.

    Trained weights are always fp32.
    """
    gradient_checkpointing: bool = False
    """Trade time for memory."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Decides every draw: the draws of a step depend on the seed and the step alone."""
    checkpoint_every: int = Field(default=100, ge=1)
    """Updates between checkpoints, when a folder is given."""
    validate_every: int = Field(default=0, ge=0)
    """Updates between looks at the held-out samples, with the average where there is one.

    0 is never.
    """
    patience: int = Field(default=0, ge=0)
    """Stop after so many looks without a better held-out loss; 0 is never."""

    def resolve(self, net: nn.Module) -> Self:
        """Return it with `auto` decided for a network: what trains, is recorded and can be resumed."""
        return self.model_copy(update={"precision": resolve_precision(self.precision, net)})


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
"""Ours, for edits of the miniature model by words: a minute or two."""


class Objective(Protocol):
    """What a method brings to the loop."""

    @property
    def weights(self) -> Mapping[str, float]:
        """Weight of each loss term in the sum that is minimised."""
        ...

    fingerprint: str
    """Names data and settings: a checkpoint of another problem is refused."""

    def training_step(
        self,
        denoiser: nn.Module,
        micro_step: int,
        generator: torch.Generator,
        share: tuple[int, int],
    ) -> Mapping[str, Tensor]:
        """Return each term's unweighted loss per sample, (b,), for this process's `share` (rank, of how many) of one batch."""
        ...


@runtime_checkable
class HasValidation(Protocol):
    """A problem with samples that are never trained on, for early stopping."""

    def validation_loss(self, denoiser: nn.Module) -> float:
        """Return the weighted loss on them, with fixed draws."""
        ...


@runtime_checkable
class HasMetadata(Protocol):
    """A problem that has something to say in the patch: what was made before the first update, and what was left out."""

    facts: Mapping[str, Any]


@runtime_checkable
class UsesEma(Protocol):
    """A problem that looks at the weight average while it trains."""

    def set_ema(self, average: Callable[[], Mapping[str, Tensor]]) -> None:
        """Keep the question for the averaged weights as they stand, by name.

        It is to be asked within `losses`.
        """
        ...


class TrainResult(BaseModel):
    """What the loop found."""

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True)

    tensors: dict[str, Tensor]
    """The averaged weights, fp32."""
    log: list[LogRow]
    """One row an update: update, lr, norm, seconds and each term."""
    seconds: float
    """Time spent training, over all resumed parts."""
    stopped_early: bool = False

    def facts(self, terms: Iterable[str]) -> dict[str, Any]:
        """Return what a patch says of its training: updates, seconds, the last losses."""
        return {
            "updates": len(self.log),
            "seconds": round(self.seconds, 2),
            "stopped_early": self.stopped_early,
            "losses": {k: self.log[-1][k] for k in terms},
        }
