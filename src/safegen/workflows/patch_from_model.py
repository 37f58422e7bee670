"""Make a patch of a model that another program edited: its weights that differ from the base's."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from safegen.core.errors import PatchError, SafegenWarning, check_keywords
from safegen.core.files import display_name, exists
from safegen.core.tensor_files import check_weights, read_header, read_tensors
from safegen.models.checkpoint.metadata import PatchMetadata
from safegen.models.families.pipeline_specs import TEXT_ENCODERS
from safegen.models.fingerprint import ModelFingerprint
from safegen.models.loading import load
from safegen.models.model import Model
from safegen.models.patched_weights import hash_components, pipeline_weights
from safegen.patches.patch import Patch

METHOD = "from-model"
DENOISER_BLOCKS = (
    "down_blocks.",
    "mid_block.",
    "up_blocks.",
    "transformer_blocks.",
    "single_transformer_blocks.",
)
"""Prefixes of a denoiser's weights in diffusers."""
SCHEDULE = ("scheduler",)
"""Parts that may differ: they are chosen when images are generated."""


class RoundedWeightsWarning(SafegenWarning):
    """Weights of an edited model differ from its base's by rounding alone."""


@check_keywords
def patch_from_model(
    edited: str | Path,
    base: str | Path,
    *,
    device: str = "cpu",
    allow_pickle: bool = False,
    config: str | Path | None = None,
) -> Patch:
    """Return the patch that turns a base model into an edited one, bit for bit.

    One model is in memory at a time, beside the denoiser and text encoders of the other.

    Args:
        edited: edited model, or a .safetensors file with weights of the denoiser alone.
        base: model that it was made of.
        device: device to load models on.
        allow_pickle: also load pickled weights, which can run code.
        config: for one-file checkpoints, a diffusers folder with their configuration files.

    Returns:
        The patch: each weight of the denoiser and of text encoders that differs.

    Raises:
        PatchError: no weight differs, or the models differ in more than these.
        ConfigError: the base has another architecture.
        UserError: a model cannot be loaded.

    Warns:
        RoundedWeightsWarning: weights differ by rounding alone, as another dtype makes them.

    Example:
        >>> model = safegen.load("mini")
        >>> patch = safegen.edit(model, "uce", concept="skulls")
        >>> safegen.export(model, "edited", format="diffusers", patches=[patch])
        >>> safegen.patch_from_model("edited", "mini").names == patch.names
        True
    """

    def open_model(name: str | Path) -> Model:
        is_file = exists(str(name), file=True)
        return load(
            name, device=device, allow_pickle=allow_pickle, config=config if is_file else None
        )

    name = display_name(str(edited))
    fingerprint = None
    if _is_denoiser_file(Path(edited)):
        values, _ = read_tensors(Path(edited))
        check_weights(values, Path(edited))
    else:
        model = open_model(edited)
        fingerprint = ModelFingerprint.of(model)
        values = {n: p.detach().cpu() for n, p in pipeline_weights(model.pipeline).items()}
        del model
    plain = open_model(base)
    if fingerprint is not None:
        _check_parts(fingerprint, ModelFingerprint.of(plain))
    return _difference(values, plain, name)


def _is_denoiser_file(path: Path) -> bool:
    """Return whether a safetensors file has weights of a denoiser under diffusers' names."""
    if path.suffix != ".safetensors" or not exists(path, file=True):
        return False
    names = read_header(path).keys() - {"__metadata__"}
    return any(name.startswith(DENOISER_BLOCKS) for name in names)


def _check_parts(edited: ModelFingerprint, base: ModelFingerprint) -> None:
    """Check that two models differ in the weights of denoiser and text encoders alone.

    Raises:
        ConfigError: they have other architectures.
        PatchError: they differ in another part.
    """
    edited.check_architecture(base)
    parts = edited.differing_parts(base)
    if others := [part for part in parts if part not in (*SCHEDULE, *TEXT_ENCODERS)]:
        raise PatchError(
            f"{edited.name!r} and {base.name!r} must differ in denoiser and text encoders "
            f"alone, got differences in {', '.join(others)}, which a patch does not hold. "
            "Compare the model itself: safegen evaluate BASE --stack NAME=EDITED"
        )
    if schedule := [part for part in parts if part in SCHEDULE]:
        warnings.warn(
            f"{edited.name!r} has another {schedule[0]} than {base.name!r}. The patch holds "
            "weights alone: generate both with the same one",
            SafegenWarning,
            stacklevel=3,
        )


@torch.no_grad()
def _difference(values: Mapping[str, Tensor], base: Model, name: str) -> Patch:
    """Return the values that differ from a base's, as a patch for it."""
    old = pipeline_weights(base.pipeline)
    constants = {key: value.cpu().float() for key, value in base.denoiser.named_buffers()}
    changed: dict[str, Tensor] = {}
    rounded = 0
    for key, value in values.items():
        if key in constants and torch.equal(value.float(), constants[key]):  # positions of SD 3
            continue
        if key not in old or old[key].shape != value.shape:
            found = "no such weight" if key not in old else f"{tuple(old[key].shape)}"
            raise PatchError(
                f"the base of {name!r} must have its architecture, got {found} for {key} of shape "
                f"{tuple(value.shape)} in {base.name!r}. Name the model that was edited"
            )
        before = old[key].detach().cpu()
        if torch.equal(value.float(), before.float()):
            continue
        changed[key] = value.contiguous()
        rounded += any(
            torch.equal(value.float(), before.to(dtype).float())
            for dtype in (torch.float16, torch.bfloat16)
        )
    if not changed:
        raise PatchError(
            f"{name!r} must differ from {base.name!r}, got equal weights. "
            "Name the edited model first, then its base"
        )
    if rounded:
        warnings.warn(
            f"{rounded} of {len(changed)} weights that differ were only rounded to a smaller type. "
            "The patch holds them too; name a base of the same type to leave them out",
            RoundedWeightsWarning,
            stacklevel=3,
        )
    patch = Patch(changed)
    return Patch(
        changed,
        PatchMetadata(
            method=METHOD,
            model=display_name(base.name),
            base=base.hash,
            family=base.family,
            components=hash_components(base, changed),
            description=f"Weights of {name} that differ from {display_name(base.name)}: "
            f"{len(changed)} of {len(old)}, {_kinds(patch)}.",
        ),
    )


def _kinds(patch: Patch) -> str:
    return ", ".join(f"{count} of {kind}" for kind, count in patch.layer_counts.items())
