"""Arithmetic on patches: merge several into one, rebase one on a fine-tuned model, compare two."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from safegen.core.errors import ConfigError, PatchError
from safegen.models.applied_patch import AppliedPatch
from safegen.models.checkpoint.metadata import ParentRef, PatchMetadata, PatchRecord
from safegen.models.model import Model
from safegen.models.patched_weights import WEIGHTS, hash_components, hash_parts, pipeline_weights
from safegen.patches.patch import BaseMismatchWarning, Patch, PatchOverlapWarning

Overlap = Literal["refuse", "add", "last"]


def overlapping(patches: Sequence[Patch]) -> list[str]:
    """Return the sorted names of the weights that more than one patch changes."""
    seen: set[str] = set()
    repeated: set[str] = set()
    for patch in patches:
        repeated |= seen & patch.names
        seen |= patch.names
    return sorted(repeated)


def conflicting(patches: Sequence[Patch | AppliedPatch]) -> list[str]:
    """Return the sorted names of the weights at which a patch overwrites an unrelated earlier one.

    A patch that was made on a model with the earlier one contains its change, so that nothing is
    lost when it counts.
    """
    repeated: set[str] = set()
    for i, patch in enumerate(patches):
        parents = {parent.hash for parent in patch.metadata.parents}
        for earlier in patches[:i]:
            if earlier.hash not in parents:
                repeated |= patch.names & earlier.names
    return sorted(repeated)


def warn_of_overlap(patches: Sequence[Patch | AppliedPatch]) -> None:
    """Warn if patches that are applied in order overwrite each other's changes.

    Warns:
        PatchOverlapWarning: they do; only the last change counts.
    """
    if names := conflicting(patches):
        warnings.warn(
            f"{len(names)} weights are changed by more than one patch, first {names[0]}, and the "
            "last patch counts. "
            "To add the changes up, use `safegen patch merge --overlap add`",
            PatchOverlapWarning,
            stacklevel=3,
        )


@torch.no_grad()
def merge(
    patches: Sequence[Patch], *, overlap: Overlap = "refuse", model: Model | None = None
) -> Patch:
    """Return one patch with the effect of several that are applied in order.

    Args:
        patches: at least two, made on one base.
        overlap: treatment of `conflicting` weights: `refuse`, `add` the changes up (needs the base
            model), or keep the `last`. A patch that was made on another contains its change, which
            counts once.
        model: the base without patches; needed to add. If given, every patch must fit it.

    Raises:
        ConfigError: there are fewer than two patches, weights conflict and `overlap` refuses, or
            `add` lacks the model or a patch's parent.
        PatchError: the patches have different bases or families, do not fit the model, or `add` is
            given another model than their base.
    """
    if len(patches) < 2:
        raise ConfigError(f"number of patches to merge must be >= 2, got {len(patches)}")
    bases = _common_bases(patches)
    family = _common("family", [patch.metadata.family for patch in patches])
    if model is not None:
        for patch in patches:
            patch.check_compatible(model)
    conflicts = conflicting(patches)
    if conflicts and overlap == "refuse":
        raise ConfigError(
            f"{len(conflicts)} weights are changed by more than one patch, first {conflicts[0]}. "
            "Set overlap to add or last"
        )
    tensors = {name: value for patch in patches for name, value in patch.tensors.items()}
    if conflicts and overlap == "add":
        if model is None:
            raise ConfigError("overlap add needs the base model of the patches, got none. Name it")
        _check_bases(bases, model)
        tensors |= _summed(conflicts, patches, model)
    metadata = PatchMetadata(
        method="merge",
        base=bases.get(WEIGHTS)
        or next((p.metadata.base for p in patches if p.metadata.base), None),
        family=family,
        components=_components(bases),
        parents=_outer_parents(patches),
        parts=tuple(PatchRecord(hash=p.hash, metadata=p.metadata) for p in patches),
        overlap=overlap if conflicts else None,
    )
    return Patch(tensors, metadata)


def include(first: Patch, second: Patch) -> Patch:
    """Return one patch for the unpatched model with the effect of two, made one on the other.

    Args:
        first: the patch that was on the model, put there last.
        second: the patch that was made on that model.

    Returns:
        The values of `second`, and those of `first` for other weights. The metadata are those of
        `second`, with `first` among the parts instead of the parents.

    Raises:
        ConfigError: `first` is not the last parent of `second`.
    """
    *outer, last = second.metadata.parents or (None,)
    if last is None or last.hash != first.hash:
        raise ConfigError(
            f"the patch must be made on a model with {first.hash[:12]} put on it last, got "
            f"{last.hash[:12] if last else 'a model without patches'}. Merge the two"
        )
    seconds = first.metadata.seconds
    note = "" if seconds is None else f", which took {seconds:.1f} s"
    metadata = second.metadata.model_copy(
        update={
            "parents": tuple(outer),
            "components": {**first.metadata.components, **second.metadata.components},
            "parts": (PatchRecord(hash=first.hash, metadata=first.metadata),),
            "description": f"{second.metadata.description or ''} It starts from the patch "
            f"{first.metadata.method or 'unknown'} {first.hash[:12]}{note}.".lstrip(),
        }
    )
    return Patch({**first.tensors, **second.tensors}, metadata)


def _common(what: str, values: Sequence[str | None]) -> str | None:
    """Return the one value that patches have in common; None if none states it."""
    stated = sorted({value for value in values if value is not None})
    if len(stated) > 1:
        raise PatchError(
            f"{what} of patches to merge must be the same, got "
            f"{'; '.join(value[:60] for value in stated)}"
        )
    return stated[0] if stated else None


def _common_bases(patches: Sequence[Patch]) -> dict[str, str]:
    """Return the stated hash of each part that patches change; errors as in `_common`."""
    parts = dict.fromkeys(part for patch in patches for part in patch.bases)
    bases = {part: _common(f"base {part}", [p.bases.get(part) for p in patches]) for part in parts}
    return {part: base for part, base in bases.items() if base is not None}


def _components(bases: Mapping[str, str]) -> dict[str, str]:
    """Return the hashes of text encoders alone."""
    return {part: base for part, base in bases.items() if part != WEIGHTS}


def _outer_parents(patches: Sequence[Patch]) -> tuple[ParentRef, ...]:
    """Return the parents of patches that are not among the patches themselves."""
    hashes = {patch.hash for patch in patches}
    parents = {
        parent.hash: parent
        for patch in patches
        for parent in patch.metadata.parents
        if parent.hash not in hashes
    }
    return tuple(parents.values())


def _summed(names: Sequence[str], patches: Sequence[Patch], model: Model) -> dict[str, Tensor]:
    """Return the base's weights with the changes of all patches added."""
    parameters = pipeline_weights(model.pipeline)
    tensors = {}
    for name in names:
        deltas = [
            _delta(patch, name, parameters[name], patches)
            for patch in patches
            if name in patch.tensors
        ]
        total = parameters[name].detach().cpu().double() + torch.stack(deltas).sum(0)
        tensors[name] = total.float()
    return tensors


def _check_bases(bases: Mapping[str, str], model: Model) -> None:
    """Check that a model has no patch on it, and the hash of each part (`Patch.bases`)."""
    if model.patches:
        raise ConfigError(
            f"model must have no patch applied, got {len(model.patches)} on {model.name!r}. Load a "
            "clean model"
        )
    found = {WEIGHTS: model.hash} | hash_components(model, bases)
    for part, base in bases.items():
        if base != found[part]:
            raise PatchError(
                f"model must have the {part} {base[:12]} that the patch was made on, got "
                f"{found[part][:12]} of {model.name!r} as {model.dtype}"
            )


def _delta(patch: Patch, name: str, base: Tensor, patches: Sequence[Patch]) -> Tensor:
    """Return the change of one weight by a patch: from its parent's value, else from the base's."""
    before, by_hash = base, {other.hash: other for other in patches}
    for parent in patch.metadata.parents:
        if parent.hash not in by_hash:
            raise ConfigError(
                f"patches to add must include the parents of each, got {patch.metadata.method} "
                f"without {parent.method} ({parent.hash[:12]}). "
                "Merge that one too"
            )
        before = by_hash[parent.hash].tensors.get(name, before)
    return patch.tensors[name].detach().cpu().double() - before.detach().cpu().double()


@torch.no_grad()
def rebase(patch: Patch, base: Model, target: Model) -> Patch:
    """Return a patch that adds the change to a fine-tune of its base: target + (patch - base).

    The patch itself would overwrite the fine-tune. What the change does on other weights is not
    known.

    Args:
        patch: made on `base`, without parents.
        base: the very model that it was made on, without patches on it.
        target: a model of the same family, without patches on it.

    Raises:
        PatchError: the patch was made on other weights than the base's, does not fit, or the sum is
            not finite.
        ConfigError: the patch has parents, a patch is on a model, or base and target are equal.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BaseMismatchWarning)  # checked below, or intended
        for model in (base, target):
            patch.check_compatible(model)
    _check_bases(patch.bases, base)
    _check_bases({}, target)
    if parents := patch.metadata.parents:
        raise ConfigError(
            f"patch must have no parents, got {parents[0].method} ({parents[0].hash[:12]}). Merge "
            "the two (`safegen patch merge`), and rebase that"
        )
    bases = hash_parts(target, patch.names)
    if bases == hash_parts(base, patch.names):
        raise ConfigError(
            f"base and target must have different weights, got {base.name!r} and {target.name!r}. "
            "Apply the patch itself"
        )
    old, new = (pipeline_weights(model.pipeline) for model in (base, target))
    tensors, change, drift, size = {}, 0.0, 0.0, 0.0
    for name, value in patch.tensors.items():
        before, after, tuned = (x.detach().cpu().double() for x in (old[name], value, new[name]))
        tensors[name] = (tuned + (after - before)).float()
        if not bool(tensors[name].isfinite().all()):
            raise PatchError(
                f"the rebased {name} is not finite. Check the weights of {target.name!r}"
            )
        change += float((after - before).pow(2).sum())
        drift += float((tuned - before).pow(2).sum())
        size += float(before.pow(2).sum())
    metadata = PatchMetadata(
        method="rebase",
        base=target.hash,
        family=target.family,
        components=_components(bases),
        parts=(PatchRecord(hash=patch.hash, metadata=patch.metadata),),
        moved={"change": (change / size) ** 0.5, "fine_tune": (drift / size) ** 0.5}
        if size
        else {},
    )
    return Patch(tensors, metadata)


def compare(first: Patch, second: Patch) -> Mapping[str, Any]:
    """Return how two patches differ, as plain values.

    Returns:
        `same` (all values are equal), `only_first`, `only_second` and `both` (numbers of weights),
        `unequal` (how many of both), `distance` (|a - b| / |a| over the weights of both), `shapes`
        (weights of unequal shape), `base` (what both change had the same weights before; None if
        they state none in common).
    """
    both = sorted(first.names & second.names)
    shapes = [name for name in both if first.tensors[name].shape != second.tensors[name].shape]
    pairs = [
        (first.tensors[name].double(), second.tensors[name].double())
        for name in both
        if name not in shapes
    ]
    size = sum(float(a.pow(2).sum()) for a, _ in pairs) ** 0.5
    gap = sum(float((a - b).pow(2).sum()) for a, b in pairs) ** 0.5
    shared = first.bases.keys() & second.bases.keys()
    return {
        "same": first.hash == second.hash,
        "only_first": len(first.names - second.names),
        "only_second": len(second.names - first.names),
        "both": len(both),
        "unequal": sum(not torch.equal(a, b) for a, b in pairs) + len(shapes),
        "distance": gap / size if size else None,
        "shapes": shapes,
        "base": all(first.bases[p] == second.bases[p] for p in shared) if shared else None,
    }
