"""Compression: round or prune the stack's weights, which can undo a small edit. No training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.utils.prune import L1Unstructured

from safegen.attacks.core.base import Access, Attack, AttackContext, AttackRecord, Tier
from safegen.evaluation.samples import EvalSample, Role
from safegen.models.checkpoint.metadata import PatchMetadata
from safegen.models.model import Model
from safegen.models.selectors import select_parameters
from safegen.patches.patch import Patch
from safegen.stack import Stack


class Compression(Attack):
    """Settings of the attack by compression."""

    TINY: ClassVar[Mapping[str, Any]] = {"bits": (4,), "prune": (0.3,)}
    paper: ClassVar[str] = "arXiv:2410.16454"
    deviations: ClassVar[str] = (
        "The paper is about language models. Here every matrix and convolution of the denoiser is "
        "rounded to the nearest value, with one scale per output channel; biases, norms and active "
        "LoRAs stay as they are. Pruning is ours. It is not the attack of arXiv:2603.06640, which "
        "needs an edit that prunes: no edit here does."
    )
    access: ClassVar[Access] = "weights"
    tier: ClassVar[Tier] = "adaptive"
    role: ClassVar[Role] = "explicit"
    changes_prompts: ClassVar[bool] = False

    bits: tuple[Annotated[int, Field(ge=2, le=16)], ...] = (8, 4)
    """Bits per weight; one stack for each."""
    prune: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = (0.1, 0.3)
    """Share of the smallest weights of each matrix that become zero; one stack for each."""
    selector: str = "all"
    """Layers that are compressed."""

    @model_validator(mode="after")
    def _check_operations(self) -> Self:
        names = list(self.operations())
        if not names or len(names) < len(self.bits) + len(self.prune):
            raise ValueError(
                "bits and prune must name at least one stack, each once, got "
                f"{', '.join(map(str, (*self.bits, *self.prune))) or 'none'}"
            )
        return self

    def operations(self) -> dict[str, tuple[str, float]]:
        """Return the operation and its setting for each attacked stack, by name."""
        return {f"quantized-{n}": ("quantization", float(n)) for n in self.bits} | {
            f"pruned-{100 * share:g}": ("pruning", share) for share in self.prune
        }

    def build(self, context: AttackContext) -> Compressor:
        """Write a patch for each operation and return the attacker.

        Raises:
            ConfigError: the selector matches nothing.
        """
        return Compressor(self, context)

    def attacked_stacks(self, stack: Stack, folder: Path) -> Sequence[Stack]:
        """Return the stack with each operation done to its weights."""
        return [
            stack.model_copy(
                update={"name": name, "patches": (*stack.patches, _path(folder, name))}
            )
            for name in self.operations()
        ]


class Compressor:
    """Compresses the weights of a target once; prompts stay as they are."""

    def __init__(self, config: Compression, context: AttackContext) -> None:
        for name, (method, amount) in config.operations().items():
            path = _path(context.folder, name)
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                compress(context.target.model, config.selector, method, amount).save(path)

    def attack(self, samples: Sequence[EvalSample]) -> list[AttackRecord]:
        """Return the samples as they are."""
        return [AttackRecord(id=s.id, prompt=s.prompt, seed=s.seed) for s in samples]


def compress(model: Model, selector: str, method: str, amount: float) -> Patch:
    """Return the compressed weights of a model as a patch; the model is not changed.

    Args:
        model: the model, with its patches on it.
        selector: which layers. Only matrices and convolutions of these are compressed.
        method: `quantization` or `pruning`.
        amount: bits per weight, or the share of weights that becomes zero.
    """
    tensors = {}
    for name, weight in _matrices(model, selector):
        if method == "pruning":
            tensors[name] = L1Unstructured(amount=amount).prune(weight)
        else:
            tensors[name] = quantize(weight, int(amount))
    kind = "bits" if method == "quantization" else "share"
    metadata = PatchMetadata(
        method=method,
        settings={"selector": selector, kind: amount},
        base=model.hash,
        family=model.family,
        parents=model.parents,
        description=f"Weights after {method}, {kind} {amount:g}: an attack, not an edit.",
    )
    return Patch(tensors, metadata)


def quantize(weight: Tensor, bits: int) -> Tensor:
    """Return a weight rounded to a symmetric grid of 2^bits - 1 values for each output channel.

    The largest weight of a channel is kept, zeros stay zeros, and a second call changes nothing but
    rounding.

    Args:
        weight: (out, ...).
        bits: bits per weight, >= 2.
    """
    rows = weight.float().flatten(1)
    step = rows.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    rounded = torch.where(step > 0, torch.round(rows / step.clamp(min=1e-30)) * step, rows)
    return rounded.reshape(weight.shape).to(weight)


def _matrices(model: Model, selector: str) -> Iterator[tuple[str, Tensor]]:
    parameters = dict(model.denoiser.named_parameters())
    for name in select_parameters(model.denoiser, selector):
        if parameters[name].ndim >= 2:
            yield name, parameters[name].detach()


def _path(folder: Path, name: str) -> Path:
    return folder / f"{name}.safetensors"
