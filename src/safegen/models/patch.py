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
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from safegen.errors import BadFile, BadPatch
from safegen.files import fresh_file
from safegen.hashes import hash_tensors
from safegen.models.model import Model

FORMAT = "safegen-patch/1"


class OtherBase(UserWarning):
    """A patch is put on a model whose weights are not those it was made for."""


class Overwritten(UserWarning):
    """Several patches on one model change the same weights, and the last one counts."""


@dataclass(frozen=True, eq=False)
class Patch:
    """New values by parameter name of the denoiser, and where they come from."""

    tensors: Mapping[str, Tensor]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """method, settings, base (model hash), under (method and hash of each patch that lay under it when it was made), family, data (triplets
    hash), made_by, metrics: plain JSON values."""

    @cached_property
    def hash(self) -> str:
        """SHA-256 over the new values."""
        return hash_tensors(dict(self.tensors))

    def save(self, out: Path) -> None:
        """Write the patch to a new file.

        Raises:
            BadFile: `out` exists or cannot be written.
        """
        header = {"format": FORMAT, "provenance": json.dumps(dict(self.provenance), sort_keys=True)}
        with fresh_file(out) as tmp:
            try:
                save_file({k: v.detach().cpu().contiguous() for k, v in self.tensors.items()}, tmp, metadata=header)
            except SafetensorError as error:
                raise BadFile(f"{out} cannot be written: {error}") from error

    @classmethod
    def load(cls, path: Path) -> Patch:
        """Read a patch.

        Raises:
            BadFile: missing, truncated, not a patch, or with NaN in its values.
        """
        if not path.is_file():
            raise BadFile(f"the patch {str(path)!r} does not exist")
        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 - not a mapping
        except (SafetensorError, OSError) as error:
            raise BadFile(f"{path} is not a readable safetensors file ({error}); make or fetch it again") from error
        if header.get("format") != FORMAT and any(k.endswith((".lora_down.weight", ".lora_A.weight")) for k in tensors):
            raise BadFile(
                f"{path} is a LoRA, not a safegen patch, and is not fused unasked: `generate --lora` keeps it active beside the weights, "
                "`safegen patch from-lora` makes a patch of it"
            )
        if header.get("format") != FORMAT:
            raise BadFile(f"{path} is not a safegen patch: its header says format {header.get('format')!r}, a patch says {FORMAT!r}")
        for key, value in tensors.items():
            if not bool(value.isfinite().all()):
                raise BadFile(f"{path} has NaN or infinite values in {key}; make it again")
        try:
            provenance = json.loads(header.get("provenance", ""))
        except json.JSONDecodeError as error:
            raise BadFile(f"{path} is a damaged safegen patch: its provenance cannot be read ({error}); make or fetch it again") from error
        return cls(tensors, provenance)

    @property
    def kinds(self) -> dict[str, int]:
        """How many tensors of each kind of layer are new: `attn1`, `attn2` and `other`."""
        groups: dict[str, int] = {}
        for name in self.tensors:
            kind = next((k for k in ("attn1", "attn2") if f".{k}." in name), "other")
            groups[kind] = groups.get(kind, 0) + 1
        return dict(sorted(groups.items()))

    @torch.no_grad()
    def change(self, model: Model) -> str:
        """Return in words what the patch puts in the place of a model's own values, and how far those move: |new - own| / |own|."""
        own, gap, size, moved = dict(model.denoiser.named_parameters()), 0.0, 0.0, 0
        for name, value in self.tensors.items():
            new, old = value.detach().cpu().float(), own[name].detach().cpu().float()
            gap, size = gap + float((new - old).double().pow(2).sum()), size + float(old.double().pow(2).sum())
            moved += not torch.equal(new, old)
        kinds = ", ".join(f"{n} of {kind}" for kind, n in self.kinds.items())
        far = f", by {100 * (gap / size) ** 0.5:.3g} % in all" if size else ""
        return f"new values for {len(self.tensors)} tensors ({kinds}) into it, {moved} of them unlike its own{far}"

    def fits(self, model: Model) -> None:
        """Check names, shapes and family against the model.

        Raises:
            BadPatch: a tensor has no counterpart of its shape, or the patch says that it was made for another family.

        Warns:
            OtherBase: the shapes fit but the weights are not those that the patch was made on.
        """
        own = dict(model.denoiser.named_parameters())
        for key, value in self.tensors.items():
            if key not in own:
                raise BadPatch(f"the patch does not fit the model {model.name!r}: it has no weight {key}; it was made for another family")
            if own[key].shape != value.shape:
                raise BadPatch(
                    f"the patch does not fit the model {model.name!r}: {key} is {tuple(value.shape)} in the patch "
                    f"and {tuple(own[key].shape)} in the model"
                )
        family = self.provenance.get("family")
        if family is not None and family != model.family:
            raise BadPatch(
                f"the patch does not fit the model {model.name!r}: it was made for another family ({family}), this one is {model.family}"
            )
        base = self.provenance.get("base")
        if base is not None and base != model.hash:
            warnings.warn(
                f"the patch was made on weights {base[:12]}, the model {model.name!r} has {model.hash[:12]}: it puts {self.change(model)}; "
                "measure the result before you trust it",
                OtherBase,
                stacklevel=3,
            )

    @torch.no_grad()
    def apply(self, model: Model, *, named: bool = True) -> Applied:
        """Put the new values into the model, in memory; the answer takes them out again exactly.

        Args:
            model: the model.
            named: whether what is made of the model meanwhile says that this patch lay under it.

        Raises:
            BadPatch: see `fits`; then nothing was changed.

        Warns:
            OtherBase: see `fits`; or a patch that lay under it when it was made is not on the model.
        """
        _ = model.hash  # of the untouched weights: what patches refer to
        self.fits(model)
        there = {patch.hash for patch in model.patches} if self.provenance.get("under") else set()
        for below in self.provenance.get("under", ()):
            if below["hash"] not in there:
                warnings.warn(
                    f"the patch was made on a model with another patch on it ({below['method']}, hash {below['hash'][:12]}), which is not "
                    f"on {model.name!r}: put that one on first, or measure the result before you trust it",
                    OtherBase,
                    stacklevel=2,
                )
        if named:
            model.patches.append(self)
        own = dict(model.denoiser.named_parameters())
        before = {k: own[k].detach().clone() for k in self.tensors}
        for key, value in self.tensors.items():
            own[key].copy_(value)
        return Applied(model, before, self)


@dataclass(frozen=True, eq=False)
class Applied:
    """A patch that is on a model. `undo()` gives the model back bit for bit; also usable in a `with`."""

    model: Model
    before: Mapping[str, Tensor]
    patch: Patch

    @torch.no_grad()
    def undo(self) -> None:
        """Put the old values back."""
        own = dict(self.model.denoiser.named_parameters())
        for key, value in self.before.items():
            own[key].copy_(value)
        if self.patch in self.model.patches:
            self.model.patches.remove(self.patch)

    def __enter__(self) -> Applied:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Undo."""
        self.undo()
