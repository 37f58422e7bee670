"""Names of a denoiser's weights in LoRA files, and factors of weights that share a module there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from safegen.models.checkpoint.key_map import kohya_name, sdxl_unet_names
from safegen.models.checkpoint.transformer_map import (
    part_of,
    swap_halves,
    swapped_names,
    transformer_names,
)
from safegen.models.selectors import UNET

KeyFormat = Literal["kohya", "diffusers"]
Factors = tuple[Tensor, Tensor]
"""Down (r, in[, h, w]) and up (out, r[, 1, 1])."""


@dataclass(frozen=True)
class LoraModule:
    """A module of a LoRA file and the weights of the denoiser that it changes."""

    weights: tuple[str, ...]
    """Weights, stacked along their outputs: q, k and v where the file's layout has one matrix."""
    is_swapped: bool = False
    """Whether the halves of its outputs have the other order in the file."""

    def fuse(
        self, factors: Mapping[str, Factors], shapes: Mapping[str, torch.Size], rank: int
    ) -> Factors:
        """Return the module's factors: those of its weights, each padded with zeros to a rank.

        The change of n stacked weights is [U_1 D_1; ...; U_n D_n]. `down` is the D_i on top of
        each other, `up` has the U_i as blocks on its diagonal, so that the rank is n times
        `rank` and the product is exact. A weight without factors gets zeros.

        Args:
            factors: factors by weight.
            shapes: shapes of the weights.
            rank: rank of each weight's factors after padding, at least that of the widest.
        """
        pairs = [
            _pad_rank(*(factors.get(name) or _zero_factors(shapes[name])), rank)
            for name in self.weights
        ]
        if len(pairs) == 1:
            down, up = pairs[0]
        else:
            down = torch.cat([down for down, _ in pairs])
            up = torch.block_diag(*(up for _, up in pairs))
        return down, swap_halves(up) if self.is_swapped else up

    def split(
        self, down: Tensor, up: Tensor, shapes: Mapping[str, torch.Size]
    ) -> Iterator[tuple[str, Factors]]:
        """Yield each weight with its factors: its rows of `up` without columns of zeros.

        The inverse of `fuse`, without its padding. Other fused factors are split exactly, too.
        """
        up = swap_halves(up) if self.is_swapped else up
        if len(self.weights) == 1:
            yield self.weights[0], (down, up)
            return
        rows = torch.split(up, [shapes[name][0] for name in self.weights])
        for name, part in zip(self.weights, rows, strict=True):
            used = part.any(dim=0)
            yield name, (down[used], part[:, used])

    def shape(self, shapes: Mapping[str, torch.Size]) -> tuple[int, ...]:
        """Return the shape of the stacked weights."""
        _, *rest = shapes[self.weights[0]]
        return (sum(shapes[name][0] for name in self.weights), *rest)


def file_modules(denoiser: nn.Module, keys: KeyFormat) -> dict[str, LoraModule]:
    """Return the modules of a LoRA file by the names that we write."""
    if keys == "diffusers":
        prefix = _component(denoiser)
        return {f"{prefix}.{stem}": LoraModule((f"{stem}.weight",)) for stem in _stems(denoiser)}
    if _is_unet(denoiser):
        original = sdxl_unet_names(denoiser)
        names = (f"{stem}.weight" for stem in _stems(denoiser))
        return {kohya_name(name, original.get(name)): LoraModule((name,)) for name in names}
    return {kohya_name(stem): module for stem, module in _fused_modules(denoiser).items()}


def known_modules(denoiser: nn.Module) -> dict[str, LoraModule]:
    """Return the modules by every name that LoRA files give them.

    Besides those that we write: diffusers' names in kohya's form, which some files of SDXL have
    and, with the prefix `lora_transformer_`, OneTrainer's files of transformers; and the
    publisher's names of a transformer below `diffusion_model.`, as in ComfyUI.
    """
    plain = {stem: LoraModule((f"{stem}.weight",)) for stem in _stems(denoiser)}
    modules = file_modules(denoiser, "diffusers") | file_modules(denoiser, "kohya")
    if _is_unet(denoiser):
        return {kohya_name(stem): module for stem, module in plain.items()} | modules
    return modules | (
        {f"lora_transformer_{stem.replace('.', '_')}": module for stem, module in plain.items()}
        | {f"diffusion_model.{name}": module for name, module in _fused_modules(denoiser).items()}
    )


def lora_tensors(
    factors: Mapping[str, Factors], denoiser: nn.Module, rank: int, keys: KeyFormat
) -> dict[str, Tensor]:
    """Return the tensors of a LoRA file at scale 1, with one rank for each weight.

    Releases of diffusers misread the strengths of unequal ranks.

    Args:
        factors: factors by weight.
        denoiser: the network that they are for.
        rank: rank of the widest.
        keys: form of the names.
    """
    shapes = {name: weight.shape for name, weight in denoiser.named_parameters()}
    tensors: dict[str, Tensor] = {}
    for name, module in file_modules(denoiser, keys).items():
        if factors.keys().isdisjoint(module.weights):
            continue
        down, up = module.fuse(factors, shapes, rank)
        if keys == "kohya":
            alpha = torch.tensor(float(len(down)))
            tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
            tensors[f"{name}.alpha"] = alpha
        else:
            tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    return tensors


def _fused_modules(transformer: nn.Module) -> dict[str, LoraModule]:
    """Return the modules of a transformer by their names in the publisher's layout."""
    names = [name for name, _ in transformer.named_parameters()]
    original, swapped = transformer_names(names), swapped_names(names)
    weights: dict[str, list[str]] = {}
    for name in names:
        if name.endswith(".weight"):
            weights.setdefault(original[name].rpartition(".")[0], []).append(name)
    return {
        module: LoraModule(tuple(sorted(parts, key=part_of)), not swapped.isdisjoint(parts))
        for module, parts in weights.items()
    }


def _stems(denoiser: nn.Module) -> list[str]:
    return [
        name.removesuffix(".weight")
        for name, _ in denoiser.named_parameters()
        if name.endswith(".weight")
    ]


def _is_unet(denoiser: nn.Module) -> bool:
    return type(denoiser).__name__ == UNET


def _component(denoiser: nn.Module) -> str:
    return "unet" if _is_unet(denoiser) else "transformer"


def _zero_factors(shape: Sequence[int]) -> Factors:
    """Return factors of zeros for a weight of a shape."""
    out, *rest = shape
    return torch.zeros(1, *rest), torch.zeros(out, 1, *(1,) * (len(rest) - 1))


def _pad_rank(down: Tensor, up: Tensor, rank: int) -> Factors:
    """Return factors padded with zeros to a rank."""
    missing = rank - len(down)
    return (
        torch.cat([down, down.new_zeros(missing, *down.shape[1:])]),
        torch.cat([up, up.new_zeros(len(up), missing, *up.shape[2:])], dim=1),
    )
