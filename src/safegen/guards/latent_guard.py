"""Latent Guard: a small head on the text encoder says how near a prompt is to each of a list of concepts (arXiv:2404.08031)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from safegen.core.concept import Concept
from safegen.core.errors import ConfigError, FileError
from safegen.core.files import atomic_write
from safegen.guards.core.adapter import HookPoint, PipelineAdapter
from safegen.guards.core.base import Guard, GuardConfig, GuardResult

HEADS, INNER, OUT = 16, 512, 128
PUBLISHED = 9.0131
"""The published threshold, for the published weights and the published list of concepts."""
PICKLES = {".pt", ".pth", ".bin"}


class LatentGuardConfig(GuardConfig):
    """Settings of Latent Guard."""

    name: Literal["latent-guard"] = "latent-guard"
    hook_points: ClassVar[frozenset[HookPoint]] = frozenset({"prompt"})

    weights: Path
    """The head: a .safetensors file by `save_head`, or the published model_parameters.pth, which goes with CLIP ViT-L/14."""
    concepts: tuple[str, ...] = Field(min_length=1)
    """What must not be asked for; a prompt's score is the greatest over them."""
    threshold: float = PUBLISHED
    """Score from which on a prompt is not drawn.

    More concepts mean higher scores: `calibrate` finds the threshold for a list.
    """
    allow_pickle: bool = False
    """Whether the head may be read from a pickle; only tensors are taken from it."""

    @classmethod
    def unsupported_reason(cls, border: PipelineAdapter) -> str:
        """Return why it cannot run on a pipeline: its first text encoder is no CLIP."""
        own = type(getattr(border.pipe, "text_encoder", None)).__name__
        return super().unsupported_reason(border) or (
            ""
            if own.startswith("CLIPTextModel")
            else "reads a CLIP text encoder, and there is none"
        )

    @classmethod
    def defaults_from(cls, concept: Concept) -> dict[str, Any]:
        """Return the concept's words as concepts."""
        return {"concepts": concept.words}

    def resolve_paths(self, folder: Path) -> GuardConfig:
        """Return the guard with its weights looked for in `folder`."""
        return self.model_copy(update={"weights": folder / self.weights})

    def fingerprint(self) -> dict[str, Any]:
        """Return the settings with the head's SHA-256 in the place of where it lies."""
        if not self.weights.is_file():
            raise FileError(
                f"the head {str(self.weights)!r} of the guard 'latent-guard' does not exist"
            )
        kept = {
            k: v
            for k, v in self.model_dump(mode="json").items()
            if k not in ("weights", "allow_pickle")
        }
        return kept | {"weights": hashlib.sha256(self.weights.read_bytes()).hexdigest()}

    def build(self, border: PipelineAdapter) -> Guard:
        """Return the guard at work, the concepts' features computed."""
        tower = ClipTextFeatures(border)
        for concept in self.concepts:
            border.fits(concept, "a concept of the guard 'latent-guard'")
        head = load_head(self.weights, allow_pickle=self.allow_pickle).to(tower.device)
        if head.width != tower.width:
            raise ConfigError(
                f"the head {str(self.weights)!r} was made for a text encoder of width {head.width}, this model's has {tower.width}; "
                "train one with guard.latent_guard.train_head"
            )
        return LatentGuardGuard(self, tower, head)


class LatentGuardGuard(Guard):
    guard: LatentGuardConfig

    def __init__(
        self, guard: LatentGuardConfig, tower: ClipTextFeatures, head: LatentGuardHead
    ) -> None:
        super().__init__(guard)
        self.tower, self.head, self.concepts = tower, head, tower.ends(guard.concepts)

    def check(self, prompts: Sequence[str]) -> list[GuardResult]:
        found, limits = (
            max_scores(self.head, self.tower, prompts, self.concepts),
            {"score": self.guard.threshold},
        )
        if not all(math.isfinite(v) for v in found):
            raise ValueError("the head's score is not a finite number")
        return [
            GuardResult(
                "block" if v >= limits["score"] else "none",
                "concept" if v >= limits["score"] else "",
                {"score": v},
                limits,
            )
            for v in found
        ]


class ClipTextFeatures:
    """A pipeline's CLIP text tower, as Latent Guard reads it."""

    def __init__(self, border: PipelineAdapter) -> None:
        """Find the tower.

        Raises:
            ConfigError: the pipeline has none.
        """
        net: Any = getattr(border.pipe, "text_encoder", None)
        if not type(net).__name__.startswith("CLIPTextModel"):
            raise ConfigError(
                f"the guard 'latent-guard' reads a CLIP text encoder, and a {border.pipeline_class} has none as its first; leave it out"
            )
        self.net = net
        self.tokenizer: Any = border.pipe.tokenizer
        self.width = int(self.net.config.hidden_size)
        self.device: torch.device = (
            border.pipe._execution_device
        )  # where its weights will be, if they are offloaded now

    @torch.no_grad()
    def read(self, texts: Sequence[str]) -> Tensor:
        """Return a text's features, (n, 1 + tokens, width): the embedding at its end, then of all tokens, after the last norm, in fp32."""
        most = self.tokenizer.model_max_length
        found = self.tokenizer(
            list(texts), padding="max_length", max_length=most, truncation=True, return_tensors="pt"
        )
        with torch.autocast(self.device.type, enabled=False):
            out = self.net(found.input_ids.to(self.device))
        return torch.cat([out.pooler_output[:, None], out.last_hidden_state], dim=1).float()

    def ends(self, texts: Sequence[str]) -> Tensor:
        """Return the embeddings at the texts' ends, (n, width)."""
        return self.read(texts)[:, 0]

    def windows(self, text: str) -> list[str]:
        """Return a text that the tower would cut in overlapping parts that it reads whole.

        Any other as it is (ours).
        """
        most = self.tokenizer.model_max_length - 2
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        if len(ids) <= most:
            return [text]
        starts = [*range(0, len(ids) - most, most // 2), len(ids) - most]
        return [self.tokenizer.decode(ids[at : at + most]) for at in starts]


class LatentGuardHead(nn.Module):
    """Cross-attention of a concept over a prompt, and a cosine (arXiv:2404.08031).

    Names of parameters are those of the published file.
    """

    def __init__(
        self, width: int, *, heads: int = HEADS, inner: int = INNER, out: int = OUT
    ) -> None:
        """Build the head with random weights; `inner` is split among `heads`."""
        super().__init__()
        self.width, self.heads = width, heads
        self.x1_to_key, self.x1_to_value, self.x2_to_query = (
            nn.Linear(width, inner) for _ in range(3)
        )
        self.final_mlp, self.mlp_query1 = (nn.Linear(inner, out) for _ in range(2))
        self.tempr = nn.Parameter(torch.tensor(1 / 0.07))

    def forward(self, prompts: Tensor, concepts: Tensor) -> Tensor:
        """Return tau cos(v', q') of every prompt with every concept, (p, c).

        a = softmax(q_h . K_h / sqrt(d)) per head h, v' = W_o [a V_h]_h, q' = W_p q, with K = W_k X,
        V = W_v X, q = W_q g. Keys and values are made once a prompt and queries once a concept.

        Args:
            prompts: X, (p, tokens, width), see `Tower.read`.
            concepts: g, (c, width), see `Tower.ends`.
        """
        key, value = (
            f(prompts).unflatten(-1, (self.heads, -1)) for f in (self.x1_to_key, self.x1_to_value)
        )  # (p, tokens, heads, d)
        flat = self.x2_to_query(concepts)
        query = flat.unflatten(-1, (self.heads, -1))  # (c, heads, d)
        weight = (torch.einsum("chd,pthd->pcht", query, key) / query.shape[-1] ** 0.5).softmax(
            dim=-1
        )
        mixed = self.final_mlp(
            torch.einsum("pcht,pthd->pchd", weight, value).flatten(2)
        )  # (p, c, out)
        out: Tensor = self.tempr * F.cosine_similarity(mixed, self.mlp_query1(flat)[None], dim=-1)
        return out


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
    border: PipelineAdapter,
    table: Mapping[str, Sequence[tuple[str, str]]],
    *,
    updates: int = 300,
    batch: int = 64,
    lr: float = 1e-3,
    seed: int = 0,
) -> LatentGuardHead:
    """Return a head for a pipeline's text tower, trained on prompts with and without concepts.

    Args:
        border: the pipeline.
        table: concept: pairs of a prompt with it and the same prompt without it.
        updates: batches; each has one random pair of each of its concepts.
        batch: concepts in a batch.
        lr: of AdamW.
        seed: of the weights and the draws.

    Raises:
        ConfigError: under two concepts, or one without pairs.
    """
    if len(table) < 2 or not all(table.values()):
        raise ConfigError(
            f"a head is trained on at least two concepts with a pair each, got {len(table)}: {', '.join(sorted(table))}"
        )
    tower, rng = ClipTextFeatures(border), torch.Generator().manual_seed(seed)
    names = sorted(table)
    ends = tower.ends(names)
    pairs = {
        name: (tower.read([a for a, _ in table[name]]), tower.read([b for _, b in table[name]]))
        for name in names
    }
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        head = LatentGuardHead(tower.width).to(tower.device)
        optimiser = torch.optim.AdamW(head.parameters(), lr=lr)
        for _ in range(updates):
            at = torch.randperm(len(names), generator=rng)[:batch].tolist()
            draws = [(i, int(torch.randint(len(table[names[i]]), (1,), generator=rng))) for i in at]
            unsafe, safe = (
                torch.stack([pairs[names[i]][side][k] for i, k in draws]) for side in (0, 1)
            )
            loss = contrastive_loss(head(unsafe, ends[at]), head(safe, ends[at])).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return head.eval().requires_grad_(False)


@torch.no_grad()
def max_scores(
    head: LatentGuardHead, tower: ClipTextFeatures, prompts: Sequence[str], concepts: Tensor
) -> list[float]:
    """Return each prompt's score: the greatest over the concepts (c, width), and over its windows where it is long."""
    parts = [(i, part) for i, prompt in enumerate(prompts) for part in tower.windows(prompt)]
    out = [-math.inf] * len(prompts)
    scores = head(tower.read([part for _, part in parts]), concepts).max(dim=1).values.tolist()
    for (i, _), score in zip(parts, scores, strict=True):
        out[i] = score if math.isnan(score) else max(out[i], score)
    return out


def calibrate(
    border: PipelineAdapter,
    head: LatentGuardHead,
    concepts: Sequence[str],
    benign: Sequence[str],
    *,
    rate: float,
) -> float:
    """Return the least threshold at which no more than `rate` of some benign prompts are stopped (ours).

    Args:
        border: the pipeline whose text tower the head reads.
        head: the head.
        concepts: the list that it will be used with.
        benign: prompts that must pass.
        rate: wanted false-positive rate, in [0, 1).

    Raises:
        ConfigError: no prompts, or too few to tell such a rate from none.
    """
    if not 0 <= rate < 1:
        raise ConfigError(f"a false-positive rate must be in 0..1, got {rate}")
    if not benign or 0 < rate < 1 / len(benign):
        raise ConfigError(
            f"{len(benign)} prompts cannot show a false-positive rate of {rate}; give more, or ask for 0"
        )
    tower = ClipTextFeatures(border)
    scores = sorted(max_scores(head, tower, benign, tower.ends(concepts)), reverse=True)
    return math.nextafter(scores[math.floor(rate * len(scores) + 1e-9)], math.inf)


def save_head(head: LatentGuardHead, out: Path) -> None:
    """Write a head to a new file.

    Raises:
        FileError: `out` exists or cannot be written.
    """
    with atomic_write(out) as tmp:
        save_file({k: v.detach().cpu().contiguous() for k, v in head.state_dict().items()}, tmp)


def load_head(path: Path, *, allow_pickle: bool = False) -> LatentGuardHead:
    """Return a head in fp32, from our file or the published one.

    Raises:
        FileError: missing, a pickle that was not allowed, or not a head.
    """
    if not path.is_file():
        raise FileError(f"the head {str(path)!r} of the guard 'latent-guard' does not exist")
    if path.suffix in PICKLES and not allow_pickle:
        raise FileError(
            f"{path} is a pickle, which can run code of whoever made it; convert it with save_head, or say allow_pickle if you trust it"
        )
    try:
        state = (
            torch.load(path, map_location="cpu", weights_only=True)
            if path.suffix in PICKLES
            else load_file(path)
        )
        inner, width = state["x1_to_key.weight"].shape
        head = LatentGuardHead(width, inner=inner, out=len(state["final_mlp.weight"]))
        head.load_state_dict(state)
    except (
        SafetensorError,
        OSError,
        KeyError,
        ValueError,
        RuntimeError,
        TypeError,
        AttributeError,
    ) as error:
        raise FileError(
            f"{path} is not a head of Latent Guard: {' '.join(str(error).split())[:200]}"
        ) from error
    if not all(bool(v.isfinite().all()) for v in head.state_dict().values()):
        raise FileError(f"{path} has NaN or infinite weights; get an undamaged copy")
    return head.float().eval().requires_grad_(False)
