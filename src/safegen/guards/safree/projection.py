"""SAFREE's projection: which tokens of a prompt lead to a concept, and what is left of their embeddings without it (arXiv:2410.12761).

Where the denoiser is conditioned on several text encoders, as SDXL's is, each finds its own
triggers and has projectors of its own. The released script for SDXL goes by the second alone; ours
goes by both. The pooled embedding stays as it is, in both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class ProjectionConfig:
    """How a prompt is looked at."""

    alpha: float
    """See `triggers`."""
    order: Literal["code", "paper"]
    """See `both`."""
    distance: bool
    """Whether it is asked how far the projection moves the prompt."""


@dataclass(frozen=True)
class EncoderProjection:
    """What is done with one prompt in one encoder's columns of its embedding."""

    columns: slice
    triggers: list[int]
    """Which of its tokens are."""
    projector: Tensor
    """(width, width) of the encoder."""


@dataclass(frozen=True)
class Projection:
    """What is done with one prompt, encoder by encoder."""

    encoders: tuple[EncoderProjection, ...]
    distance: float = 0.0
    """How far it moves the prompt, see `shift`; 0 where nobody asks."""

    @property
    def triggers(self) -> list[int]:
        """Tokens that are triggers to any encoder."""
        return sorted({j for part in self.encoders for j in part.triggers})

    @property
    def projector(self) -> Tensor:
        """The projector of whole embeddings, (width, width)."""
        return torch.block_diag(*(part.projector for part in self.encoders))


class TextEncoderView:
    """One text encoder of a Stable Diffusion pipeline, token by token."""

    def __init__(self, pipe: Any, name: str = "text_encoder") -> None:
        self.tokenizer, self.tower = (
            getattr(pipe, name.replace("text_encoder", "tokenizer")),
            getattr(pipe, name),
        )
        self.device, self.several = pipe._execution_device, hasattr(pipe, "text_encoder_2")

    def ids(self, text: str) -> tuple[Tensor, int]:
        """Return a prompt's padded ids (1, tokens), cut to what the encoder reads, and how many tokens of it are its own."""
        found = self.tokenizer(
            [text],
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        return found.input_ids.to(self.device), int(found.attention_mask.sum()) - 2

    @torch.no_grad()
    def hidden(self, ids: Tensor) -> Tensor:
        """Return the embeddings (n, tokens, width) that the denoiser is conditioned on, in fp32."""
        with torch.autocast(ids.device.type, enabled=False):
            out: Tensor = (
                self.tower(ids, output_hidden_states=True).hidden_states[-2]
                if self.several
                else self.tower(ids)[0]
            )
        return out.float()

    @torch.no_grad()
    def pooled(self, ids: Tensor) -> Tensor:
        """Return the embedding at each text's end (n, width), after the last norm, and projected if the encoder has that, in fp32."""
        with torch.autocast(ids.device.type, enabled=False):
            found = self.tower(ids)
        out: Tensor = found.text_embeds if hasattr(found, "text_embeds") else found.pooler_output
        return out.float()

    def pooled_texts(self, texts: Sequence[str]) -> Tensor:
        """Return the pooled embeddings of texts, (n, width)."""
        return self.pooled(torch.cat([self.ids(text)[0] for text in texts]))


def text_encoders(pipe: Any) -> list[TextEncoderView]:
    """Return a pipeline's text encoders in the order in which their embeddings stand side by side."""
    return [
        TextEncoderView(pipe, name)
        for name in ("text_encoder", "text_encoder_2")
        if getattr(pipe, name, None) is not None
    ]


def concept_projectors(encoders: Sequence[TextEncoderView], phrases: Sequence[str]) -> list[Tensor]:
    """Return the projector onto the span of some phrases, (width, width), for each encoder."""
    return [span(reader.pooled_texts(phrases)) for reader in encoders]


def project_prompt(
    encoders: Sequence[TextEncoderView],
    prompt: str,
    concept: Sequence[Tensor],
    rule: ProjectionConfig,
) -> Projection:
    """Return what SAFREE does with a prompt, from one batch of its n copies with one token masked in each, an encoder.

    Args:
        encoders: see `readers`.
        prompt: the prompt.
        concept: P_C of each encoder, see `spans`.
        rule: how it is looked at.
    """
    parts, hidden, start = list[EncoderProjection](), list[Tensor](), 0
    for reader, own in zip(encoders, concept, strict=True):
        ids, n = reader.ids(prompt)
        if n < 1:
            return Projection(())
        masked = ids.repeat(n, 1)
        masked[range(n), range(1, n + 1)] = 0  # id 0 stands for a masked token, as released
        pooled = reader.pooled(masked)  # (n, width)
        hits = [j for j, hit in enumerate(triggers(pooled, own, alpha=rule.alpha)) if hit]
        parts.append(
            EncoderProjection(
                slice(start, start + len(own)),
                hits,
                combined_projector(own, span(pooled), order=rule.order),
            )
        )
        hidden += [reader.hidden(ids)[0, : n + 2]] if rule.distance else []
        start += len(own)
    way = Projection(tuple(parts))
    return (
        replace(way, distance=projection_distance(torch.cat(hidden, dim=1), way.projector))
        if rule.distance
        else way
    )


def projected(row: Tensor, way: Projection, strength: float) -> Tensor:
    """Return a prompt's embedding (tokens, width) with its triggers moved `strength` of the way to their projection; all else stays."""
    out = row.clone()
    for part in way.encoders:
        at = [j + 1 for j in part.triggers]  # the first token marks the beginning
        if at:
            old = row[at, part.columns].float()
            out[at, part.columns] = torch.lerp(old, old @ part.projector.T, strength).to(row)
    return out


def span(vectors: Tensor) -> Tensor:
    """Return the orthogonal projector (width, width) onto the span of some vectors (n, width).

    C (C^T C)^+ C^T with C = vectors^T (Yoon et al. 2024, arXiv:2410.12761, eq. 2), by its singular
    vectors, which is the same and stabler.
    """
    u, s, _ = torch.linalg.svd(vectors.float().T, full_matrices=False)
    u = u[:, s > s.max() * 1e-5]
    return u @ u.T


def triggers(pooled: Tensor, concept: Tensor, *, alpha: float) -> list[bool]:
    """Return which tokens lead a prompt toward a concept: without them it is farther from the concept's span than without others.

    d_j = |(I - P_C) m_j|; token j is a trigger if d_j >= (1 + alpha) mean over k != j of d_k; a
    token that is alone is one (arXiv:2410.12761, eqs. 3, 4, as released).

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


def combined_projector(
    concept: Tensor, prompt: Tensor, *, order: Literal["code", "paper"]
) -> Tensor:
    """Return the projector onto the prompt's span without the concept's: (I - P_C) P_I as released, P_I (I - P_C) as the paper prints."""
    out = torch.eye(len(concept)).to(concept) - concept
    return out @ prompt if order == "code" else prompt @ out


def projection_distance(hidden: Tensor, projector: Tensor) -> float:
    """Return beta, how far the projection moves a prompt: 1 - the mean cosine of its tokens (tokens, width) before and after."""
    return 1 - float(
        torch.nn.functional.cosine_similarity(hidden, hidden @ projector.T, dim=1).mean()
    )
