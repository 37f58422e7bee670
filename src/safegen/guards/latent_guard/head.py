"""Head of Latent Guard: text features, the network, its loss, training, scores and file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from safegen.core.errors import ConfigError, FileError
from safegen.core.files import atomic_write
from safegen.guards.core.adapter import PipelineAdapter
from safegen.models.text_encoder import TextEncoderView

HEADS, INNER, OUT_FEATURES = 16, 512, 128
PICKLE_SUFFIXES = {".pt", ".pth", ".bin"}


class ClipTextFeatures:
    """Text features of a pipeline's CLIP text encoder, as Latent Guard reads them."""

    def __init__(self, adapter: PipelineAdapter) -> None:
        """Take the pipeline's first text encoder.

        Raises:
            ConfigError: it is no CLIP.
        """
        encoder: Any = getattr(adapter.pipe, "text_encoder", None)
        if not is_clip(encoder):
            raise ConfigError(
                f"text_encoder must be a CLIP for 'latent-guard', got a {type(encoder).__name__}"
            )
        self.view = TextEncoderView(adapter.pipe)
        self.width = int(encoder.config.hidden_size)
        self.device = adapter.device

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Return fp32 features (n, 1 + tokens, width): pooled embedding, then all normed tokens.

        Of a long text only what the encoder reads.
        """
        return self.encode_ids(self.token_ids(texts))

    def encode_ids(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Return the features of token ids with both ends, see `encode`.

        Args:
            rows: one list per text, no longer than the encoder reads.
        """
        ids = torch.full((len(rows), self.view.limit), self.view.tokenizer.pad_token_id)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
        hidden = self.view.normed(ids.to(self.device))
        ends = hidden[range(len(rows)), [len(row) - 1 for row in rows]]
        return torch.cat([ends[:, None], hidden], dim=1)

    def token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of texts, of a long one only what the encoder reads."""
        return [self.windows(text)[0] for text in texts]

    def probe(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Return features of each token of rows of ids, in as few rows as possible.

        They differ where a change of the encoder concerns these tokens.
        """
        used, limit = sorted({token for row in rows for token in row}), self.view.limit
        packed = [used[start : start + limit] for start in range(0, len(used), limit)]
        return self.encode_ids(packed).cpu()

    def pooled(self, texts: Sequence[str]) -> Tensor:
        """Return the pooled embeddings of texts, (n, width)."""
        return self.encode(texts)[:, 0]

    def windows(self, text: str) -> list[list[int]]:
        """Return the token ids of overlapping parts of a text that fit the encoder (ours)."""
        ids, length = self.view.token_ids(text), self.view.limit - 2
        start, *own, end = ids
        if len(own) <= length:
            return [ids]
        starts = [*range(0, len(own) - length, length // 2), len(own) - length]
        return [[start, *own[first : first + length], end] for first in starts]


class LatentGuardHead(nn.Module):
    """Cross-attention of a concept over a prompt, then a cosine (arXiv:2404.08031).

    Parameters have the names of the published file.
    """

    def __init__(
        self,
        width: int,
        *,
        heads: int = HEADS,
        inner: int = INNER,
        out_features: int = OUT_FEATURES,
    ) -> None:
        """Build the head with random weights; `inner` is split among `heads`."""
        super().__init__()
        self.width, self.heads = width, heads
        self.x1_to_key, self.x1_to_value, self.x2_to_query = (
            nn.Linear(width, inner) for _ in range(3)
        )
        self.final_mlp, self.mlp_query1 = (nn.Linear(inner, out_features) for _ in range(2))
        self.tempr = nn.Parameter(torch.tensor(1 / 0.07))

    def forward(self, prompts: Tensor, concepts: Tensor) -> Tensor:
        """Return tau cos(v', q') of every prompt with every concept, (p, c).

        a = softmax(q_h . K_h / sqrt(d)) per head h, v' = W_o [a V_h]_h, q' = W_p q, with K = W_k X,
        V = W_v X, q = W_q g.

        Args:
            prompts: X, (p, tokens, width), see `ClipTextFeatures.encode`.
            concepts: g, (c, width), see `ClipTextFeatures.pooled`.
        """
        key, value = (
            f(prompts).unflatten(-1, (self.heads, -1)) for f in (self.x1_to_key, self.x1_to_value)
        )  # (p, tokens, heads, d)
        flat = self.x2_to_query(concepts)
        query = flat.unflatten(-1, (self.heads, -1))  # (c, heads, d)
        logits = torch.einsum("chd,pthd->pcht", query, key) / query.shape[-1] ** 0.5
        attended = torch.einsum("pcht,pthd->pchd", logits.softmax(dim=-1), value).flatten(2)
        cosine = F.cosine_similarity(self.final_mlp(attended), self.mlp_query1(flat)[None], dim=-1)
        scores: Tensor = self.tempr * cosine  # (p, c)
        return scores


def contrastive_loss(unsafe: Tensor, safe: Tensor) -> Tensor:
    """Return the loss of each of n concepts, (n,).

    CE([S | 1 max_j R_kj], i) + CE([S; R]^T, i), S and R the scores of unsafe and safe prompts: each
    prompt must find its concept among all concepts and every safe prompt's best, each concept its
    prompt among all prompts (arXiv:2404.08031, as released).

    Args:
        unsafe: S, (n, n): prompt i asks for concept i.
        safe: R, (n, n): the same prompts without it.
    """
    label = torch.arange(len(unsafe), device=unsafe.device)
    rows = torch.cat(
        [unsafe, safe.max(dim=1).values[None].expand(len(unsafe), -1)], dim=1
    )  # (n, 2n)
    columns = torch.cat([unsafe, safe]).T  # (n, 2n)
    return F.cross_entropy(rows, label, reduction="none") + F.cross_entropy(
        columns, label, reduction="none"
    )


def train_head(
    adapter: PipelineAdapter,
    table: Mapping[str, Sequence[tuple[str, str]]],
    *,
    updates: int = 300,
    batch: int = 64,
    lr: float = 1e-3,
    seed: int = 0,
) -> LatentGuardHead:
    """Return a head for a pipeline's text encoder, trained on prompts with and without concepts.

    Args:
        adapter: pipeline with the text encoder.
        table: concept to pairs of a prompt with it and the same prompt without it.
        updates: number of batches; each has one random pair per concept.
        batch: concepts per batch.
        lr: learning rate of AdamW.
        seed: seed of the weights and of the batches.

    Raises:
        ConfigError: fewer than two concepts, or one without pairs.
    """
    if len(table) < 2 or not all(table.values()):
        raise ConfigError(
            f"table must have at least two concepts with a pair each, got {len(table)}: "
            f"{', '.join(sorted(table))}"
        )
    features, rng = ClipTextFeatures(adapter), torch.Generator().manual_seed(seed)
    names = sorted(table)
    concepts = features.pooled(names)
    encoded = [
        tuple(features.encode(texts) for texts in zip(*table[n], strict=True)) for n in names
    ]
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        head = LatentGuardHead(features.width).to(features.device)
        optimizer = torch.optim.AdamW(head.parameters(), lr=lr)
        for _ in range(updates):
            chosen = torch.randperm(len(names), generator=rng)[:batch].tolist()
            pairs = [
                (i, int(torch.randint(len(table[names[i]]), (1,), generator=rng))) for i in chosen
            ]
            unsafe, safe = (torch.stack([encoded[i][side][k] for i, k in pairs]) for side in (0, 1))
            scores = head(unsafe, concepts[chosen]), head(safe, concepts[chosen])
            optimizer.zero_grad()
            contrastive_loss(*scores).mean().backward()
            optimizer.step()
    return head.eval().requires_grad_(False)


@torch.no_grad()
def max_scores(
    head: LatentGuardHead, features: ClipTextFeatures, prompts: Sequence[str], concepts: Tensor
) -> list[float]:
    """Return the score of each prompt: its maximum over concepts (c, width) and windows."""
    windows = [(i, ids) for i, prompt in enumerate(prompts) for ids in features.windows(prompt)]
    maxima = [-math.inf] * len(prompts)
    scores = head(features.encode_ids([ids for _, ids in windows]), concepts).max(dim=1).values
    for (i, _), score in zip(windows, scores.tolist(), strict=True):
        maxima[i] = score if math.isnan(score) else max(maxima[i], score)
    return maxima


def save_head(head: LatentGuardHead, path: Path) -> None:
    """Write a head to a new file.

    Raises:
        FileError: `path` exists or cannot be written.
    """
    with atomic_write(path) as tmp:
        save_file({k: v.detach().cpu().contiguous() for k, v in head.state_dict().items()}, tmp)


def load_head(path: Path, *, allow_pickle: bool = False) -> LatentGuardHead:
    """Return a head in fp32, from a file of `save_head` or the published one.

    Raises:
        FileError: the file is missing, a pickle without `allow_pickle`, or no head.
    """
    check_exists(path)
    is_pickle = path.suffix in PICKLE_SUFFIXES
    if is_pickle and not allow_pickle:
        raise FileError(
            f"{path} must not be a pickle, which can run code. Convert it with save_head, or set "
            "allow_pickle."
        )
    try:
        state = (
            torch.load(path, map_location="cpu", weights_only=True)
            if is_pickle
            else load_file(path)
        )
        inner, width = state["x1_to_key.weight"].shape
        head = LatentGuardHead(width, inner=inner, out_features=len(state["final_mlp.weight"]))
        head.load_state_dict(state)
    except (
        SafetensorError,
        OSError,
        LookupError,
        ValueError,
        RuntimeError,
        TypeError,
        AttributeError,
    ) as error:
        raise FileError(
            f"{path} is not a head of Latent Guard: {' '.join(str(error).split())[:200]}"
        ) from error
    if not all(bool(v.isfinite().all()) for v in head.state_dict().values()):
        raise FileError(f"{path} has NaN or infinite weights. Get an undamaged copy.")
    return head.float().eval().requires_grad_(False)


def check_exists(path: Path) -> None:
    """Refuse a missing file of weights."""
    if not path.is_file():
        raise FileError(f"the head {str(path)!r} of the guard 'latent-guard' does not exist")


def is_clip(network: object) -> bool:
    """Return whether a network is a CLIP text encoder."""
    return type(network).__name__.startswith("CLIPTextModel")
