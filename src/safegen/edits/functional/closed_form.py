"""The algebra of text-side edits that are solved, not trained.

Float64 throughout: the Gram matrices are badly conditioned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from safegen.models.model import Model
from safegen.models.selectors import select_parameters

Weight = Float[Tensor, "out in"]


def solve_projection(
    w_old: Weight,
    keys: Float[Tensor, "n in"],
    values: Float[Tensor, "n out"],
    kept: Float[Tensor, "m in"],
    *,
    erase_scale: float,
    preserve_scale: float,
    stay: float,
) -> Weight:
    """Return the weight that sends each key to its value and changes little else.

    Minimises a sum_i |W k_i - v_i|^2 + b sum_j |W c_j - W_old c_j|^2 + l |W - W_old|^2, whose
    normal equations are W (l I + a K'K + b C'C) = l W_old + a V'K + b W_old C'C (Gandikota et al.
    2023, arXiv:2308.14761, eq. 7).

    Args:
        w_old: projection before the edit.
        keys: text embeddings whose output changes, one per row.
        values: wanted output for each key, in the units of `w_old @ key`.
        kept: text embeddings whose output should stay, one per row; may be none.
        erase_scale: a, weight of the keys; unitless, >= 0.
        preserve_scale: b, weight of the kept; unitless, >= 0.
        stay: l, weight of not moving at all; unitless, > 0.

    Returns:
        The new weight, float64. Inputs orthogonal to every key map as before; with a = 0 it is
        `w_old`.

    Raises:
        ValueError: `stay` is not positive.
    """
    if stay <= 0:
        raise ValueError(f"stay must be > 0, got {stay}")
    w_old, keys, values, kept = w_old.double(), keys.double(), values.double(), kept.double()
    still = (
        stay * torch.eye(w_old.shape[1], dtype=torch.float64) + preserve_scale * kept.T @ kept
    )  # (in, in)
    gram = still + erase_scale * keys.T @ keys
    pull = w_old @ still + erase_scale * values.T @ keys  # (out, in)
    return torch.linalg.solve(gram, pull, left=False)


def adversarial_embeddings(
    edited: Sequence[Tensor],
    original: Sequence[Tensor],
    keys: Float[Tensor, "n in"],
    *,
    ridge: float,
) -> Float[Tensor, "n in"]:
    """Return the embeddings that make the edited weights answer as the original ones answered `keys`.

    c' minimises sum_W |W c' - W_0 c|^2 + k |c'|^2, so c' = (k I + sum W'W)^-1 (sum W'W_0) c
    (Gong et al. 2024, RECE, arXiv:2407.12383, eq. 8).

    Args:
        edited: projections after the edit, (out, in) each.
        original: the same projections before it, in the same order.
        keys: embeddings of the concept, one per row.
        ridge: k, weight of staying short; unitless, > 0.

    Raises:
        ValueError: `ridge` is not positive.
    """
    if ridge <= 0:
        raise ValueError(f"ridge must be > 0, got {ridge}")
    width = keys.shape[1]
    gram = ridge * torch.eye(width, dtype=torch.float64, device=keys.device)
    cross = torch.zeros_like(gram)
    for w, w_0 in zip(edited, original, strict=True):
        gram = gram + w.double().T @ w.double()
        cross = cross + w.double().T @ w_0.double()
    return torch.linalg.solve(gram, cross @ keys.double().T).T


def debias_value(
    key: Float[Tensor, "k in"], attributes: Sequence[Float[Tensor, "k in"]], shares: Sequence[float]
) -> Float[Tensor, "k in"]:
    """Return a word's embedding leaning toward attributes: c + sum_p a_p c_p, whose keys and values the word gets when it is debiased.

    Gandikota et al. 2023, arXiv:2308.14761, section on debiasing: v* = W_old (c + sum_p a_p c_p).
    The equation is from memory, the paper's search for the a_p by looking at pictures is not here.

    Args:
        key: the word, a row for each position.
        attributes: of the same positions.
        shares: a_p, one for each attribute; unitless, negative to lean away.
    """
    return key + sum(
        (share * one for share, one in zip(shares, attributes, strict=True)), torch.zeros_like(key)
    )


def projections(model: Model) -> dict[str, Tensor]:
    """Return the key and value projections of every cross-attention layer by name: all weights that read the text. Float64, on the CPU."""
    own = dict(model.denoiser.named_parameters())
    return {
        name: own[name].detach().cpu().double()
        for name in select_parameters(model.denoiser, "kv2")
        if name.endswith(".weight")
    }


def embed(model: Model, texts: Sequence[str], *, tokens: str) -> list[Tensor]:
    """Return the text embeddings of each text, (k, width), float64, on the CPU.

    Args:
        model: whose text encoder speaks.
        texts: what to encode.
        tokens: `last` gives the last token of the text itself (of an empty one, the start mark),
            `tail` everything from there on, `all` every position; padding included.
    """
    out = []
    for rows, end in zip(
        model.encode_text(list(texts)).cpu().double(),
        model.last_token_positions(list(texts)),
        strict=True,
    ):
        first, last = {"last": (end, end + 1), "tail": (end, len(rows)), "all": (0, len(rows))}[
            tokens
        ]
        out.append(rows[first:last])
    return out


def as_patch(edited: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return solved weights in the precision of a patch."""
    return {name: value.float() for name, value in edited.items()}
