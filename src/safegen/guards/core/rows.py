"""Rows of a denoiser call: selection, replacement, and the check of rows that guards return."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from safegen.guards.core.result import InvalidResultError
from safegen.models.families.conditioning import Conditioning
from safegen.models.families.denoisers import UNBATCHED_ARGUMENTS, replace_text

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


def check_tensor(value: Any, like: Tensor, method: str) -> Tensor:
    """Return a tensor that a guard's method returned, if it has the shape of another.

    One row for several images is refused too: it would give all images the answer for one.

    Raises:
        InvalidResultError: it has another shape, or is no tensor.
    """
    if not isinstance(value, Tensor):
        raise InvalidResultError(f"{method} must return a tensor, got {type(value).__name__}")
    if value.shape != like.shape:
        raise InvalidResultError(
            f"{method} must return shape {tuple(like.shape)}, got {tuple(value.shape)}"
        )
    return value


def check_embeds(value: Any, like: Conditioning, method: str) -> Conditioning:
    """Return embeddings that a guard's method returned, with the dtype and device of others.

    `Conditioning.expand` repeats one row for all images.

    Raises:
        InvalidResultError: they have other parts or shapes, or are no embeddings.
    """
    if not isinstance(value, Conditioning):
        raise InvalidResultError(f"{method} must return a Conditioning, got {type(value).__name__}")
    if value.added or (value.pooled is None) != (like.pooled is None):
        parts = "hidden" if like.pooled is None else "hidden and pooled"
        raise InvalidResultError(f"{method} must return a Conditioning of {parts} alone")
    check_tensor(value.hidden, like.hidden, method)
    if like.pooled is not None:
        check_tensor(value.pooled, like.pooled, method)
    return value.to(like.hidden)


def replace_inputs(
    args: Args, kwargs: Kwargs, rows: int, selection: Sequence[int], embeds: Conditioning | None
) -> tuple[Args, Kwargs]:
    """Return a denoiser's arguments with selected rows and other embeddings.

    Args:
        args: positional arguments.
        kwargs: keyword arguments.
        rows: number of rows; tensors of this length are selected from.
        selection: rows to select; all if empty.
        embeds: embeddings to use; None keeps those in `kwargs`.
    """
    if selection:
        unbatched = {k: v for k, v in kwargs.items() if k in UNBATCHED_ARGUMENTS}
        args = select_rows(args, rows, selection)
        kwargs = select_rows(kwargs, rows, selection) | unbatched
    return args, kwargs if embeds is None else replace_text(kwargs, embeds)


def select_rows(value: Any, rows: int, selection: Sequence[int]) -> Any:
    """Return arguments with some rows of every tensor that has `rows` rows."""
    if isinstance(value, Tensor):
        return value[list(selection)] if value.dim() and len(value) == rows else value
    if isinstance(value, dict):
        return {k: select_rows(v, rows, selection) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(select_rows(v, rows, selection) for v in value)
    return value
