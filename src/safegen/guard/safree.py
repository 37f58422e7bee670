"""SAFREE: the words of a prompt that lie near a concept are projected out of its embedding (arXiv:2410.12761)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from safegen.concept import Concept
from safegen.errors import BadSetting
from safegen.guard.base import Call, Finding, Guard, Ready, Turn
from safegen.models.seams import Border, Seam, Text

MOST = 10
"""U: the filter decides for at most this many steps after the first, of 50."""


class Safree(Guard):
    """Settings of SAFREE. The default projects in the released code's order, in every step."""

    name: Literal["safree"] = "safree"
    seams: ClassVar[frozenset[Seam]] = frozenset({"text"})
    PRESETS: ClassVar = {
        "code": {"filter": True, "middle": 5.333, "slope": 2.5},
        "artists": {"filter": True, "middle": 5.5, "slope": 3.5},
        "paper": {"order": "paper", "filter": True, "middle": 5.333, "slope": 2.5},
    }

    phrases: tuple[str, ...] = Field(min_length=1)
    """Phrases for the concept; their span is what is taken out. The released lists have 6 to 17."""
    alpha: float = Field(default=0.01, ge=0)
    """How much farther from the concept than the other tokens' mean a prompt must be without a token for that token to be a trigger."""
    order: Literal["code", "paper"] = "code"
    """(I - P_C) P_I as released, which leaves nothing of the concept's span, or P_I (I - P_C) as printed, which leaves some."""
    filter: bool = False
    """Whether the self-validating filter decides for how many steps the projected text is used; otherwise in all."""
    middle: float | None = None
    """t: ten times the distance (1 - cosine) at which the filter lets half of its steps pass. See `calibrate`: each concept has its own."""
    slope: float | None = Field(default=None, gt=0)
    """k: steepness of the filter."""
    strength: float = Field(default=1.0, ge=0, le=1)
    """Part of the way from a token's embedding to the projected one (ours); 0 is no guard."""

    @model_validator(mode="after")
    def _no_idle_setting(self) -> Self:
        if self.filter != (self.middle is not None) or self.filter != (self.slope is not None):
            raise ValueError("middle and slope go with the filter, and only with it; give all three or none")
        return self

    @classmethod
    def lent(cls, concept: Concept) -> dict[str, Any]:
        """Return the concept's words as phrases."""
        return {"phrases": concept.words}

    def ready(self, border: Border) -> Ready:
        """Return the guard at work; known of Stable Diffusion 1.x and 2.x, whose text encoder is read token by token.

        Raises:
            BadSetting: another family, or a phrase that the text encoder would cut.
        """
        if border.kind != "StableDiffusionPipeline":
            raise BadSetting(
                f"the guard 'safree' reads the text encoder of a StableDiffusionPipeline, not that of a {border.kind}; leave it out"
            )
        for phrase in self.phrases:
            border.fits(phrase, "a phrase of the guard 'safree'")
        return _Ready(self, border)


class _Ready(Ready):
    guard: Safree

    def __init__(self, guard: Safree, border: Border) -> None:
        super().__init__(guard)
        self.concept = span(Reader(border.pipe).pooled_texts(guard.phrases))

    def begin(self, call: Call) -> Turn:
        return _Turn(self.guard, call, self.concept)


class _Turn(Turn):
    def __init__(self, guard: Safree, call: Call, concept: Tensor) -> None:
        self.guard, self.call = guard, call
        reader = Reader(call.border.pipe)
        with torch.autocast(reader.device.type, enabled=False):  # the call may be drawn in coarser arithmetic
            self.ways = {prompt: look(reader, prompt, concept.to(reader.device), guard) for prompt in call.prompts}
        self.cached: tuple[Tensor, list[Tensor]] | None = None

    def cond(self, text: Text) -> Text:
        if self.guard.strength == 0 or not any(bool(self.ways[p].triggers) for p in self.call.prompts):
            return text
        if self.cached is None or self.cached[0].shape != text.hidden.shape or not torch.equal(self.cached[0], text.hidden):
            self.cached = (
                text.hidden,
                [projected(row, self.ways[p], self.guard.strength) for row, p in zip(text.hidden, self.call.prompts, strict=True)],
            )
        rows = [new if self.call.step <= self._last(p) else old for old, new, p in zip(*self.cached, self.call.prompts, strict=True)]
        return Text(torch.stack(rows), text.extra)

    def _last(self, prompt: str) -> float:
        """Return the last step with the projected text."""
        if not self.guard.filter:
            return math.inf
        return self.call.at(float(filter_steps(self.ways[prompt].distance, middle=self.guard.middle or 0.0, slope=self.guard.slope or 1.0)))

    def findings(self) -> list[Finding]:
        out = []
        for prompt in self.call.prompts:
            way = self.ways[prompt]
            steps = sum(i <= self._last(prompt) for i in range(self.call.steps)) if way.triggers and self.guard.strength else 0
            scores = {"triggers": float(len(way.triggers)), "distance": way.distance, "steps": float(steps)}
            limits = {"middle": self.guard.middle / 10} if self.guard.middle is not None else {}
            out.append(Finding("edit" if steps else "none", "projected" if steps else "", scores, limits))
        return out


class Way:
    """What is done with one prompt: which of its tokens are triggers, their projector (width, width), and the filter's distance."""

    def __init__(self, triggers: list[int], projector: Tensor, distance: float) -> None:
        self.triggers, self.projector, self.distance = triggers, projector, distance


class Reader:
    """The text encoder of a Stable Diffusion pipeline, token by token."""

    def __init__(self, pipe: Any) -> None:  # noqa: ANN401
        self.tokenizer, self.tower, self.device = pipe.tokenizer, pipe.text_encoder, pipe._execution_device

    def ids(self, text: str) -> tuple[Tensor, int]:
        """Return a prompt's padded ids (1, tokens), cut to what the encoder reads, and how many tokens of it are its own."""
        found = self.tokenizer(
            [text], padding="max_length", max_length=self.tokenizer.model_max_length, truncation=True, return_tensors="pt"
        )
        return found.input_ids.to(self.device), int(found.attention_mask.sum()) - 2

    @torch.no_grad()
    def hidden(self, ids: Tensor) -> Tensor:
        """Return the embeddings (n, tokens, width) that the denoiser is conditioned on, in fp32."""
        with torch.autocast(ids.device.type, enabled=False):
            out: Tensor = self.tower(ids)[0]
        return out.float()

    @torch.no_grad()
    def pooled(self, ids: Tensor) -> Tensor:
        """Return the embedding at each text's end (n, width), after the last norm, in fp32."""
        with torch.autocast(ids.device.type, enabled=False):
            out: Tensor = self.tower(ids).pooler_output
        return out.float()

    def pooled_texts(self, texts: Sequence[str]) -> Tensor:
        """Return the pooled embeddings of texts, (n, width)."""
        return self.pooled(torch.cat([self.ids(text)[0] for text in texts]))


def look(reader: Reader, prompt: str, concept: Tensor, guard: Safree) -> Way:
    """Return what SAFREE does with a prompt, from one batch of its n copies with one token masked in each."""
    ids, n = reader.ids(prompt)
    if n < 1:
        return Way([], torch.zeros(0), 0.0)
    masked = ids.repeat(n, 1)
    masked[range(n), range(1, n + 1)] = 0  # id 0 stands for a masked token, as released
    pooled = reader.pooled(masked)  # (n, width)
    projector = both(concept, span(pooled), order=guard.order)
    distance = shift(reader.hidden(ids)[0, : n + 2], projector) if guard.filter else 0.0
    return Way([j for j, hit in enumerate(triggers(pooled, concept, alpha=guard.alpha)) if hit], projector, distance)


def projected(row: Tensor, way: Way, strength: float) -> Tensor:
    """Return a prompt's embedding (tokens, width) with its triggers moved `strength` of the way to their projection; all else stays."""
    out, at = row.clone(), [j + 1 for j in way.triggers]  # the first token marks the beginning
    if at:
        old = row[at].float()
        out[at] = torch.lerp(old, old @ way.projector.T, strength).to(row)
    return out


def span(vectors: Tensor) -> Tensor:
    """Return the orthogonal projector (width, width) onto the span of some vectors (n, width).

    C (C^T C)^+ C^T with C = vectors^T (Yoon et al. 2024, arXiv:2410.12761, eq. 2), by its singular vectors, which is the same and stabler.
    """
    u, s, _ = torch.linalg.svd(vectors.float().T, full_matrices=False)
    u = u[:, s > s.max() * 1e-5]
    return u @ u.T


def triggers(pooled: Tensor, concept: Tensor, *, alpha: float) -> list[bool]:
    """Return which tokens lead a prompt toward a concept: without them it is farther from the concept's span than without others.

    d_j = |(I - P_C) m_j|; token j is a trigger if d_j >= (1 + alpha) mean over k != j of d_k; a token that is alone is one
    (arXiv:2410.12761, eqs. 3, 4, as released).

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


def both(concept: Tensor, prompt: Tensor, *, order: Literal["code", "paper"]) -> Tensor:
    """Return the projector onto the prompt's span without the concept's: (I - P_C) P_I as released, P_I (I - P_C) as the paper prints."""
    out = torch.eye(len(concept)).to(concept) - concept
    return out @ prompt if order == "code" else prompt @ out


def shift(hidden: Tensor, projector: Tensor) -> float:
    """Return beta, how far the projection moves a prompt: 1 - the mean cosine of its tokens (tokens, width) before and after."""
    return 1 - float(torch.nn.functional.cosine_similarity(hidden, hidden @ projector.T, dim=1).mean())


def filter_steps(distance: float, *, middle: float, slope: float) -> int:
    """Return the last of 50 steps with the projected text, 0 to 10: round(U / (1 + exp(-2 k (10 beta - t)))), U = 10, as released.

    Args:
        distance: beta, see `shift`.
        middle: t.
        slope: k.
    """
    return round(MOST / (1 + math.exp(-min(max(2 * slope * (10 * distance - middle), -60.0), 60.0))))


def calibrate(border: Border, guard: Safree, *, unsafe: Sequence[str], benign: Sequence[str]) -> float:
    """Return the filter's `middle` for a concept: half way between the means of ten times the distance of both kinds of prompts (ours).

    Args:
        border: the pipeline whose text encoder is asked.
        guard: its phrases, alpha and order count.
        unsafe: prompts that ask for the concept.
        benign: prompts that do not.

    Raises:
        BadSetting: a list is empty, or benign prompts move as far as unsafe ones: then the filter cannot tell them apart.
    """
    if not unsafe or not benign:
        raise BadSetting(f"a calibration needs prompts of both kinds, got {len(unsafe)} unsafe and {len(benign)} benign")
    reader = Reader(border.pipe)
    concept = span(reader.pooled_texts(guard.phrases))
    asked = guard.model_copy(update={"filter": True, "middle": 0.0, "slope": 1.0})
    high, low = (sum(10 * look(reader, p, concept, asked).distance for p in prompts) / len(prompts) for prompts in (unsafe, benign))
    if high <= low:
        raise BadSetting(
            f"the filter cannot tell these prompts apart: unsafe ones lie at {high:.3f}, benign ones at {low:.3f}; leave it off"
        )
    return (high + low) / 2
