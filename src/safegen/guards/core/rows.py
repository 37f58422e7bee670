"""Rows of a denoiser call: selection, replacement, and the check of rows that guards return."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from safegen.guards.core.adapter import TextEmbeds
from safegen.guards.core.result import InvalidResultError

EMBEDS, EXTRA = "encoder_hidden_states", "added_cond_kwargs"
"""Arguments of a denoiser with the text embeddings and with `TextEmbeds.extra`."""
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


def check_embeds(value: Any, like: TextEmbeds, method: str) -> TextEmbeds:
    """Return embeddings that a guard's method returned, with the dtype and device of others.

    `TextEmbeds.expand` repeats one row for all images.

    Raises:
        InvalidResultError: they have other shapes or keys, or are no embeddings.
    """
    if not isinstance(value, TextEmbeds):
        raise InvalidResultError(f"{method} must return TextEmbeds, got {type(value).__name__}")
    if value.extra.keys() != like.extra.keys():
        raise InvalidResultError(
            f"{method} must return {sorted(like.extra)}, got {sorted(value.extra)}"
        )
    check_tensor(value.hidden, like.hidden, method)
    for key, tensor in like.extra.items():
        check_tensor(value.extra[key], tensor, method)
    return value.to(like.hidden)


def replace_inputs(
    args: Args, kwargs: Kwargs, rows: int, selection: Sequence[int], embeds: TextEmbeds | None
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
        args, kwargs = select_rows(args, rows, selection), select_rows(kwargs, rows, selection)
    if embeds is not None:
        kwargs = kwargs | {EMBEDS: embeds.hidden}
        if embeds.extra:
            kwargs[EXTRA] = kwargs[EXTRA] | dict(embeds.extra)
    return args, kwargs


def select_rows(value: Any, rows: int, selection: Sequence[int]) -> Any:
    """Return arguments with some rows of every tensor that has `rows` rows."""
    if isinstance(value, Tensor):
        return value[list(selection)] if value.dim() and len(value) == rows else value
    if isinstance(value, dict):
        return {k: select_rows(v, rows, selection) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(select_rows(v, rows, selection) for v in value)
    return value
