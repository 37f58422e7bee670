"""Patches: new values for some weights of a denoiser and of text encoders, with metadata."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.linalg import vector_norm

from safegen.core.errors import FileError, PatchError, SafegenWarning
from safegen.core.hashing import hash_tensors
from safegen.core.registry import MODELS
from safegen.core.tensor_files import check_weights, read_tensors, write_tensors
from safegen.core.text import short_repr
from safegen.models.applied_patch import AppliedPatch
from safegen.models.checkpoint.metadata import PATCH_FORMAT, PatchMetadata, read_patch_metadata
from safegen.models.loading import LORA_ENDINGS
from safegen.models.model import Model, dtype_name
from safegen.models.patched_weights import WEIGHTS, component_of, hash_parts, pipeline_weights
from safegen.models.text_encoder import text_encoder_names
from safegen.models.wrapping import check_shared, model_of

LAYERS = ("attn1", "attn2", "attn")
LARGE_CHANGE = 10.0
"""Size of a change, as a multiple of the size of the changed weights, that is warned about.

A change as large as the weights leaves nothing of them; edits stay far below.
"""


class BaseMismatchWarning(SafegenWarning):
    """A patch or LoRA is used on other weights than it was made on."""


class LargeChangeWarning(SafegenWarning):
    """A patch or LoRA changes the weights by more than `LARGE_CHANGE` times their size."""


class PatchOverlapWarning(SafegenWarning):
    """Several patches on one model change the same weights, and the last one counts."""


@dataclass(frozen=True, eq=False)
class Patch:
    """New values by parameter name of the denoiser, with their metadata.

    Names of weights of a text encoder begin with its component's name in the pipeline, such as
    `text_encoder.text_model.final_layer_norm.weight`.

    Example:
        >>> model = safegen.load("mini")
        >>> patch = safegen.edit(model, "uce", concept="skulls")
        >>> patch.save("patch.safetensors")
        >>> with safegen.Patch.load("patch.safetensors").apply(model):
        ...     print(len(model.patches))
        1
    """

    tensors: Mapping[str, Tensor]
    metadata: PatchMetadata = field(default_factory=PatchMetadata)

    def __repr__(self) -> str:
        """Return the method, the model and the size in one line."""
        numbers = sum(value.numel() for value in self.tensors.values())
        size = f"{len(self.tensors)} tensors", f"{numbers:,} numbers"
        return short_repr(Patch, *size, method=self.metadata.method, model=self.metadata.model)

    @cached_property
    def hash(self) -> str:
        """SHA-256 over the new values."""
        return hash_tensors(self.tensors)

    @property
    def names(self) -> frozenset[str]:
        """Names of the weights it changes."""
        return frozenset(self.tensors)

    @property
    def layer_counts(self) -> dict[str, int]:
        """Number of changed tensors by kind of layer or text encoder.

        Kinds are `LAYERS` and `other` of the denoiser, and names of components.
        """
        layers = {n: next((k for k in LAYERS if f".{k}." in n), "other") for n in self.tensors}
        return dict(sorted(Counter(component_of(n) or k for n, k in layers.items()).items()))

    @property
    def bases(self) -> dict[str, str]:
        """Stated hash without patches of each part that it changes; see `hash_parts`.

        A patch of text encoders alone is not tied to a denoiser.
        """
        parts = {component_of(name) or WEIGHTS for name in self.tensors}
        stated = {WEIGHTS: self.metadata.base, **self.metadata.components}
        return {part: base for part, base in stated.items() if base and part in parts}

    def save(self, path: str | Path) -> None:
        """Write the patch to a new file.

        Raises:
            PatchError: it has no tensors, or values that are not finite.
            FileError: `path` exists or cannot be written.
        """
        path = Path(path)
        if not self.tensors:
            raise PatchError(f"{path} is not written: the patch has no tensors")
        for name, value in self.tensors.items():
            if not bool(value.isfinite().all()):
                raise PatchError(
                    f"{path} is not written: the patch has NaN or infinite values in {name}"
                )
        header = {
            "format": PATCH_FORMAT,
            "metadata": json.dumps(self.metadata.to_json(), sort_keys=True),
        }
        write_tensors(path, self.tensors, header)

    @classmethod
    def load(cls, path: str | Path) -> Patch:
        """Return the patch in a file.

        Raises:
            FileError: the file is missing, damaged or no patch, or has no tensors or NaN values.
        """
        path = Path(path)
        if str(path) in MODELS or (path / "model_index.json").is_file():
            raise FileError(
                f"PATCH must be a patch file, got the model {str(path)!r}. Did you swap the "
                "arguments? MODEL comes first."
            )
        tensors, header = read_tensors(path)
        _check_format(path, header, tensors)
        if not tensors:
            raise FileError(f"{path} is a safegen patch without tensors. Make or fetch it again")
        check_weights(tensors, path)
        return cls(tensors, read_patch_metadata(header.get("metadata", ""), path))

    @torch.no_grad()
    def describe_change(self, model: Model) -> str:
        """Return in words how many weights of a model change, and how far: |new - old| / |old|.

        Raises:
            PatchError: a tensor has no counterpart of its shape.
        """
        parameters = self._matching_parameters(model)
        changed = sum(
            not torch.equal(value.detach().cpu().float(), parameters[name].detach().cpu().float())
            for name, value in self.tensors.items()
        )
        kinds = ", ".join(f"{count} of {kind}" for kind, count in self.layer_counts.items())
        change = self._relative_change(parameters)
        distance = "" if change is None else f", by {100 * change:.3g} % in all"
        return f"changes {changed} of {len(self.tensors)} tensors ({kinds}){distance}"

    def _relative_change(self, parameters: Mapping[str, Tensor]) -> float | None:
        """Return |new - old| / |old| over all tensors; None if all old values are 0."""
        gap, size = 0.0, 0.0
        for name, value in self.tensors.items():
            new, old = value.detach().cpu().float(), parameters[name].detach().cpu().float()
            gap += float(vector_norm(new - old, dtype=torch.float64)) ** 2
            size += float(vector_norm(old, dtype=torch.float64)) ** 2
        return (gap / size) ** 0.5 if size else None

    def _matching_parameters(self, model: Model) -> dict[str, torch.nn.Parameter]:
        """Return a model's parameters by name, after a check that every tensor fits one."""
        parameters = pipeline_weights(model.pipeline)
        prefix = f"the patch does not fit the model {model.name!r}"
        for name, value in self.tensors.items():
            if name not in parameters:
                component = component_of(name)
                if component and component not in text_encoder_names(model.pipeline):
                    raise PatchError(
                        f"{prefix}: it has no {component}. Use a pipeline that has one"
                    )
                raise PatchError(
                    f"{prefix}: it has no weight {name}. It was made for another family"
                )
            if parameters[name].shape != value.shape:
                raise PatchError(
                    f"{prefix}: {name} is {tuple(value.shape)} in the patch and "
                    f"{tuple(parameters[name].shape)} in the model"
                )
        return parameters

    def check_compatible(self, model: Model) -> None:
        """Check names, shapes, family and base of the patch against a model.

        Raises:
            PatchError: a tensor has no counterpart of its shape, or the family is another.

        Warns:
            BaseMismatchWarning: the patch was made on other weights.
        """
        self._matching_parameters(model)
        check_family(
            f"the patch does not fit the model {model.name!r}", self.metadata.family, model
        )
        found = hash_parts(model, self.names)
        for part, base in self.bases.items():
            if base != found[part]:
                change = f" It {self.describe_change(model)}."
                warn_base_mismatch("patch", part, base, found[part], model, change)

    def warn_missing_parents(self, model: Model) -> None:
        """Warn of each parent of the patch that is not on a model.

        Warns:
            BaseMismatchWarning: there is one.
        """
        applied = {parent.hash for parent in model.parents}
        for parent in self.metadata.parents:
            if parent.hash not in applied:
                warnings.warn(
                    f"the patch was made on a model with the patch {parent.method} "
                    f"({parent.hash[:12]}), which is not on {model.name!r}. "
                    "Apply that one first, or measure the result",
                    BaseMismatchWarning,
                    stacklevel=3,
                )

    @torch.no_grad()
    def apply(self, model: Any, *, hidden: bool = False) -> AppliedPatch:
        """Write the new values into a model in memory; `undo()` restores the old ones exactly.

        Args:
            model: a `Model`, a diffusers pipeline, or its denoiser, if the patch changes nothing
                else.
            hidden: do not list this patch as a parent of patches that are made on the model
                meanwhile.

        Raises:
            ConfigError: `model` is none of them, or its weights are offloaded.
            PatchError: see `check_compatible`, a value is not finite in the model's type, or the
                pipeline has another text encoder than the one that shares its denoiser.

        Warns:
            BaseMismatchWarning: see `check_compatible` and `warn_missing_parents`.
            LargeChangeWarning: the weights change by more than `LARGE_CHANGE` times their size.
        """
        target, model = model, model_of(model)
        check_shared(target, model, {component_of(name) for name in self.names} - {None})
        _ = model.hash  # taken before any weight changes
        self.check_compatible(model)
        parameters = pipeline_weights(model.pipeline)
        for name, value in self.tensors.items():
            if not bool(value.to(parameters[name].dtype).isfinite().all()):
                raise PatchError(
                    f"values of the patch must be finite in {dtype_name(parameters[name])}, the "
                    f"type of {model.name!r}, got others in {name}. "
                    "Load or export it as fp32 or bf16"
                )
        self.warn_missing_parents(model)
        warn_large_change("patch", self._relative_change(parameters))
        before = {name: parameters[name].detach().clone() for name in self.tensors}
        applied = AppliedPatch(model, before, self.hash, self.metadata, hidden)
        model.applied_patches.append(applied)
        try:
            for name, value in self.tensors.items():
                parameters[name].copy_(value)
        except BaseException:
            applied.undo()
            raise
        return applied


def check_family(prefix: str, family: str | None, model: Model) -> None:
    """Check that the family in a patch's or LoRA's metadata is the model's.

    Raises:
        PatchError: it is another. The message begins with `prefix`.
    """
    if family not in (None, model.family):
        raise PatchError(
            f"{prefix}: it was made for another family ({family}), this one is {model.family}"
        )


def warn_large_change(kind: str, change: float | None) -> None:
    """Warn of a change that is larger than an edit's.

    Args:
        kind: `patch` or `LoRA`.
        change: size of the change by that of the weights.

    Warns:
        LargeChangeWarning: it is larger than `LARGE_CHANGE`.
    """
    if change is not None and not change <= LARGE_CHANGE:
        warnings.warn(
            f"change by the {kind} should be at most {LARGE_CHANGE:g} times the size of the "
            f"weights, got {change:.3g} times. Images will be noise; check where it is from",
            LargeChangeWarning,
            stacklevel=4,
        )


def warn_base_mismatch(
    kind: str, what: str, base: str | None, present: str, model: Model, change: str = ""
) -> None:
    """Warn that a patch or LoRA was made on other weights than a model's.

    Args:
        kind: `patch` or `LoRA`.
        what: the weights, in words.
        base: hash of the weights that it was made on.
        present: hash of those of the model.
        model: the model.
        change: a sentence on what it changes.

    Warns:
        BaseMismatchWarning: always.
    """
    rounded = (
        f" The model is loaded as {model.dtype}, which alone changes the hash of weights stored as "
        "fp32."
        if model.dtype not in ("fp32", model.stored_dtype)
        else ""
    )
    warnings.warn(
        f"the {kind} was made on {what} {str(base)[:12]}, the model {model.name!r} has "
        f"{present[:12]}.{rounded}{change} "
        "Measure the result before you trust it",
        BaseMismatchWarning,
        stacklevel=4,
    )


def _check_format(path: Path, header: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
    """Check that a safetensors file is a patch."""
    if header.get("format") == PATCH_FORMAT:
        return
    if any(name.endswith(LORA_ENDINGS) for name in tensors):
        raise FileError(
            f"{path} must be a safegen patch, got a LoRA. Use it with `generate --lora`, or "
            "convert it with `safegen patch from-lora`"
        )
    stated = header.get("format")
    found = f"the format {stated[:80]!r}" if stated else "a file that states none"
    raise FileError(
        f"{path} must be a safegen patch, with the format {PATCH_FORMAT!r} in its header, got "
        f"{found}. An exported model is loaded as MODEL, not as a patch"
    )
