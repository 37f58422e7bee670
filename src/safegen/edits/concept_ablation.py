"""Concept ablation: teach a concept's words to mean what harmless words mean (Kumari et al.

2023, arXiv:2303.13516).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from safegen.core.concept import Concept
from safegen.core.errors import ConfigError
from safegen.data.triplets.triplets import Triplets
from safegen.edits.base import (
    TrainedEdit,
    check_phrases,
    join_quoted,
    phrases_from,
    require_phrases,
)
from safegen.edits.functional import losses
from safegen.edits.functional.rollout import DdimRollout, frozen_predictor, full_precision
from safegen.edits.training.config import SHORT, Objective, Training
from safegen.models.model import Model

PRESETS: dict[str, dict[str, Any]] = {
    "default": {"target": "base", "pictures": 64, "steps": 25, "training": SHORT},
    "paper": {},
}
"""`paper`: the released recipe for what it calls nudity, its pictures noised anew each time.

`default`: ours, for the miniature model.
"""


class ConceptAblation(TrainedEdit):
    """Settings of the concept-ablation edit."""

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = PRESETS
    inputs: ClassVar[Literal["triplets", "words"]] = "words"

    erase: tuple[str, ...] = ()
    """Words that ask for the concept, one of them a sample; a concept lends its own."""
    anchors: tuple[str, ...] = ()
    """Harmless words that they come to mean, one of them a sample.

    A concept lends those of its counterpart.
    """
    target: Literal["own", "base"] = "own"
    """Whose prediction for the anchor is the target: the edited model's, held fixed (as released), or the untouched one's."""
    strength: float = Field(default=0.0, ge=0)
    """With target base, how far past the anchor, away from the concept, the target lies (ours).

    0 is the anchor itself, as published.
    """
    pictures: int = Field(default=1000, ge=1)
    """Pictures of the anchors that the untouched model draws, once, to be noised."""
    steps: int = Field(default=50, ge=1)
    """DDIM steps of a picture."""
    guidance: float = Field(default=6.0, ge=1)
    """Guidance of a picture."""
    weight_prior: float = Field(default=1.0, ge=0)
    """Weight of L_p: on the same pictures, the anchor itself should still be denoised."""
    selector: str = "attention"
    """Which weights change: all attention for explicit content, kv2 for styles and objects, as published."""
    training: Training = Training(
        updates=400, batch=8, accumulation=1, lr=3.2e-5, weight_decay=1e-2, clip=1.0, ema=0.0
    )
    """How the loop trains.

    The released rate, 4e-6, is multiplied by batch and processes (4 and 2) before it is used.
    """

    @model_validator(mode="after")
    def _no_idle_setting(self) -> Self:
        if self.strength and self.target == "own":
            raise ValueError(
                "strength has no effect with target own; set target to base, or leave it out"
            )
        check_phrases(self.erase)
        if set(self.erase) & set(self.anchors):
            raise ValueError(
                "erase and anchors share a word, which would come to mean itself; leave it out of one"
            )
        return self

    def describe(self) -> str:
        """Return it."""
        return (
            f"It is given words ({join_quoted(self.erase)}) and no pictures. On pictures that the model itself draws of a harmless "
            "counterpart, it is taught to predict with these words what it predicts with the counterpart's. A prompt that asks for "
            "the same in other words may still get it."
        )

    @classmethod
    def defaults_from(cls, concept: Concept, said: Mapping[str, Any]) -> dict[str, Any]:
        """Return its words and its counterpart's."""
        return phrases_from(cls.method(), concept, said) | {"anchors": concept.counterpart}

    def build_objective(
        self, model: Model, triplets: Triplets | None, names: Sequence[str]
    ) -> Objective:
        """Return its batches and losses."""
        return ConceptAblationObjective(self, model, names)


class ConceptAblationObjective:
    """Its batches and losses. The anchors' pictures are drawn before the first update."""

    def __init__(self, edit: ConceptAblation, model: Model, names: Sequence[str]) -> None:
        """Encode the words; draw the anchors."""
        self.edit, words = edit, require_phrases("concept_ablation", edit.erase)
        if not edit.anchors:
            raise ConfigError(
                "concept_ablation needs words to put in place of the erased ones; give a concept with a counterpart, or anchors"
            )
        self.weights = {"L_c": 1.0} | ({"L_p": edit.weight_prior} if edit.weight_prior else {})
        own = dict(model.denoiser.named_parameters())
        self.reference = {name: own[name].detach().clone() for name in names}
        self.abar, self.prediction = model.alphas_cumprod().to(model.device), model.prediction
        self.text, self.anchors = (
            model.encode_text(list(words)).float(),
            model.encode_text(list(edit.anchors)).float(),
        )
        self.fingerprint = " ".join([edit.model_dump_json(exclude={"training"}), model.hash])
        self.latents = self._draw(model)

    def _draw(self, model: Model) -> Tensor:
        """Return latents of the untouched model's pictures of the anchors, which take turns: (n, c, h, w)."""
        walk, precision = (
            DdimRollout(model, steps=self.edit.steps, guidance=self.edit.guidance),
            self.edit.training.precision,
        )
        noise = walk.noise(
            self.edit.pictures,
            torch.Generator("cpu").manual_seed(self.edit.training.seed * 1_000_003),
        )
        turn = torch.arange(len(noise)) % len(self.anchors)
        with full_precision(model, precision):
            parts = zip(noise.split(16), self.anchors[turn].split(16), strict=True)
            return torch.cat(
                [
                    walk.sample_until(self.edit.steps, x, text, frozen_predictor(model.denoiser))
                    for x, text in parts
                ]
            )

    def training_step(
        self,
        denoiser: nn.Module,
        micro_step: int,
        generator: torch.Generator,
        share: tuple[int, int],
    ) -> Mapping[str, Tensor]:
        """Draw one batch and return L_c, and L_p where it has a weight, (b,) each."""
        b, g = self.edit.training.batch, generator
        mine = torch.arange(b)[share[0] :: share[1]]
        at, word = (
            torch.randint(len(self.latents), (b,), generator=g)[mine],
            torch.randint(len(self.text), (b,), generator=g)[mine],
        )
        t = torch.randint(len(self.abar), (b,), generator=g)[mine].to(self.abar.device)
        eps = torch.randn(b, *self.latents.shape[1:], generator=g)[mine].to(self.abar.device)
        return self.compare(
            denoiser,
            self.latents[at],
            eps,
            t,
            self.text[word],
            self.anchors[at % len(self.anchors)],
        )

    def compare(
        self, denoiser: nn.Module, z: Tensor, eps: Tensor, t: Tensor, text: Tensor, anchor: Tensor
    ) -> Mapping[str, Tensor]:
        """Return L_c = |e(c) - sg target|^2, the target the prediction for the anchor, and L_p = |e(anchor) - eps|^2.

        Args:
            denoiser: the network in training.
            z: latents of pictures of the anchors, (b, c, h, w).
            eps: noise to add.
            t: timesteps, (b,).
            text: the concept's words, (b, tokens, width).
            anchor: the harmless words of each picture.
        """
        abar = self.abar[t]
        x = losses.add_noise(z, eps, abar)
        plain = eps if self.prediction == "epsilon" else losses.velocity(eps, z, abar)
        if self.edit.target == "own":
            aim = frozen_predictor(denoiser)(x, t, anchor)
        else:
            before = frozen_predictor(denoiser, self.reference)
            aim = before(x, t, anchor)
            if self.edit.strength:
                aim = losses.negative_guidance(
                    aim, before(x, t, text), aim, strength=self.edit.strength
                )
        if not self.edit.weight_prior:
            return {"L_c": losses.squared_error(denoiser(x, t, text).sample, aim)}
        out, kept = denoiser(
            torch.cat([x, x]), torch.cat([t, t]), torch.cat([text, anchor])
        ).sample.chunk(2)
        return {"L_c": losses.squared_error(out, aim), "L_p": losses.squared_error(kept, plain)}
