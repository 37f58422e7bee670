"""DES: train the text encoders to embed prompts of a concept as safe prompts unlike them.

Ahn & Jung 2025, arXiv:2501.18877.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from safegen.core.concept import Concept, Phrases
from safegen.core.errors import ConfigError
from safegen.data.triplets.triplets import Triplets
from safegen.edits.base import TrainedEdit, join_quoted
from safegen.edits.training.config import Objective, Training
from safegen.edits.training.samples import read_captions
from safegen.models.checkpoint.metadata import Component
from safegen.models.families.text_outputs import TextEncoders, text_outputs
from safegen.models.model import Model
from safegen.models.patched_weights import pipeline_weights

PUBLISHED = Training(
    updates=108, batch=128, accumulation=1, lr=1e-5, weight_decay=1e-2, clip=1e9, ema=0.0
)
"""AdamW without clipping and averaging: two epochs over the 6,911 pairs of the released code."""
ENCODING_BATCH = 32
"""Prompts that are encoded at once before the training."""


class DES(TrainedEdit):
    """Settings of the DES edit."""

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "mini": {
            "training": Training(
                updates=150,
                batch=16,
                accumulation=1,
                lr=2e-4,
                warmup=10,
                decay="cosine",
                weight_decay=0.0,
                ema=0.0,
            )
        },
        "full": {"training": PUBLISHED.model_copy(update={"precision": "auto"})},
        "paper": {},
    }
    """`paper`: the released run. `full`: the same in the precision of the device. `mini`: ours,
    tuned on the miniature model."""
    paper: ClassVar[str] = "arXiv:2501.18877"
    code_url: ClassVar[str] = "https://github.com/amoeba04/des"
    code_commit: ClassVar[str] = "302b6b4"
    parity: ClassVar[str] = (
        "Losses, targets and weights were read in the released `train_des.py`; the two programs "
        "were not run side by side, as its license forbids commercial use and its prompts are not "
        "in this package."
    )
    deviations: ClassVar[str] = (
        "The released code compares the last token embeddings of every encoder. Ours compares what "
        "the denoiser reads: the layer before the last of the CLIPs of SDXL and SD 3, and pooled "
        "embeddings where they are used, with one loss for each; on SD 1.x and 2.x these are the "
        "same. The length of the concept's vector is 200 there for every encoder; ours is relative "
        "to the embeddings of safe prompts (`concept_scale`), and 0.8 is our estimate of it for "
        "CLIP-L, not a measurement. Several phrases share one vector, their "
        "mean. Prompts are drawn with replacement; the released code goes through shuffled pairs. "
        "T5 reads padding as the pipeline does, without a mask. All encoders are trained at once; "
        "their losses have no weights in common."
    )
    inputs: ClassVar[Literal["triplets", "words", "both"]] = "words"

    erase: Phrases = ()
    """Phrases that name the concept. Their embedding becomes that of the empty text.

    Default: those of the concept.
    """
    prompts: tuple[str, ...] = ()
    """Prompt lists (`source:list`) and text files with prompts of the concept.

    Without any, the phrases themselves are the prompts.
    """
    captions: tuple[str, ...] = ()
    """Prompt lists and text files with safe prompts."""
    encoders: tuple[Component, ...] = ()
    """Text encoders to train, by their names in the pipeline. Default: all of them."""
    weight_safe: float = Field(default=0.3, ge=0, lt=1)
    """Weight of L_safe (lambda); the other terms have one minus it."""
    concept_scale: float = Field(default=0.8, ge=0, le=100)
    """Length of the concept's vector, relative to the mean norm of the embeddings of captions."""
    selector: str = "all"
    """Which weights of the text encoders change."""
    training: Training = PUBLISHED
    """Settings of the training loop."""

    @model_validator(mode="after")
    def _check_checkpointing(self) -> DES:
        if self.training.gradient_checkpointing:
            raise ValueError(
                "training.gradient_checkpointing must be off for text encoders, got true. Lower "
                "training.batch and raise training.accumulation"
            )
        return self

    @classmethod
    def defaults_from(cls, concept: Concept, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return phrases, prompts and captions of a concept."""
        lists = {"prompts": concept.tuning.get("concept", ()), "captions": concept.captions}
        return super().defaults_from(concept, settings) | lists

    def describe(self) -> str:
        """Return one or two sentences for a report."""
        return (
            f"The edit learns from phrases ({join_quoted(self.erase)}) and prompts, not from "
            "images. It trains the text encoders to embed prompts of the concept as safe prompts "
            "unlike them. What reaches the denoiser without them, such as a learned embedding of "
            "the whole prompt, is not affected."
        )

    def network(self, model: Model) -> nn.Module:
        """Return the text encoders that are trained.

        Raises:
            ConfigError: the model lacks one of `encoders`, or is a denoiser alone.
        """
        known = text_outputs(model.pipeline)
        if unknown := [name for name in self.encoders if name not in known]:
            raise ConfigError(
                f"encoders must be among {', '.join(known)} of {model.name!r}, got {unknown[0]}"
            )
        return TextEncoders(model.pipeline, [n for n in known if n in (self.encoders or known)])

    def build_objective(
        self, model: Model, triplets: Triplets | None, names: Sequence[str]
    ) -> Objective:
        """Return batches and losses; see `TrainedEdit.build_objective`."""
        network = self.network(model)
        assert isinstance(network, TextEncoders)
        return DESObjective(self, network)

    def keep_tensors(self, model: Model, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors that changed.

        The denoiser does not depend on all weights of an encoder, such as the last layer of a CLIP
        that it reads one layer earlier. The training leaves these as they are.
        """
        old = pipeline_weights(model.pipeline)
        return {
            name: value
            for name, value in tensors.items()
            if not torch.equal(value, old[name].detach().to(value))
        }


def cosine_distance(x: Tensor, y: Tensor) -> Tensor:
    """Return 1 - cos(x, y) of each row, (b,)."""
    return 1 - F.cosine_similarity(x.float(), y.float(), dim=-1)


def least_similar(x: Tensor, others: Tensor) -> Tensor:
    """Return for each row of `x` the index of the row of `others` with the least cosine, (n,)."""
    return (F.normalize(x, dim=-1) @ F.normalize(others, dim=-1).T).argmin(dim=-1)


def concept_vector(phrases: Tensor, safe: Tensor, *, scale: float) -> Tensor:
    """Return the direction of a concept's phrases, as long as `scale` mean safe embeddings, (d,).

    Args:
        phrases: embeddings of the phrases, (p, d).
        safe: embeddings of safe prompts, (n, d).
        scale: length, relative to the mean norm of `safe`; unitless, >= 0.
    """
    direction = F.normalize(phrases, dim=-1).mean(0)
    return F.normalize(direction, dim=-1) * safe.norm(dim=-1).mean() * scale


class DESObjective:
    """Batches and losses of DES, with the original embeddings of all prompts."""

    def __init__(self, edit: DES, network: TextEncoders) -> None:
        """Encode prompts, captions and phrases with the original encoders.

        Raises:
            ConfigError: there are no captions.
        """
        captions = read_captions(edit.captions)
        if not captions:
            raise ConfigError(
                "des needs safe prompts, got none. Set captions (--set captions=FILE.txt)"
            )
        unsafe = read_captions(edit.prompts) or list(edit.erase)
        self.edit, self.share = edit, 1 - edit.weight_safe
        self.weights = {"L_unsafe": self.share, "L_safe": edit.weight_safe, "L_concept": self.share}
        texts = [unsafe, captions, list(edit.erase), [""]]
        self.counts = [len(part) for part in texts]
        self.ids = {
            name: ids.split(self.counts)
            for name, ids in network.tokenize([text for part in texts for text in part]).items()
        }
        self.safe: dict[str, Tensor] = {}
        self.blank: dict[str, Tensor] = {}
        self.vectors: dict[str, Tensor] = {}
        self.targets: dict[str, Tensor] = {}
        embeddings = [self._encode(network, part) for part in range(len(texts))]
        for name, unsafe_embeddings in embeddings[0].items():
            self.safe[name], phrases, blank = (part[name] for part in embeddings[1:])
            self.blank[name] = blank
            self.vectors[name] = concept_vector(phrases, self.safe[name], scale=edit.concept_scale)
            self.targets[name] = least_similar(unsafe_embeddings, self.safe[name])
        digest = hashlib.sha256(repr(texts).encode()).hexdigest()
        self.metadata = {
            "training_prompts": {"unsafe": len(unsafe), "safe": len(captions), "sha256": digest}
        }

    @torch.no_grad()
    def _encode(self, network: TextEncoders, part: int) -> dict[str, Tensor]:
        """Return the embeddings of one list of texts by output, (n, d) each, fp32, on the CPU."""
        batches = []
        for start in range(0, self.counts[part], ENCODING_BATCH):
            rows = slice(start, start + ENCODING_BATCH)
            batches.append(network({name: ids[part][rows] for name, ids in self.ids.items()}))
        return {
            name: torch.cat([batch[name].float().cpu() for batch in batches]) for name in batches[0]
        }

    def training_step(
        self,
        denoiser: nn.Module,
        micro_step: int,
        generator: torch.Generator,
        share: tuple[int, int],
    ) -> Mapping[str, Tensor]:
        """Return the three terms of one batch, (b,) each, as means over the encoders' outputs."""
        b = self.edit.training.batch
        mine = torch.arange(b)[share[0] :: share[1]]
        rows = [torch.randint(n, (b,), generator=generator)[mine] for n in self.counts[:3]]
        ids = {
            name: torch.cat([part[i] for part, i in zip(parts, rows, strict=False)])
            for name, parts in self.ids.items()
        }
        read = denoiser(ids)
        terms = [self._compare(name, value.chunk(3), rows) for name, value in read.items()]
        return {term: torch.stack([each[term] for each in terms]).mean(0) for term in self.weights}

    def _compare(
        self, name: str, embeddings: Sequence[Tensor], rows: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        """Return the terms of one output of an encoder, (b,) each.

        L_unsafe moves prompts of the concept to the least similar safe embedding minus the
        concept's vector, L_safe keeps safe prompts where they are, also after the vector is added,
        and L_concept moves the phrases to the empty text.
        """
        unsafe, safe, phrases = embeddings
        vector, original = self.vectors[name].to(safe), self.safe[name][rows[1]].to(safe)
        target = self.safe[name][self.targets[name][rows[0]]].to(safe) - vector
        return {
            "L_unsafe": cosine_distance(unsafe, target),
            "L_safe": cosine_distance(safe, original) + cosine_distance(safe + vector, original),
            "L_concept": cosine_distance(phrases, self.blank[name].to(safe)),
        }
