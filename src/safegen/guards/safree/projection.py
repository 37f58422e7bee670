"""SAFREE's projection: trigger tokens of a prompt, and their embeddings without the concept.

From arXiv:2410.12761. Where the denoiser uses several text encoders, as in SDXL and SD 3, each has
its own triggers and projectors, which act in the encoder's rows and columns of the embedding. The
released script for SDXL uses the second encoder alone; the one for SD 3 counts T5's tokens and
projects rows of the CLIPs. The pooled embedding stays unchanged, as released.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from safegen.guards.core.result import InvalidResultError
from safegen.models.text_encoder import TextEncoderView

Order = Literal["code", "paper"]
MAX_COPIES = 77
"""Masked copies of a prompt that are encoded at once: all those of a CLIP, not of a T5."""


@dataclass(frozen=True)
class ProjectionConfig:
    """How a prompt is projected."""

    alpha: float
    """See `triggers`."""
    order: Order
    """See `combined_projector`."""
    distance: bool
    """Whether to compute how far the projection moves the prompt."""


@dataclass(frozen=True)
class EncoderProjection:
    """Projection of one prompt in the rows and columns of one text encoder."""

    start: int
    """Row of the first own token."""
    columns: slice
    triggers: list[int]
    """Indices of the trigger tokens."""
    projector: Tensor
    """(width, width) of the encoder."""


@dataclass(frozen=True)
class Projection:
    """Projection of one prompt, encoder by encoder."""

    encoders: tuple[EncoderProjection, ...]
    distance: float = 0.0
    """How far it moves the prompt, see `projection_distance`; 0 if not computed."""

    @property
    def triggers(self) -> list[int]:
        """Tokens that are triggers to any encoder."""
        return sorted({j for encoder in self.encoders for j in encoder.triggers})


def concept_projectors(encoders: Sequence[TextEncoderView], phrases: Sequence[str]) -> list[Tensor]:
    """Return the projector (width, width) onto the span of phrases, for each encoder."""
    return [span(encoder.pooled_texts(phrases)) for encoder in encoders]


def project_prompt(
    encoders: Sequence[TextEncoderView],
    prompt: str,
    concept: Sequence[Tensor],
    config: ProjectionConfig,
) -> Projection:
    """Return the projection of a prompt, from one batch of its n masked copies per encoder.

    Args:
        encoders: text encoders of the pipeline, in the order of their columns.
        prompt: prompt to project.
        concept: P_C of each encoder, see `concept_projectors`.
        config: how to project it.
    """
    parts, hidden = list[EncoderProjection](), list[Tensor]()
    for encoder, concept_projector in zip(encoders, concept, strict=True):
        ids, n = encoder.tokenize(prompt)
        if n < 1:
            return Projection(())
        masked = ids.repeat(n, 1)
        first = encoder.first
        masked[range(n), range(first, first + n)] = 0  # id 0: a masked token, as released
        copies = masked.split(MAX_COPIES)
        pooled = torch.cat([encoder.pooled(c, [n] * len(c)) for c in copies])  # (n, width)
        flags = triggers(pooled, concept_projector, alpha=config.alpha)
        columns = slice(encoder.column, encoder.column + len(concept_projector))
        projector = combined_projector(concept_projector, span(pooled), order=config.order)
        indices = [j for j, flag in enumerate(flags) if flag]
        parts.append(EncoderProjection(encoder.row + first, columns, indices, projector))
        hidden += [encoder.hidden(ids)[0, : first + n + 1]] if config.distance else []
    projection = Projection(tuple(parts))
    if not config.distance:
        return projection
    return replace(projection, distance=_distance(parts, hidden))


def _distance(parts: Sequence[EncoderProjection], hidden: Sequence[Tensor]) -> float:
    """Return how far projections move a prompt: the mean over all tokens of `projection_distance`.

    Encoders with the same rows share their tokens: their columns stand side by side.
    """
    total, count = 0.0, 0
    for start in dict.fromkeys(part.start for part in parts):
        same = [k for k, part in enumerate(parts) if part.start == start]
        tokens = torch.cat([hidden[k] for k in same], dim=1)
        projector = torch.block_diag(*(parts[k].projector for k in same))
        if len(same) == len(parts):
            return projection_distance(tokens, projector)
        total += projection_distance(tokens, projector) * len(tokens)
        count += len(tokens)
    return total / count


def apply_projection(row: Tensor, projection: Projection, strength: float) -> Tensor:
    """Return a prompt's embedding (tokens, width) with its triggers moved `strength` of the way.

    Triggers beyond the end of the embedding are left out: a call may read fewer tokens.
    """
    edited = row.clone()
    for encoder in projection.encoders:
        tokens = [j for j in (encoder.start + k for k in encoder.triggers) if j < len(row)]
        if tokens:
            old = row[tokens, encoder.columns].float()
            new = torch.lerp(old, old @ encoder.projector.T, strength)
            edited[tokens, encoder.columns] = new.to(row)
    return edited


def span(vectors: Tensor) -> Tensor:
    """Return the orthogonal projector (width, width) onto the span of vectors (n, width).

    C (C^T C)^+ C^T with C = vectors^T (Yoon et al. 2024, arXiv:2410.12761, eq. 2), by its singular
    vectors, which is the same and more stable.

    Raises:
        InvalidResultError: the vectors have no span, with which nothing would be projected.
    """
    if not (vectors.isfinite().all() and vectors.any()):
        raise InvalidResultError("text embeddings must be finite, and not all zero")
    u, s, _ = torch.linalg.svd(vectors.float().T, full_matrices=False)
    u = u[:, s > s.max() * 1e-5]
    return u @ u.T


def triggers(pooled: Tensor, concept: Tensor, *, alpha: float) -> list[bool]:
    """Return which tokens are triggers: without them the prompt is farther from the concept's span.

    d_j = |(I - P_C) m_j|; token j is a trigger if d_j >= (1 + alpha) mean over k != j of d_k; a
    single token is one (arXiv:2410.12761, eqs. 3, 4, as released).

    Args:
        pooled: (n, width) pooled embeddings m_j of the prompt with token j masked.
        concept: P_C, (width, width).
        alpha: unitless, >= 0.
    """
    d = (pooled - pooled @ concept).norm(dim=1)
    if len(d) == 1:
        return [True]
    others = (d.sum() - d) / (len(d) - 1)
    return (d >= (1 + alpha) * others).tolist()


def combined_projector(concept: Tensor, prompt: Tensor, *, order: Order) -> Tensor:
    """Return the projector onto the prompt's span without the concept's.

    (I - P_C) P_I as released, P_I (I - P_C) as the paper prints it.
    """
    complement = torch.eye(len(concept)).to(concept) - concept
    return complement @ prompt if order == "code" else prompt @ complement


def projection_distance(hidden: Tensor, projector: Tensor) -> float:
    """Return beta: 1 - the mean cosine of a prompt's tokens (tokens, width) before and after."""
    cosine = torch.nn.functional.cosine_similarity(hidden, hidden @ projector.T, dim=1)
    return 1 - float(cosine.mean())
