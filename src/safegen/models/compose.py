"""Several patches as one, and how two differ."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from safegen.errors import BadPatch, BadSetting
from safegen.models.model import Model
from safegen.models.patch import Overwritten, Patch

Overlap = Literal["refuse", "add", "last"]


def overlapping(patches: Sequence[Patch]) -> list[str]:
    """Return the weights that more than one patch changes, sorted."""
    seen: set[str] = set()
    twice: set[str] = set()
    for patch in patches:
        twice |= seen & patch.tensors.keys()
        seen |= patch.tensors.keys()
    return sorted(twice)


def warn_of_overlap(patches: Sequence[Patch]) -> None:
    """Warn where patches that are put on one after the other change the same weights: of those, only the last change is left.

    Warns:
        Overwritten: they do.
    """
    if twice := overlapping(patches):
        warnings.warn(
            f"{len(twice)} weights are changed by more than one patch, {twice[0]} first, and the last patch counts; "
            "`safegen patch merge --overlap add` adds the changes up",
            Overwritten,
            stacklevel=3,
        )


@torch.no_grad()
def merge(patches: Sequence[Patch], *, overlap: Overlap = "refuse", model: Model | None = None) -> Patch:
    """Return one patch that does what several do, put on one after the other.

    Args:
        patches: at least two, made on one base.
        overlap: for weights that several change: `refuse`, `add` the changes up (needs the model they are changes of), or keep the `last`.
        model: the base, without patches on it; needed to add. Given, every patch must fit it.

    Raises:
        BadSetting: fewer than two patches, weights overlap and that is refused, or `add` has no model.
        BadPatch: the patches are of different bases or families, or one does not fit the model.
    """
    if len(patches) < 2:
        raise BadSetting(f"merging needs at least two patches, got {len(patches)}")
    bases = {str(base) for p in patches if (base := p.provenance.get("base")) is not None}
    if len(bases) > 1:
        raise BadPatch(f"the patches were made on different weights ({', '.join(sorted(b[:12] for b in bases))}); merge those of one base")
    families = {str(family) for p in patches if (family := p.provenance.get("family")) is not None}
    if len(families) > 1:
        raise BadPatch(f"the patches were made for different families ({'; '.join(sorted(families))}); merge those of one")
    if model is not None:
        for patch in patches:
            patch.fits(model)
    twice = overlapping(patches)
    if twice and overlap == "refuse":
        raise BadSetting(
            f"{len(twice)} weights are changed by more than one patch, {twice[0]} first; choose what becomes of them: add or last"
        )
    out = {name: value for patch in patches for name, value in patch.tensors.items()}
    if twice and overlap == "add":
        if model is None:
            raise BadSetting("adding changes up needs the model that they are changes of; name it")
        own = dict(model.denoiser.named_parameters())
        for name in twice:
            before = own[name].detach().cpu().double()
            moves = [p.tensors[name].detach().cpu().double() - before for p in patches if name in p.tensors]
            out[name] = (before + torch.stack(moves).sum(0)).float()
    facts: dict[str, Any] = {"method": "merge", "overlap": overlap if twice else None, "overlapping": len(twice)}
    facts |= {"base": bases.pop()} if bases else {}
    facts |= {"family": families.pop()} if families else {}
    merged = {p.hash for p in patches}
    under = {b["hash"]: b for p in patches for b in p.provenance.get("under", ()) if b["hash"] not in merged}
    facts |= {"under": list(under.values())} if under else {}
    return Patch(out, facts | {"parts": [{"hash": p.hash, "provenance": dict(p.provenance)} for p in patches]})


def differ(one: Patch, other: Patch) -> Mapping[str, Any]:
    """Return how two patches differ, as plain values.

    Returns:
        `same` (whether all values are equal), `only_first`, `only_second` and `both` (counts of weights), `unequal` (how many of both),
        `distance` (|a - b| / |a| over the weights of both, norms over all their values), `shapes` (weights whose shapes differ), `base`
        (whether they were made on the same weights; None where one does not say).
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
