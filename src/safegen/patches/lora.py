"""Conversion of patches to LoRA files: the change of each weight as two low-rank factors."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from safegen.core.errors import ConfigError, SafegenWarning
from safegen.core.tensor_files import write_tensors
from safegen.models.checkpoint.metadata import METADATA_KEY
from safegen.models.model import Model
from safegen.models.patched_weights import component_of
from safegen.models.selectors import FLUX, SD3
from safegen.patches.lora_keys import KeyFormat, lora_tensors
from safegen.patches.patch import Patch

FAMILY_WEIGHTS = (".attn2.to_k.weight", ".attn2.to_v.weight")
"""Weights by which InvokeAI tells the family of a UNet's LoRA."""


class IgnoredKeysWarning(SafegenWarning):
    """A known program ignores some keys of a LoRA and generates without them."""


@dataclass(frozen=True, eq=False)
class Lora:
    """Low-rank factors of a patch's change, and the share of the change that they retain."""

    factors: Mapping[str, tuple[Tensor, Tensor]]
    """By weight of the denoiser: down (r, in[, h, w]) and up (out, r[, 1, 1])."""
    rank: int
    """Rank of the widest factor."""
    energy_by_weight: Mapping[str, float]
    """By weight, the share of its squared change that the factors retain."""
    left_out: tuple[str, ...]
    """Changed weights that a LoRA cannot represent: biases and norms."""
    retained_energy: float
    """Share of the patch's squared change that the factors retain."""

    def to_patch(self, model: Model) -> Patch:
        """Return the change as a patch for the model that it was made for."""
        parameters = dict(model.denoiser.named_parameters())
        return Patch(
            {name: add_factors(parameters[name], *pair) for name, pair in self.factors.items()}
        )


def svd_factors(delta: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """Return the best factors of a rank for a change, and the share of it that they retain.

    Truncated singular value decomposition in float64 (Eckart and Young 1936). Each factor takes the
    root of the singular values.

    Args:
        delta: change of a linear weight, (out, in), or of a convolution, (out, in, h, w).
        rank: columns to keep; a higher rank than there is keeps all.

    Returns:
        `down` (r, in[, h, w]) and `up` (out, r[, 1, 1]), float32, with up @ down nearest to delta;
        the share of its squared norm that they retain, in [0, 1], 1 for no change at all.
    """
    flat = delta.detach().cpu().double().flatten(1)
    u, s, v = torch.linalg.svd(flat, full_matrices=False)
    r = min(rank, len(s))
    root = s[:r].sqrt()
    down = (root[:, None] * v[:r]).reshape(r, *delta.shape[1:])
    up = (u[:, :r] * root).reshape(-1, r, *(1,) * (delta.ndim - 2))
    total = float(s.pow(2).sum())
    energy = float(s[:r].pow(2).sum()) / total if total else 1.0
    return down.float().contiguous(), up.float().contiguous(), energy


def add_factors(weight: Tensor, down: Tensor, up: Tensor, scale: float = 1.0) -> Tensor:
    """Return weight + scale * up @ down, computed in float64, as float32 on the CPU."""
    delta = (up.double().flatten(1) @ down.double().flatten(1)).reshape(weight.shape) * scale
    return (weight.detach().cpu().double() + delta).float()


@torch.no_grad()
def extract_lora(patch: Patch, model: Model, rank: int) -> Lora:
    """Return the best LoRA of a rank for a patch: `svd_factors` of each weight.

    Args:
        patch: new values.
        model: the model that they are for, without patches on it.
        rank: highest rank of a factor.

    Raises:
        ConfigError: the rank is below 1, no changed weight is a matrix or convolution, or the patch
            changes a text encoder.
        PatchError: the patch does not fit the model.

    Warns:
        BaseMismatchWarning: see `Patch.check_compatible`; or the patch has parents, and the
            LoRA lacks their change.
    """
    if rank < 1:
        raise ConfigError(f"rank of a LoRA must be >= 1, got {rank}")
    patch.check_compatible(model)
    if component := next(filter(None, map(component_of, patch.tensors)), None):
        raise ConfigError(
            f"a LoRA must be of a patch of the denoiser alone, got one that changes {component}. "
            "Export the model instead: safegen export"
        )
    patch.warn_missing_parents(model)
    parameters = dict(model.denoiser.named_parameters())
    factors, energies, left_out = {}, {}, []
    total = retained = 0.0
    for name, value in patch.tensors.items():
        delta = value.detach().cpu().double() - parameters[name].detach().cpu().double()
        change = float(delta.pow(2).sum())
        total += change
        if delta.ndim in (2, 4) and name.endswith(".weight"):
            down, up, energies[name] = svd_factors(delta, rank)
            factors[name] = (down, up)
            retained += change * energies[name]
        elif change:
            left_out.append(name)
    if not retained:
        raise ConfigError(
            "a LoRA must change a matrix or a convolution, got a patch that changes none"
        )
    widest = max(len(down) for down, _ in factors.values())
    return Lora(factors, widest, energies, tuple(left_out), retained / total)


@torch.no_grad()
def effect_loss(
    lora: Lora,
    patch: Patch,
    model: Model,
    *,
    prompts: Sequence[str] = ("",),
    steps: int = 8,
    seed: int = 0,
) -> float | None:
    """Return the share of a patch's effect on the denoiser's predictions that a LoRA loses (ours).

    |e_lora - e_patch| / |e_base - e_patch|, over all predictions while the model generates some
    prompts without guidance.

    Args:
        lora: the factors.
        patch: the patch that they were taken from.
        model: the model that both are for.
        prompts: prompts to generate.
        steps: denoising steps.
        seed: seed of the noise.

    Returns:
        0 if nothing is lost, 1 if the LoRA has no effect; None if the patch changes no prediction.

    Raises:
        ConfigError: the model is not in fp32, or its predictions are not finite.
    """
    if model.denoiser.dtype != torch.float32:
        raise ConfigError(
            f"effect_loss needs an fp32 model, got {model.dtype} of {model.name!r}. Load it with "
            "--dtype fp32"
        )
    calls = _record_calls(model, prompts, steps, seed)
    predictions = []
    for applied in (patch, lora.to_patch(model)):
        with applied.apply(model, hidden=True):
            predictions.append(
                [model.denoiser(*args, **kwargs)[0].float() for args, kwargs, _ in calls]
            )
    effect = sum(
        float((base - patched).pow(2).sum())
        for (_, _, base), patched in zip(calls, predictions[0], strict=True)
    )
    lost = sum(
        float((lora_prediction - patched).pow(2).sum())
        for patched, lora_prediction in zip(*predictions, strict=True)
    )
    if not math.isfinite(effect + lost):
        raise ConfigError(
            f"predictions of {model.name!r} must be finite under the patch and its LoRA, got others"
        )
    return math.sqrt(lost / effect) if effect else None


def _record_calls(
    model: Model, prompts: Sequence[str], steps: int, seed: int
) -> list[tuple[tuple[Any, ...], dict[str, Any], Tensor]]:
    """Return arguments and prediction of each denoiser call while prompts are generated."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any], Tensor]] = []

    def record(
        module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        inputs = tuple(a.clone() if isinstance(a, Tensor) else a for a in args)
        calls.append((inputs, dict(kwargs), output[0].float()))

    handle = model.denoiser.register_forward_hook(record, with_kwargs=True)
    try:
        for i, prompt in enumerate(prompts):
            generator = torch.Generator("cpu").manual_seed(seed * 1_000_003 + i)
            model.pipeline(
                prompt=[prompt],
                num_inference_steps=steps,
                guidance_scale=1.0,
                generator=generator,
                output_type="latent",
            )
    finally:
        handle.remove()
    return calls


def save_lora(
    lora: Lora,
    model: Model,
    path: Path,
    *,
    keys: KeyFormat = "kohya",
    dtype: torch.dtype = torch.float16,
    **metadata: Any,
) -> None:
    """Write a LoRA to a new safetensors file. At scale 1 it has the effect of the patch.

    Factors are padded with zeros to one rank, and fused where kohya's layout of a transformer has
    one matrix for several weights (`LoraModule.fuse`).

    Args:
        lora: the factors.
        model: the model that they are for, which names the modules.
        path: the new file.
        keys: `kohya` for A1111, ComfyUI and InvokeAI, `diffusers` for `load_lora_weights`. InvokeAI
            tells SD 1.x and 2.x by the keys or values of attn2: a LoRA in kohya's keys that changes
            none gets factors of zeros for one key.
        dtype: type of the factors.
        metadata: plain values for the header.

    Raises:
        FileError: `path` exists or cannot be written.

    Warns:
        IgnoredKeysWarning: diffusers ignores some of the keys.
    """
    if keys == "kohya":
        _warn_of_ignored_keys(lora, model)
    factors = dict(lora.factors)
    if keys == "kohya" and not any(name.endswith(FAMILY_WEIGHTS) for name in factors):
        factors |= _zero_factors(model)
    tensors = lora_tensors(factors, model.denoiser, lora.rank, keys)
    metadata |= {"retained_energy": lora.retained_energy, "family": model.family}
    header = {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(lora.rank),
        "ss_network_alpha": str(lora.rank),
        METADATA_KEY: json.dumps(metadata, sort_keys=True),
    } | _base_model_header(model)
    write_tensors(path, {name: value.to(dtype) for name, value in tensors.items()}, header)


def _warn_of_ignored_keys(lora: Lora, model: Model) -> None:
    """Warn of layers that diffusers (0.42) leaves out of kohya's form without an error."""
    kind = type(model.denoiser).__name__
    ignored = [name for name in lora.factors if kind == SD3 or "blocks." not in name]
    if kind in (SD3, FLUX) and ignored:
        warnings.warn(
            f"diffusers ignores {len(ignored)} of {len(lora.factors)} layers of this LoRA with "
            f"kohya's keys, first {ignored[0].removesuffix('.weight')}, and generates without "
            "them. For diffusers use --keys diffusers",
            IgnoredKeysWarning,
            stacklevel=3,
        )


def _zero_factors(model: Model) -> dict[str, tuple[Tensor, Tensor]]:
    """Return factors of zeros for the first key of attn2; its width tells SD 1.x from 2.x.

    They change nothing; `lora_reader.read_lora` leaves them out.
    """
    if model.denoiser_name != "unet" or hasattr(model.denoiser, "add_embedding"):
        return {}
    for name, weight in model.denoiser.named_parameters():
        if name.endswith(FAMILY_WEIGHTS[0]):
            out, width = weight.shape
            return {name: (torch.zeros(1, width), torch.zeros(out, 1))}
    return {}


def _base_model_header(model: Model) -> dict[str, str]:
    """Return the header entries by which A1111 knows the models that a LoRA is for.

    Without them it lists the LoRA for SD 1.x only. Those of transformers are kohya's trainer's.
    """
    kind, config = type(model.denoiser).__name__, model.denoiser.config
    if kind == FLUX:
        return {"ss_base_model_version": "flux1", "ss_network_module": "networks.lora_flux"}
    if kind == SD3:
        release = "5-medium" if config.dual_attention_layers else "5-large"
        version = release if config.qk_norm else "medium"
        return {"ss_base_model_version": version, "ss_network_module": "networks.lora_sd3"}
    if hasattr(model.denoiser, "add_embedding"):
        return {"ss_base_model_version": "sdxl_base_v1-0", "ss_v2": "False"}
    is_v2 = bool(config.use_linear_projection)
    suffix = "_v" if model.prediction == "v_prediction" else ""
    return {"ss_base_model_version": f"sd_v{2 if is_v2 else 1}{suffix}", "ss_v2": str(is_v2)}
