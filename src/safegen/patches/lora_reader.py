"""Reading of LoRA files in kohya's and diffusers' keys, with every tensor accounted for.

diffusers' own `load_lora_weights` (0.42) gives equal images for plain files, but reads kohya files
of several ranks or alphas with one alpha, and skips unknown modules and missing factors with a log
message. A measured image must not depend on that, so that files are read here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import AliasChoices, AliasGenerator, BaseModel, ConfigDict, Strict
from torch import Tensor
from torch.linalg import vector_norm

from safegen.core.documents import parse_json, validate
from safegen.core.errors import ConfigError, FileError, PatchError
from safegen.core.tensor_files import FACTOR_DTYPES, check_weights, read_tensors
from safegen.models.checkpoint.metadata import (
    METADATA_KEY,
    PATCH_FORMAT,
    PatchMetadata,
    read_patch_metadata,
)
from safegen.models.model import Model
from safegen.patches.lora import add_factors
from safegen.patches.lora_keys import known_modules
from safegen.patches.lora_spec import MAX_SCALE
from safegen.patches.patch import Patch, check_family, warn_base_mismatch, warn_large_change

TEXT_ENCODER_PREFIXES = (
    "lora_te_",
    "lora_te1_",
    "lora_te2_",
    "lora_te3_",
    "text_encoder.",
    "text_encoder_2.",
    "text_encoder_3.",
)
"""Prefixes of a text encoder's modules in a LoRA file."""
PEFT_PREFIX = "base_model.model."
"""Prefix of every module in an adapter that peft itself writes."""
FACTOR_SUFFIXES = {
    ".lora_down.weight": ".lora_up.weight",
    ".lora_A.weight": ".lora_B.weight",
    ".lora.down.weight": ".lora.up.weight",
}
"""Suffixes of a module's two factors: in kohya's form, and in new and old files of diffusers."""
ADAPTER_KEY = "lora_adapter_metadata"
"""Header key with peft's settings of each component, as diffusers writes them."""
ALPHA_INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)
"""Types of an alpha besides `FACTOR_DTYPES`; kohya's trainer stores an integer as given."""


def _adapter_keys(field: str) -> AliasChoices:
    """Return the keys of a field, one for each kind of denoiser."""
    return AliasChoices(f"unet.{field}", f"transformer.{field}")


class AdapterMetadata(BaseModel):
    """The part of peft's settings in a diffusers LoRA that decides its strength."""

    model_config = ConfigDict(
        frozen=True, alias_generator=AliasGenerator(validation_alias=_adapter_keys)
    )

    lora_alpha: Annotated[float, Strict()] | None = None
    alpha_pattern: dict[str, Any] | None = None
    use_rslora: Annotated[bool, Strict()] | None = None


@dataclass(frozen=True, eq=False)
class LoraFactors:
    """The denoiser's part of a LoRA file."""

    file: str
    """File name, without folders."""
    factors: Mapping[str, tuple[Tensor, Tensor, float]]
    """By weight of the denoiser: down (r, in[, h, w]), up (out, r[, 1, 1]), and scale."""
    text_encoder_tensors: int
    """Number of tensors for a text encoder, which are left out."""
    metadata: PatchMetadata
    """Metadata of a file that safegen wrote."""

    def relative_change(self, model: Model, scale: float) -> float | None:
        """Return the size of the change at a scale by that of the weights; None if those are 0."""
        parameters = dict(model.denoiser.named_parameters())
        gap = size = 0.0
        for name, (down, up, strength) in self.factors.items():
            delta = up.double().flatten(1) @ down.double().flatten(1)
            gap += float(vector_norm(delta) * scale * strength) ** 2
            size += float(vector_norm(parameters[name].detach(), dtype=torch.float64)) ** 2
        return (gap / size) ** 0.5 if size else None


@torch.no_grad()
def load_lora(path: Path, model: Model, *, scale: float = 1.0) -> Patch:
    """Return the denoiser's part of a LoRA file as a patch of a model.

    Tensors for the text encoder are left out, and counted in the patch's metadata.

    Args:
        path: a safetensors file in kohya's or diffusers' keys.
        model: the model that the patch is for. It is the base of the patch, even if the LoRA was
            made on another.
        scale: strength; 1 is as trained.

    Raises:
        ConfigError: the scale is 0, not finite, or beyond `MAX_SCALE`.
        FileError: see `read_lora`.
        PatchError: see `read_lora`.

    Warns:
        BaseMismatchWarning: the LoRA was made on other weights.
        LargeChangeWarning: the weights change by more than `LARGE_CHANGE` times their size.
    """
    if not 0 < abs(scale) <= MAX_SCALE:
        raise ConfigError(
            f"scale of a LoRA must be from -{MAX_SCALE:g} to {MAX_SCALE:g} and not 0, got {scale:g}"
        )
    lora = read_lora(path, model)
    warn_large_change("LoRA", lora.relative_change(model, scale))
    parameters = dict(model.denoiser.named_parameters())
    tensors = {
        name: add_factors(parameters[name], down, up, scale * strength)
        for name, (down, up, strength) in lora.factors.items()
    }
    entries: dict[str, Any] = {
        "method": "lora",
        "base": model.hash,
        "family": model.family,
        "parents": model.parents,
        "file": path.name,
        "scale": scale,
        "lora": lora.metadata.to_json(),
    }
    if lora.text_encoder_tensors:
        entries["left_out"] = f"{lora.text_encoder_tensors} tensors of the text encoder"
    return Patch(tensors, PatchMetadata(**entries))


def read_lora(path: Path, model: Model) -> LoraFactors:
    """Return the factors in a LoRA file by the weights of a model.

    Args:
        path: a safetensors file in kohya's or diffusers' keys.
        model: the model that they change.

    Raises:
        FileError: the file cannot be read, is incomplete or not finite, or has more in it than
            plain factors.
        PatchError: a module has no counterpart of its shape, or the family is another.

    Warns:
        BaseMismatchWarning: the LoRA was made on other weights.
    """
    tensors, metadata, default_alpha = _open(path)
    prefix = f"the LoRA does not fit the model {model.name!r}"
    check_family(prefix, metadata.family, model)
    modules = known_modules(model.denoiser)
    shapes = {name: p.shape for name, p in model.denoiser.named_parameters()}
    text_encoder = [key for key in tensors if key.startswith(TEXT_ENCODER_PREFIXES)]
    factors, used = dict[str, tuple[Tensor, Tensor, float]](), set(text_encoder)
    for key, value in tensors.items():
        suffix = next((suffix for suffix in FACTOR_SUFFIXES if key.endswith(suffix)), None)
        if suffix is None or key in used:
            continue
        module = key.removesuffix(suffix)
        if module not in modules:
            raise PatchError(f"{prefix}: it has no module {module}. It was made for another family")
        up_key, alpha_key = module + FACTOR_SUFFIXES[suffix], f"{module}.alpha"
        if up_key not in tensors:
            raise FileError(f"{path} is damaged: it has {key} without {up_key}")
        entry, alpha = modules[module], tensors.get(alpha_key, default_alpha)
        if not factors.keys().isdisjoint(entry.weights):
            raise FileError(f"{path} is damaged: it has factors of {module} under two names")
        check_weights({key: value, up_key: tensors[up_key]}, path, FACTOR_DTYPES)
        try:
            down, up, scale = _fit_factors(value, tensors[up_key], alpha, entry.shape(shapes))
            for name, pair in entry.split(down, up, shapes):
                factors[name] = *pair, scale
        except ValueError as error:
            raise FileError(
                f"{path} is damaged: {module}: {error}. Make or fetch it again"
            ) from error
        except PatchError as error:
            raise PatchError(f"{prefix}: the factors of {module} are {error}") from error
        used |= {key, up_key, alpha_key}
    if not factors:
        raise FileError(
            f"{path} must be a LoRA of a denoiser, got no tensor that ends in "
            f"{', '.join(FACTOR_SUFFIXES)}"
        )
    if unknown := sorted(tensors.keys() - used):
        raise FileError(
            f"{path} must be a plain LoRA, got {unknown[0]}. LoHa, LoKr, DoRA and the like are "
            "not read, since half of them would be lost"
        )
    if metadata.base not in (None, model.hash):
        warn_base_mismatch("LoRA", "weights", metadata.base, model.hash, model)
    return LoraFactors(path.name, _without_zeros(factors, path), len(text_encoder), metadata)


def _without_zeros(
    factors: Mapping[str, tuple[Tensor, Tensor, float]], path: Path
) -> dict[str, tuple[Tensor, Tensor, float]]:
    """Return the factors that change their weight.

    An alpha of 0 turns a module off. Factors of zeros only tell the family (`lora.save_lora`).
    """
    changing = {
        name: (down, up, strength)
        for name, (down, up, strength) in factors.items()
        if strength and bool(down.any()) and bool(up.any())
    }
    if not changing:
        raise FileError(
            f"factors and alpha in {path} must not be 0 in every module. Make or fetch it again"
        )
    return changing


def _fit_factors(
    down: Tensor, up: Tensor, alpha: Tensor | float | None, shape: tuple[int, ...]
) -> tuple[Tensor, Tensor, float]:
    """Return factors with the dimensions of their weight, and the scale of their product."""
    shapes = f"{tuple(down.shape)} and {tuple(up.shape)}"
    down, up = _match_dimensions(down, len(shape)), _match_dimensions(up, len(shape))
    fits = (
        down.ndim == up.ndim == len(shape) >= 2
        and set(up.shape[2:]) <= {1}
        and (len(up), *down.shape[1:]) == shape
        and up.shape[1] == len(down)
    )
    if not fits or (isinstance(alpha, Tensor) and alpha.numel() != 1):
        raise PatchError(f"{shapes} in the file, the weight is {shape} in the model")
    rank = len(down)
    strength = (rank if alpha is None else _number(alpha)) / rank
    if not abs(strength) <= MAX_SCALE:  # NaN too
        raise ValueError(
            f"alpha / rank must be from -{MAX_SCALE:g} to {MAX_SCALE:g}, got {strength:g}"
        )
    return down, up, strength


def _number(alpha: Tensor | float) -> float:
    """Return an alpha as a number."""
    if isinstance(alpha, Tensor) and alpha.dtype not in (*FACTOR_DTYPES, *ALPHA_INTEGERS):
        raise ValueError(f"alpha must be a number, got the type {alpha.dtype}")
    return float(alpha)


def _match_dimensions(factor: Tensor, dimensions: int) -> Tensor:
    """Return a factor with the dimensions of its weight; some tools write 1x1 convolutions."""
    if dimensions == 2 and factor.ndim == 4 and factor.shape[2:] == (1, 1):
        return factor.flatten(1)
    return factor[:, :, None, None] if dimensions == 4 and factor.ndim == 2 else factor


def _open(path: Path) -> tuple[dict[str, Tensor], PatchMetadata, float | None]:
    """Return a LoRA file's tensors, its metadata, and the alpha of modules without their own."""
    stored, header = read_tensors(path)
    tensors = {_modern_key(key): value for key, value in stored.items()}
    if len(tensors) < len(stored):
        raise FileError(f"{path} is damaged: it has factors of one module under two names")
    if header.get("format") == PATCH_FORMAT:
        raise FileError(
            f"{path} must be a LoRA, got a safegen patch. Use it with --patch, or convert it: "
            "safegen patch extract-lora"
        )
    metadata = read_patch_metadata(header.get(METADATA_KEY, "{}"), path)
    source = f"{ADAPTER_KEY} of {path}"
    adapter = validate(AdapterMetadata, parse_json(header.get(ADAPTER_KEY, "{}"), source), source)
    if adapter.alpha_pattern or adapter.use_rslora:
        raise FileError(
            f"{path} must have one alpha for all modules in its header, got several, or "
            "rank-stabilized ones"
        )
    if bare := next((key for key in tensors if key.startswith(PEFT_PREFIX)), None):
        raise FileError(
            f"{path} must be saved by save_lora_weights, got a bare peft adapter "
            f"({bare}), which lacks alpha"
        )
    return tensors, metadata, adapter.lora_alpha


def _modern_key(key: str) -> str:
    """Return a key in diffusers' form of today; in 2023 attention processors held the factors."""
    if ".processor.to_" not in key:
        return key
    key = key.replace(".processor.", ".").replace("_lora.", ".lora.")
    return key.replace(".to_out.lora.", ".to_out.0.lora.")
