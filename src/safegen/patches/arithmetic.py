"""Several patches as one, and how two differ."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from safegen.core.errors import ConfigError, PatchError
from safegen.models.model import Model
from safegen.patches.patch import BaseMismatchWarning, Patch, PatchOverlapWarning

Overlap = Literal["refuse", "add", "last"]


def overlapping(patches: Sequence[Patch]) -> list[str]:
    """Return the weights that more than one patch changes, sorted."""
    seen: set[str] = set()
    twice: set[str] = set()
    for patch in patches:
        twice |= seen & patch.tensors.keys()
        seen |= patch.tensors.keys()
    return sorted(twice)


def conflicting(patches: Sequence[Patch]) -> list[str]:
    """Return the weights that a patch changes though one before it does and it was not made on that one, sorted.

    What was made on a model with the patch before it on has its change within: there the last one
    is what both do.
    """
    twice: set[str] = set()
    for i, patch in enumerate(patches):
        below = {b["hash"] for b in patch.provenance.get("under", ())}
        twice |= {
            name
            for other in patches[:i]
            if other.hash not in below
            for name in patch.tensors.keys() & other.tensors.keys()
        }
    return sorted(twice)


def warn_of_overlap(patches: Sequence[Patch]) -> None:
    """Warn where patches that are put on one after the other change the same weights, unknown to each other: only the last change is left.

    Warns:
        PatchOverlapWarning: they do.
    """
    if twice := conflicting(patches):
        warnings.warn(
            f"{len(twice)} weights are changed by more than one patch, {twice[0]} first, and the last patch counts; "
            "`safegen patch merge --overlap add` adds the changes up",
            PatchOverlapWarning,
            stacklevel=3,
        )


@torch.no_grad()
def merge(
    patches: Sequence[Patch], *, overlap: Overlap = "refuse", model: Model | None = None
) -> Patch:
    """Return one patch that does what several do, put on one after the other.

    Args:
        patches: at least two, made on one base.
        overlap: for weights that several change, unknown to each other (`conflicting`): `refuse`,
            `add` the changes up (needs the model that they are changes of), or keep the `last`. A
            patch that was made on another has that one's change within, which counts once.
        model: the base, without patches on it; needed to add. Given, every patch must fit it.

    Raises:
        ConfigError: fewer than two patches, weights overlap and that is refused, `add` has no model,
            or what lay under a patch whose change is to be added is not among them.
        PatchError: the patches are of different bases or families, one does not fit the model, or
            changes of other weights than the model's are to be added.
    """
    if len(patches) < 2:
        raise ConfigError(f"merging needs at least two patches, got {len(patches)}")
    bases = {str(base) for p in patches if (base := p.provenance.get("base")) is not None}
    if len(bases) > 1:
        raise PatchError(
            f"the patches were made on different weights ({', '.join(sorted(b[:12] for b in bases))}); merge those of one base"
        )
    families = {str(family) for p in patches if (family := p.provenance.get("family")) is not None}
    if len(families) > 1:
        raise PatchError(
            f"the patches were made for different families ({'; '.join(sorted(families))}); merge those of one"
        )
    if model is not None:
        for patch in patches:
            patch.check_compatible(model)
    twice = conflicting(patches)
    if twice and overlap == "refuse":
        raise ConfigError(
            f"{len(twice)} weights are changed by more than one patch, {twice[0]} first; choose what becomes of them: add or last"
        )
    out = {name: value for patch in patches for name, value in patch.tensors.items()}
    if twice and overlap == "add":
        if model is None:
            raise ConfigError("adding changes up needs the model that they are changes of; name it")
        _refuse_other_base(next(iter(bases), model.hash), model)
        own = dict(model.denoiser.named_parameters())
        for name in twice:
            moves = [
                _delta(patch, name, own[name], patches)
                for patch in patches
                if name in patch.tensors
            ]
            out[name] = (own[name].detach().cpu().double() + torch.stack(moves).sum(0)).float()
    facts: dict[str, Any] = {
        "method": "merge",
        "overlap": overlap if twice else None,
        "overlapping": len(overlapping(patches)),
    }
    facts |= {"base": bases.pop()} if bases else {}
    facts |= next(
        (
            {"base_rounded": p.provenance["base_rounded"]}
            for p in patches
            if p.provenance.get("base_rounded")
        ),
        {},
    )
    facts |= {"family": families.pop()} if families else {}
    merged = {p.hash for p in patches}
    under = {
        b["hash"]: b
        for p in patches
        for b in p.provenance.get("under", ())
        if b["hash"] not in merged
    }
    facts |= {"under": list(under.values())} if under else {}
    return Patch(
        out,
        facts | {"parts": [{"hash": p.hash, "provenance": dict(p.provenance)} for p in patches]},
    )


def _refuse_other_base(base: str, model: Model) -> None:
    """Refuse a model whose weights are not those that a patch was made on, as they are or rounded: what it changes is not known then.

    Raises:
        PatchError: they are others.
        ConfigError: a patch is on the model.
    """
    if model.patches:
        raise ConfigError(
            f"changes are told from a model as it is, and {model.name!r} has a patch on it; take it off"
        )
    if base not in (model.hash, *model.cast_hashes.values()):
        raise PatchError(
            f"the patch was made on weights {base[:12]}, the model {model.name!r} has {model.hash[:12]}, so its change is not known; "
            "name the model that it was made on"
        )


def _delta(patch: Patch, name: str, own: Tensor, patches: Sequence[Patch]) -> Tensor:
    """Return how far a patch moves a weight from what that was when the patch was made: from the base's, or a patch's that lay under it.

    Raises:
        ConfigError: one lay under it that is not among `patches`, so that this is not known.
    """
    before, given = own, {p.hash: p for p in patches}
    for below in patch.provenance.get("under", ()):
        if below["hash"] not in given:
            raise ConfigError(
                f"the change of {patch.provenance.get('method')} cannot be added: it was made on a model with another patch on it "
                f"({below['method']}, hash {below['hash'][:12]}); merge that one too"
            )
        before = given[below["hash"]].tensors.get(name, before)
    return patch.tensors[name].detach().cpu().double() - before.detach().cpu().double()


@torch.no_grad()
def rebase(patch: Patch, base: Model, target: Model) -> Patch:
    """Return a patch for another fine-tune of a patch's base that changes it by as much: target + (patch - base), weight by weight (ours).

    The patch itself would put its own values in, and so take the fine-tune's away. What the change
    does on other weights is not known.

    Args:
        patch: made on `base`, with no patch under it.
        base: the very model that it was made on, without patches on it.
        target: of the same family, without patches on it.

    Raises:
        PatchError: the patch was made on other weights than the base's, does not fit, or the sum is
            not finite.
        ConfigError: a patch lay under it when it was made, a patch is on a model, or base and target
            have the same weights.
    """
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", BaseMismatchWarning
        )  # of the base it is refused below, of the target it is what is asked for
        for model in (base, target):
            patch.check_compatible(model)
    _refuse_other_base(str(patch.provenance.get("base") or base.hash), base)
    _refuse_other_base(target.hash, target)
    if below := patch.provenance.get("under"):
        raise ConfigError(
            f"the patch was made on a model with another patch on it ({below[0]['method']}, hash {below[0]['hash'][:12]}); merge the two "
            "first (`safegen patch merge`), and carry that"
        )
    if base.hash == target.hash:
        raise ConfigError(
            f"{base.name!r} and {target.name!r} have the same weights: the patch fits as it is"
        )
    own, there = (dict(model.denoiser.named_parameters()) for model in (base, target))
    out, change, drift, size = {}, 0.0, 0.0, 0.0
    for name, value in patch.tensors.items():
        old, new, their = (x.detach().cpu().double() for x in (own[name], value, there[name]))
        out[name] = (their + (new - old)).float()
        if not bool(out[name].isfinite().all()):
            raise PatchError(
                f"the carried {name} has values that are not finite; look at the weights of {target.name!r}"
            )
        change, drift, size = (
            total + float(x.pow(2).sum())
            for total, x in ((change, new - old), (drift, their - old), (size, old))
        )
    far = {"change": (change / size) ** 0.5, "fine_tune": (drift / size) ** 0.5} if size else {}
    facts: dict[str, Any] = {
        "method": "carry",
        "base": target.hash,
        "base_rounded": target.cast_hashes,
        "family": target.family,
    }
    return Patch(
        out,
        facts
        | {"moved": far, "parts": [{"hash": patch.hash, "provenance": dict(patch.provenance)}]},
    )


def compare(one: Patch, other: Patch) -> Mapping[str, Any]:
    """Return how two patches differ, as plain values.

    Returns:
        `same` (whether all values are equal), `only_first`, `only_second` and `both` (counts of
        weights), `unequal` (how many of both), `distance` (|a - b| / |a| over the weights of both,
        norms over all their values), `shapes` (weights whose shapes differ), `base` (whether they
        were made on the same weights; None where one does not say).
    """
    both = sorted(one.tensors.keys() & other.tensors.keys())
    shapes = [n for n in both if one.tensors[n].shape != other.tensors[n].shape]
    pairs = [(one.tensors[n].double(), other.tensors[n].double()) for n in both if n not in shapes]
    size = sum(float(a.pow(2).sum()) for a, _ in pairs) ** 0.5
    gap = sum(float((a - b).pow(2).sum()) for a, b in pairs) ** 0.5
    bases = [p.provenance.get("base") for p in (one, other)]
    return {
        "same": one.hash == other.hash,
        "only_first": len(one.tensors.keys() - other.tensors.keys()),
        "only_second": len(other.tensors.keys() - one.tensors.keys()),
        "both": len(both),
        "unequal": sum(not torch.equal(a, b) for a, b in pairs) + len(shapes),
        "distance": gap / size if size else None,
        "shapes": shapes,
        "base": None if None in bases else bases[0] == bases[1],
    }
