"""Algebra of the closed-form edits: solved projections, and the embeddings they map.

Everything is float64, as the Gram matrices are badly conditioned.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from safegen.core.errors import ConfigError
from safegen.edits.training.samples import read_captions
from safegen.models.model import Model
from safegen.models.selectors import select_parameters
from safegen.models.text_embeddings import TextEmbeddings, TextInput, encode_batches

OBJECTS = ("image", "photo", "portrait", "picture", "painting")
STYLES = ("painting", "art", "artwork", "picture")
TEMPLATES = {
    "object": tuple(f"{kind} of {{}}" for kind in OBJECTS),
    "art": (*(f"{kind} by {{}}" for kind in STYLES), "style of {}"),
}
"""Released prompt templates by type of concept, for `expand_phrases`."""

MIN_FREE = 1e-6
"""Smallest relative length of an embedding's part that counts as a direction of its own."""

Rows = Float[Tensor, "n in"]
Square = Float[Tensor, "in in"]
Projections = Mapping[TextInput, Mapping[str, Tensor]]
"""Projections of text by name and by the part of a `Conditioning` that they read."""


class ConceptEmbeddings(NamedTuple):
    """Text embeddings of a closed-form edit that some projections read, float64."""

    erased: Rows
    """Embeddings that get new outputs, one per row, or fewer rows that are as good."""
    targets: Rows
    """Embeddings with the outputs that they get, row by row."""
    preserved: Rows
    """Embeddings that keep their outputs, one per row, or fewer rows that are as good."""


def solve_text_map(
    keys: Rows,
    targets: Rows,
    preserved: Rows,
    *,
    erase_scale: float,
    preserve_scale: float,
    lamb: float,
) -> Square:
    """Return the map M of text embeddings that gives the edited weight W M of every W.

    W' = W M minimizes a sum_i |W' k_i - W t_i|^2 + b sum_j |W' c_j - W c_j|^2 + l |W' - W|^2
    (Gandikota et al. 2023, arXiv:2308.14761, eq. 7). The normal equations are
    W' (l I + a K'K + b C'C) = W (l I + a T'K + b C'C), so one M serves every W (ours).

    Args:
        keys: text embeddings k with a new output, one per row.
        targets: text embeddings t with the output that each key gets.
        preserved: text embeddings c with an unchanged output, one per row; may be none.
        erase_scale: a, weight of the keys; unitless, >= 0.
        preserve_scale: b, weight of the preserved embeddings; unitless, >= 0.
        lamb: l, weight of the distance to W; unitless, > 0.

    Returns:
        M, float64. With a = 0 it is the identity; if nothing is preserved, inputs orthogonal to
        every key map as before.

    Raises:
        ValueError: `lamb` is not positive.
    """
    if lamb <= 0:
        raise ValueError(f"lamb must be > 0, got {lamb}")
    keys, targets, preserved = keys.double(), targets.double(), preserved.double()
    still = lamb * torch.eye(keys.shape[1], dtype=torch.float64)
    still = still + preserve_scale * preserved.T @ preserved
    gram, pull = still + erase_scale * keys.T @ keys, still + erase_scale * targets.T @ keys
    return torch.linalg.solve(gram, pull, left=False)


def reduce_rows(rows: Rows) -> Rows:
    """Return at most as many rows as columns with an equal Gram matrix (ours).

    The factor R of rows = QR has R'R = rows'rows, which is all that `solve_text_map` reads of
    preserved embeddings, and `adversarial_embeddings` of projections below each other. Its rounding
    is that of few rows; the Gram matrix of many loses two digits.
    """
    if len(rows) <= rows.shape[1]:
        return rows
    reduced: Tensor = torch.linalg.qr(rows, mode="r").R
    return reduced


def reduce_pairs(keys: Rows, targets: Rows) -> tuple[Rows, Rows]:
    """Return at most as many keys and targets as columns that give an equal map (ours).

    With keys = QR, the rows R and Q'T have R'R = K'K and (Q'T)'R = T'K, also after a linear map of
    the keys, which is all that `solve_text_map` reads of them.
    """
    if len(keys) <= keys.shape[1]:
        return keys, targets
    q, r = torch.linalg.qr(keys)
    return r, q.T @ targets


def adversarial_embeddings(
    edited: Sequence[Tensor], original: Sequence[Tensor], keys: Rows, *, ridge: float
) -> Rows:
    """Return the embeddings that the edited weights map as the original weights map `keys`.

    c' minimizes sum_W |W c' - W_0 c|^2 + k |c'|^2, so c' = (k I + sum W'W)^-1 (sum W'W_0) c
    (Gong et al. 2024, RECE, arXiv:2407.12383, eq. 8).

    Args:
        edited: projections after the edit, (out, in) each.
        original: the same projections before it, in the same order.
        keys: embeddings of the concept, one per row.
        ridge: k, weight of the squared norm of c'; unitless, > 0.

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


def project_rows(rows: Rows, basis: Float[Tensor, "k in"]) -> Rows:
    """Return rows projected onto the span of a basis: S (S'S)^+ S' c of each c.

    These are the proxies of Zhang et al. 2026, arXiv:2604.10032, eq. 9, for safe embeddings S.
    Embeddings that differ by their rounding alone, as those of start marks do, span one direction.
    """
    return rows @ torch.linalg.pinv(basis, rtol=MIN_FREE) @ basis


def null_space_map(
    keys: Rows, targets: Rows, preserved: Rows, *, rank: int | None = None
) -> Square:
    """Return the map M that gives the edited weight W M of every W, and moves nothing preserved.

    Z minimizes sum_i |W' k_i - W t_i|^2 for W' = W + Z U', where the columns of U span the
    directions that are orthogonal to the preserved embeddings, and has the least norm. For one key
    and x = U'k that is W' - W = W (t - k) x'U' / |x|^2 (Zhang et al. 2026, arXiv:2604.10032); for
    more, x' / |x|^2 becomes a pseudoinverse (ours).

    Args:
        keys: text embeddings k with a new output, one per row.
        targets: text embeddings t with the output that each key gets.
        preserved: text embeddings with an unchanged output, one per row; may be none.
        rank: number of their leading singular directions that are preserved; all if None. Others
            move by at most |Z| times the first singular value that is left out.

    Raises:
        ConfigError: a key has no part outside the preserved directions, so it cannot be erased.
    """
    keys, targets, preserved = keys.double(), targets.double(), preserved.double()
    values, directions = torch.linalg.svd(preserved, full_matrices=False)[1:]
    known = int((values > MIN_FREE * values.max()).sum()) if len(values) else 0
    held = directions[: min(known, known if rank is None else rank)]
    free = keys - keys @ held.T @ held  # (n, in)
    lengths = keys.norm(dim=1)
    counts = lengths > MIN_FREE * lengths.max()  # others are zero, as `reduce_pairs` makes them
    if bool((counts & (free.norm(dim=1) <= MIN_FREE * lengths)).any()):
        raise ConfigError(
            f"preserved directions must leave a part of every phrase, got {len(held)} of "
            f"{keys.shape[1]}. Lower preserve_share, or preserve less."
        )
    inverse = torch.linalg.pinv(free.T, atol=MIN_FREE * float(lengths.max()), rtol=0.0)  # (n, in)
    return torch.eye(keys.shape[1], dtype=torch.float64) + (targets - keys).T @ inverse


def debias_value(
    key: Float[Tensor, "k in"], attributes: Sequence[Float[Tensor, "k in"]], shares: Sequence[float]
) -> Float[Tensor, "k in"]:
    """Return an embedding moved toward attributes: c + sum_p a_p c_p.

    Its outputs become those of the debiased word: v* = W_old (c + sum_p a_p c_p)
    (Gandikota et al. 2023, arXiv:2308.14761, section on debiasing; the equation is from memory).
    The paper's search for the a_p on generated images is not implemented.

    Args:
        key: embedding of the word, a row for each position.
        attributes: embeddings of the attributes, at the same positions.
        shares: a_p of each attribute; unitless, negative to move away from it.
    """
    return key + sum(
        (share * a for share, a in zip(shares, attributes, strict=True)), torch.zeros_like(key)
    )


def expand_phrases(phrases: Sequence[str], concept_type: str) -> list[str]:
    """Return phrases, followed by each of them in the templates of a type of concept."""
    templates = TEMPLATES[concept_type]
    return [*phrases, *(text.format(phrase) for phrase in phrases for text in templates)]


def embed_concept(
    model: Model,
    weights: Projections,
    erase: Sequence[str],
    guides: Sequence[str],
    *,
    tokens: str,
    preserve: Sequence[str] = (),
    captions: Sequence[str] = (),
    debias: Mapping[str, float] | None = None,
) -> dict[TextInput, ConceptEmbeddings]:
    """Return what is erased, its targets and what is preserved, by the part of the text.

    Captions count as one: their Gram matrix is a mean over captions.

    Args:
        model: the model.
        weights: projections by the part of the text that they read; see `projections`.
        erase: phrases to erase, or to debias.
        guides: text that replaces each phrase.
        tokens: positions that are edited; see `TextEmbeddings.rows`.
        preserve: phrases to preserve: at the same positions, or with `tail` at every position, as
            UCE's first code does.
        captions: prompt lists and text files to preserve, at every position.
        debias: shares of attributes, instead of guides; see `debias_value`.

    Raises:
        ConfigError: a phrase is its own guide, so that it would not be erased.
    """
    for phrase, guide in zip(erase, guides, strict=True):
        if phrase == guide and not debias:
            raise ConfigError(
                f"guide must not be among the phrases to erase, got {guide!r}. "
                "Choose another guide."
            )
    pairs = {part: _pairs(model, part, erase, guides, tokens, debias) for part in weights}
    preserved = {part: keys[:0] for part, (keys, _) in pairs.items()}
    positions, counts = "all" if tokens == "tail" else tokens, Counter(preserve)
    _add_rows(preserved, encode_batches(model, list(counts)), positions, counts)
    listed = read_captions(captions) if captions else []
    shares = dict.fromkeys(listed, 1 / max(len(listed), 1))
    _add_rows(preserved, encode_batches(model, listed), "all", shares)
    return {part: ConceptEmbeddings(*pairs[part], rows) for part, rows in preserved.items()}


def embed_rows(
    model: Model, weights: Projections, texts: Sequence[str], tokens: str
) -> dict[TextInput, Rows]:
    """Return the embeddings of texts by the part of the text, at most as many rows as columns."""
    rows = {
        part: torch.zeros(0, next(iter(named.values())).shape[1], dtype=torch.float64)
        for part, named in weights.items()
    }
    _add_rows(rows, encode_batches(model, texts), tokens, dict.fromkeys(texts, 1.0))
    return rows


def _pairs(
    model: Model,
    part: TextInput,
    erase: Sequence[str],
    guides: Sequence[str],
    tokens: str,
    debias: Mapping[str, float] | None,
) -> tuple[Rows, Rows]:
    """Return keys and targets of phrases; see `embed_concept`."""
    texts, rest = list(debias or dict.fromkeys(guides)), iter(guides)
    encoded = (
        spans for batch in encode_batches(model, texts) for spans in batch.rows(part, tokens)
    )
    others, pairs = dict(zip(texts, encoded, strict=True)), []
    for batch in encode_batches(model, erase):
        for spans in batch.rows(part, tokens):
            aims = [others[text] for text in debias or (next(rest),)]
            for span, key in enumerate(spans):
                # Tails of different texts are cut to the shortest.
                n = min(len(key), *(len(aim[span]) for aim in aims))
                cut = [aim[span][:n] for aim in aims]
                target = debias_value(key[:n], cut, list(debias.values())) if debias else cut[0]
                pairs.append((key[:n], target))
        keys, targets = zip(*pairs, strict=True)
        pairs = [reduce_pairs(torch.cat(keys), torch.cat(targets))]
    return pairs[0]


def _add_rows(
    preserved: dict[TextInput, Rows],
    batches: Iterable[TextEmbeddings],
    tokens: str,
    weights: Mapping[str, float],
) -> None:
    """Add the embeddings of texts; the Gram matrix of each counts with its weight."""
    for batch in batches:
        for part, known in preserved.items():
            texts = zip(batch.texts, batch.rows(part, tokens), strict=True)
            rows = [weights[text] ** 0.5 * row for text, spans in texts for row in spans]
            preserved[part] = reduce_rows(torch.cat([known, *rows]))


def apply_maps(weights: Projections, maps: Mapping[TextInput, Tensor]) -> dict[str, Tensor]:
    """Return each projection after a map of the embeddings that it reads, by name."""
    return {
        name: weight @ maps[part]
        for part, named in weights.items()
        for name, weight in named.items()
    }


def projections(model: Model) -> dict[TextInput, dict[str, Tensor]]:
    """Return the projections that read text by name and by what they read, float64, on the CPU.

    In a UNet these are the keys and values of cross-attention. A transformer has keys and values of
    text too, but only its `context_embedder` and the first layer of its `text_embedder` map the
    embeddings themselves, the others what earlier blocks made of them (as in the code of UCE for
    FLUX, arXiv:2308.14761). The two read different embeddings and are solved apart.
    """
    parameters = dict(model.denoiser.named_parameters())
    selector = "kv2" if model.denoiser_name == "unet" else "context"
    weights: dict[TextInput, dict[str, Tensor]] = {}
    for name in select_parameters(model.denoiser, selector):
        if name.endswith(".weight"):
            part: TextInput = "pooled" if ".text_embedder." in name else "hidden"
            weights.setdefault(part, {})[name] = parameters[name].detach().cpu().double()
    return weights


def embed(
    model: Model, texts: Sequence[str], *, part: TextInput, tokens: str
) -> list[list[Tensor]]:
    """Return the embeddings of each text by span; see `TextEmbeddings.rows`."""
    batches = encode_batches(model, texts)
    return [spans for batch in batches for spans in batch.rows(part, tokens)]
