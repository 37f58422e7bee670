"""Algebra of the closed-form edits: solved projections, and the embeddings they map.

Everything is float64, as the Gram matrices are badly conditioned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from safegen.core.errors import ConfigError
from safegen.edits.training.samples import read_captions
from safegen.models.families.conditioning import Conditioning
from safegen.models.families.pipeline_specs import encode_texts
from safegen.models.model import Model
from safegen.models.selectors import select_parameters

OBJECTS = ("image", "photo", "portrait", "picture", "painting")
STYLES = ("painting", "art", "artwork", "picture")
TEMPLATES = {
    "object": tuple(f"{kind} of {{}}" for kind in OBJECTS),
    "art": (*(f"{kind} by {{}}" for kind in STYLES), "style of {}"),
}
"""Released prompt templates by type of concept, for `expand_phrases`."""
TEXTS_AT_ONCE = 64
"""Texts that are encoded in one call."""

Weight = Float[Tensor, "out in"]
TextInput = Literal["hidden", "pooled"]
"""Part of a `Conditioning` that a projection reads."""


def solve_projection(
    w_old: Weight,
    keys: Float[Tensor, "n in"],
    values: Float[Tensor, "n out"],
    preserved: Float[Tensor, "m in"],
    *,
    erase_scale: float,
    preserve_scale: float,
    lamb: float,
) -> Weight:
    """Return the weight that maps each key to its value and changes little else.

    Minimizes a sum_i |W k_i - v_i|^2 + b sum_j |W c_j - W_old c_j|^2 + l |W - W_old|^2. The normal
    equations are W (l I + a K'K + b C'C) = l W_old + a V'K + b W_old C'C (Gandikota et al. 2023,
    arXiv:2308.14761, eq. 7).

    Args:
        w_old: projection before the edit.
        keys: text embeddings with a new output, one per row.
        values: wanted output for each key, in the units of `w_old @ key`.
        preserved: text embeddings with an unchanged output, one per row; may be none.
        erase_scale: a, weight of the keys; unitless, >= 0.
        preserve_scale: b, weight of the preserved embeddings; unitless, >= 0.
        lamb: l, weight of the distance to `w_old`; unitless, > 0.

    Returns:
        The new weight, float64. Inputs orthogonal to every key map as before; with a = 0 it is
        `w_old`.

    Raises:
        ValueError: `lamb` is not positive.
    """
    if lamb <= 0:
        raise ValueError(f"lamb must be > 0, got {lamb}")
    w_old, keys, values = w_old.double(), keys.double(), values.double()
    preserved = preserved.double()
    still = (
        lamb * torch.eye(w_old.shape[1], dtype=torch.float64)
        + preserve_scale * preserved.T @ preserved
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


class ConceptEmbeddings(NamedTuple):
    """Text embeddings of a closed-form edit that some projections read, one per row."""

    erased: Tensor
    """Embeddings that get new outputs, (n, width)."""
    targets: Tensor
    """Embeddings with the outputs that they get, (n, width)."""
    preserved: Tensor
    """Embeddings that keep their outputs, (m, width), or fewer rows that are as good."""


def expand_phrases(phrases: Sequence[str], concept_type: str) -> list[str]:
    """Return phrases, followed by each of them in the templates of a type of concept."""
    templates = TEMPLATES[concept_type]
    return [*phrases, *(text.format(phrase) for phrase in phrases for text in templates)]


def embed_concept(
    model: Model,
    erase: Sequence[str],
    guides: Sequence[str],
    *,
    part: TextInput,
    tokens: str,
    preserve: Sequence[str] = (),
    captions: Sequence[str] = (),
    debias: Mapping[str, float] | None = None,
) -> ConceptEmbeddings:
    """Return the embeddings that are erased, their targets, and those that are preserved.

    Captions count as one: their rows are scaled so that their Gram matrix is a mean over captions.

    Args:
        model: the model.
        erase: phrases to erase, or to debias.
        guides: text that replaces each phrase.
        part: which embeddings.
        tokens: positions that are edited; see `embed`.
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
    texts = list(debias or dict.fromkeys(guides))
    others = dict(zip(texts, embed(model, texts, part=part, tokens=tokens), strict=True))
    keys, targets = [], []
    for key_spans, guide in zip(embed(model, erase, part=part, tokens=tokens), guides, strict=True):
        for span, key in enumerate(key_spans):
            # Tails of different texts are cut to the shortest.
            n = min(len(key), *(len(others[text][span]) for text in debias or (guide,)))
            keys.append(key[:n])
            if debias:
                attributes = [other[span][:n] for other in others.values()]
                targets.append(debias_value(key[:n], attributes, list(debias.values())))
            else:
                targets.append(others[guide][span][:n])
    erased = torch.cat(keys)
    positions = "all" if tokens == "tail" else tokens
    phrases = embed(model, preserve, part=part, tokens=positions) if preserve else []
    preserved = torch.cat([erased[:0], *(rows for spans in phrases for rows in spans)])
    listed = read_captions(captions) if captions else []
    for start in range(0, len(listed), TEXTS_AT_ONCE):
        texts = listed[start : start + TEXTS_AT_ONCE]
        rows = [row for spans in embed(model, texts, part=part, tokens="all") for row in spans]
        preserved = reduce_rows(torch.cat([preserved, torch.cat(rows) / len(listed) ** 0.5]))
    return ConceptEmbeddings(erased, torch.cat(targets), preserved)


def reduce_rows(rows: Float[Tensor, "m in"]) -> Float[Tensor, "k in"]:
    """Return at most as many rows as columns with an equal Gram matrix (ours).

    The factor R of rows = QR has R'R = rows'rows, which is all that `solve_projection` reads of
    preserved embeddings.
    """
    if len(rows) <= rows.shape[1]:
        return rows
    reduced: Tensor = torch.linalg.qr(rows, mode="r").R
    return reduced


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
    """Return the embeddings of each text, (k, width) for each of its spans, float64, on the CPU.

    An empty text has the embedding of its marks, also where guidance uses zeros.

    Args:
        model: the model.
        texts: the texts.
        part: `hidden` has a span for each encoder with tokens of its own, such as CLIP and
            T5 of SD 3; `pooled` is one row.
        tokens: positions in a span. `last` is the last token of the text (of an empty text, the
            first), `tail` everything from there on, `all` every position, padding included.
    """
    starts = range(0, len(texts), TEXTS_AT_ONCE)
    parts = [list(texts[i : i + TEXTS_AT_ONCE]) for i in starts]
    encoded = Conditioning.concat([encode_texts(model.pipeline, part) for part in parts])
    if part == "pooled":
        assert encoded.pooled is not None
        return [[row[None]] for row in encoded.pooled.cpu().double()]
    embeddings = []
    for rows, spans in zip(
        encoded.hidden.cpu().double(), model.token_spans(list(texts)), strict=True
    ):
        chosen = {
            "last": [(last, last + 1) for _, last, _ in spans],
            "tail": [(last, stop) for _, last, stop in spans],
            "all": [(start, stop) for start, _, stop in spans],
        }
        embeddings.append([rows[start:stop] for start, stop in chosen[tokens]])
    return embeddings
