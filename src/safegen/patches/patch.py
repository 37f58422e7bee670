"""A patch: new values for some weights of a denoiser, in one safetensors file with its provenance."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from safegen.core.errors import FileError, PatchError, SafegenWarning, explain
from safegen.core.files import atomic_write
from safegen.core.hashing import hash_tensors
from safegen.models.model import Model

FORMAT = "safegen-patch/1"


class BaseMismatchWarning(SafegenWarning):
    """A patch is put on a model whose weights are not those it was made for."""


class PatchOverlapWarning(SafegenWarning):
    """Several patches on one model change the same weights, and the last one counts."""


class _Named(BaseModel):
    """A patch by method and hash."""

    method: str
    hash: str


class _Part(BaseModel):
    """A patch that another was merged of."""

    hash: str
    provenance: dict[str, Any]


class PatchMetadata(BaseModel):
    """What is read of a file's provenance, wherever that comes from.

    Whatever else it says is kept as it is.
    """

    base: str | None = None
    base_rounded: dict[str, str] = Field(default_factory=dict)
    family: str | None = None
    settings: dict[str, Any] = Field(default_factory=dict)
    under: list[_Named] = Field(default_factory=list)
    parts: list[_Part] = Field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Patch:
    """New values by parameter name of the denoiser, and where they come from."""

    tensors: Mapping[str, Tensor]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """method, settings, base (model hash), under (method and hash of each patch that lay under it when it was made), family, data (triplets
    hash), metrics (what `save_patch` was given): plain JSON values."""

    @cached_property
    def hash(self) -> str:
        """SHA-256 over the new values."""
        return hash_tensors(dict(self.tensors))

    def save(self, out: str | Path) -> None:
        """Write the patch to a new file.

        Raises:
            PatchError: it changes nothing, or has values that are not finite, so that it could not be
                read again.
            FileError: `out` exists or cannot be written.
        """
        out = Path(out)
        if not self.tensors:
            raise PatchError(f"{out} is not written: the patch changes nothing")
        for key, value in self.tensors.items():
            if not bool(value.isfinite().all()):
                raise PatchError(
                    f"{out} is not written: the patch has NaN or infinite values in {key}; make it again"
                )
        header = {"format": FORMAT, "provenance": json.dumps(dict(self.provenance), sort_keys=True)}
        with atomic_write(out) as tmp:
            try:
                save_file(
                    {k: v.detach().cpu().contiguous() for k, v in self.tensors.items()},
                    tmp,
                    metadata=header,
                )
            except SafetensorError as error:
                raise FileError(f"{out} cannot be written: {error}") from error

    @classmethod
    def load(cls, path: str | Path) -> Patch:
        """Read a patch.

        Raises:
            FileError: missing, truncated, not a patch, one of nothing, or with NaN in its values.
        """
        path = Path(path)
        if not path.is_file():
            raise FileError(f"the patch {str(path)!r} does not exist")
        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                tensors = {k: file.get_tensor(k) for k in file.keys()}
        except (SafetensorError, OSError) as error:
            raise FileError(
                f"{path} is not a readable safetensors file ({error}); make or fetch it again"
            ) from error
        if header.get("format") != FORMAT and any(
            k.endswith((".lora_down.weight", ".lora_A.weight")) for k in tensors
        ):
            raise FileError(
                f"{path} is a LoRA, not a safegen patch, and is not fused unasked: `generate --lora` keeps it active beside the weights, "
                "`safegen patch from-lora` makes a patch of it"
            )
        if header.get("format") != FORMAT:
            raise FileError(
                f"{path} is not a safegen patch: its header says format {header.get('format')!r}, a patch says {FORMAT!r}"
            )
        if not tensors:
            raise FileError(
                f"{path} is a safegen patch of nothing: it has no tensors; make or fetch it again"
            )
        for key, value in tensors.items():
            if not bool(value.isfinite().all()):
                raise FileError(f"{path} has NaN or infinite values in {key}; make it again")
        try:
            provenance = json.loads(header.get("provenance", ""))
            PatchMetadata.model_validate(provenance)
        except ValidationError as error:
            raise FileError(
                f"{path} is a damaged safegen patch: its provenance cannot be used "
                f"({explain(error, PatchMetadata)}); make or fetch it again"
            ) from error
        except json.JSONDecodeError as error:
            raise FileError(
                f"{path} is a damaged safegen patch: its provenance cannot be read ({error}); make or fetch it again"
            ) from error
        return cls(tensors, provenance)

    @property
    def layer_counts(self) -> dict[str, int]:
        """How many tensors of each kind of layer are new: `attn1`, `attn2` and `other`."""
        groups: dict[str, int] = {}
        for name in self.tensors:
            kind = next((k for k in ("attn1", "attn2") if f".{k}." in name), "other")
            groups[kind] = groups.get(kind, 0) + 1
        return dict(sorted(groups.items()))

    @torch.no_grad()
    def describe_change(self, model: Model) -> str:
        """Return in words what the patch puts in the place of a model's own values, and how far those move: |new - own| / |own|."""
        own, gap, size, moved = dict(model.denoiser.named_parameters()), 0.0, 0.0, 0
        for name, value in self.tensors.items():
            new, old = value.detach().cpu().float(), own[name].detach().cpu().float()
            gap, size = (
                gap + float((new - old).double().pow(2).sum()),
                size + float(old.double().pow(2).sum()),
            )
            moved += not torch.equal(new, old)
        kinds = ", ".join(f"{n} of {kind}" for kind, n in self.layer_counts.items())
        far = f", by {100 * (gap / size) ** 0.5:.3g} % in all" if size else ""
        return f"new values for {len(self.tensors)} tensors ({kinds}) into it, {moved} of them unlike its own{far}"

    def check_compatible(self, model: Model) -> None:
        """Check names, shapes and family against the model.

        Raises:
            PatchError: a tensor has no counterpart of its shape, or the patch says that it was made
                for another family.

        Warns:
            BaseMismatchWarning: the shapes fit but the weights are not those that the patch was made on.
        """
        own = dict(model.denoiser.named_parameters())
        for key, value in self.tensors.items():
            if key not in own:
                raise PatchError(
                    f"the patch does not fit the model {model.name!r}: it has no weight {key}; it was made for another family"
                )
            if own[key].shape != value.shape:
                raise PatchError(
                    f"the patch does not fit the model {model.name!r}: {key} is {tuple(value.shape)} in the patch "
                    f"and {tuple(own[key].shape)} in the model"
                )
        family = self.provenance.get("family")
        if family is not None and family != model.family:
            raise PatchError(
                f"the patch does not fit the model {model.name!r}: it was made for another family ({family}), this one is {model.family}"
            )
        base = self.provenance.get("base")
        rounded_then = self.provenance.get("base_rounded", {}).values()
        if (
            base is not None
            and model.hash not in (base, *rounded_then)
            and base not in model.cast_hashes.values()
        ):
            rounded = model.denoiser.dtype
            known = rounded == torch.float32 or self.provenance.get("base_rounded")
            why = (
                ""
                if known
                else f" (loaded as {str(rounded).removeprefix('torch.')}, which alone changes that)"
            )
            warnings.warn(
                f"the patch was made on weights {base[:12]}, the model {model.name!r} has {model.hash[:12]}{why}: it puts "
                f"{self.describe_change(model)}; measure the result before you trust it",
                BaseMismatchWarning,
                stacklevel=3,
            )

    def warn_missing_parents(self, model: Model) -> None:
        """Warn of each patch that lay under this one when it was made and is not on a model.

        Warns:
            BaseMismatchWarning: there is one.
        """
        there = {patch.hash for patch in model.patches} if self.provenance.get("under") else set()
        for below in self.provenance.get("under", ()):
            if below["hash"] not in there:
                warnings.warn(
                    f"the patch was made on a model with another patch on it ({below['method']}, hash {below['hash'][:12]}), which is not "
                    f"on {model.name!r}: put that one on first, or measure the result before you trust it",
                    BaseMismatchWarning,
                    stacklevel=3,
                )

    @torch.no_grad()
    def apply(self, model: Model, *, named: bool = True) -> AppliedPatch:
        """Put the new values into the model, in memory; the answer takes them out again exactly, whatever was put on after it.

        Args:
            model: the model.
            named: whether what is made of the model meanwhile says that this patch lay under it.

        Raises:
            PatchError: see `fits`, or a value is not finite in the model's type; then nothing was
                changed.

        Warns:
            BaseMismatchWarning: see `fits`; or a patch that lay under it when it was made is not on the
                model.
        """
        _ = model.hash  # of the untouched weights: what patches refer to
        self.check_compatible(model)
        own = dict(model.denoiser.named_parameters())
        for key, value in self.tensors.items():
            if not bool(value.to(own[key].dtype).isfinite().all()):
                raise PatchError(
                    f"the patch has values in {key} that are not finite as {str(own[key].dtype).removeprefix('torch.')}, the type of the "
                    f"model {model.name!r}; load the model as fp32 or bf16, or make the patch again"
                )
        self.warn_missing_parents(model)
        applied = AppliedPatch(
            model, {k: own[k].detach().clone() for k in self.tensors}, self, named
        )
        model.applied_patches.append(applied)
        try:
            for key, value in self.tensors.items():
                own[key].copy_(value)
        except BaseException:
            applied.undo()
            raise
        return applied


@dataclass(frozen=True, eq=False)
class AppliedPatch:
    """A patch that is on a model. `undo()` takes it off bit for bit; also usable in a `with`."""

    model: Model
    before: dict[str, Tensor]
    """What lies under it."""
    patch: Patch
    named: bool = True

    @torch.no_grad()
    def undo(self) -> None:
        """Put the old values back; where another patch was put on after it, that one keeps its own and has these under it now.

        A patch that is off already stays off.
        """
        if self not in self.model.applied_patches:
            return
        above = self.model.applied_patches[self.model.applied_patches.index(self) + 1 :]
        own = dict(self.model.denoiser.named_parameters())
        for key, value in self.before.items():
            on_it = next((one for one in above if key in one.before), None)
            if on_it is None:
                own[key].copy_(value)
            else:
                on_it.before[key] = value
        self.model.applied_patches.remove(self)

    def __enter__(self) -> AppliedPatch:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Undo."""
        self.undo()
