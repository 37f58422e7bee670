"""Concept ablation: train a concept's phrases to mean what harmless anchors mean.

Kumari et al. 2023, arXiv:2303.13516.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from safegen.core.concept import Concept, Phrases
from safegen.core.errors import ConfigError
from safegen.data.triplets.triplets import Triplets
from safegen.edits.base import TrainedEdit, join_quoted
from safegen.edits.functional import losses
from safegen.edits.functional.rollout import DdimRollout, frozen_predictor, rollout_autocast
from safegen.edits.training.config import SHORT, Objective, Training
from safegen.models.model import Model


class ConceptAblation(TrainedEdit):
    """Settings of the concept-ablation edit."""

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "default": {"target": "base", "num_images": 64, "steps": 25, "training": SHORT},
        "paper": {},
    }
    """`paper`: the released settings for nudity, except for `deviations`.

    `default`: ours, for the miniature model.
    """
    TINY: ClassVar[Mapping[str, Any]] = {"steps": 2, "num_images": 4}
    paper: ClassVar[str] = "arXiv:2303.13516"
    code_url: ClassVar[str] = "https://github.com/nupurkmr9/concept-ablation"
    deviations: ClassVar[str] = (
        "The anchors are the prompts, and the phrases replace the whole prompt. Images are kept as "
        "latents, by 50 DDIM steps without a negative prompt. The released rate is twice ours, its "
        "L_c counts four times, the prior has samples of its own, and the start token gets no "
        "gradient."
    )
    inputs: ClassVar[Literal["triplets", "words", "both"]] = "words"

    erase: Phrases = ()
    """Phrases that name the concept, one per sample. Default: those of the concept."""
    anchors: Phrases = ()
    """Harmless phrases that replace them, one per image. Default: the concept's counterpart."""
    target: Literal["student", "base"] = "student"
    """Model that predicts the target: the edited one (as released), or the original one."""
    strength: float = Field(default=0.0, ge=0)
    """With target base: distance of the target beyond the anchor, away from the concept (ours)."""
    num_images: int = Field(default=1000, ge=1)
    """Images of the anchors that the original model generates once."""
    steps: int = Field(default=50, ge=1)
    """DDIM steps of an image."""
    guidance: float = Field(default=6.0, ge=1)
    """Guidance scale of an image."""
    weight_prior: float = Field(default=1.0, ge=0)
    """Weight of L_p, the denoising loss of the anchors on the same images."""
    selector: str = "attention"
    """Which weights change: all attention for explicit content, kv2 for styles and objects."""
    training: Training = Training(
        updates=400, batch=8, accumulation=1, lr=3.2e-5, weight_decay=1e-2, clip=1.0, ema=0.0
    )
    """Settings of the training loop. The rate is 4e-6 times batch (4) and processes (2)."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if shared := set(self.erase) & set(self.anchors):
            raise ValueError(f"erase and anchors must share no phrase, got {min(shared)!r} in both")
        return self

    def unused_settings(self) -> Iterable[tuple[str, str]]:
        """Yield each setting that has no effect with the others, and why."""
        yield from super().unused_settings()
        if self.strength and self.target == "student":
            yield "strength", "with target student"

    def describe(self) -> str:
        """Return one or two sentences for a report."""
        return (
            f"The edit learns from phrases ({join_quoted(self.erase)}), not from images. On images "
            "that the model itself generates of a harmless counterpart, it is trained to predict "
            "with these phrases what it predicts with those of the counterpart. "
            "A prompt that paraphrases them may still generate the concept."
        )

    @classmethod
    def defaults_from(cls, concept: Concept, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return the phrases of a concept and of its counterpart."""
        return super().defaults_from(concept, settings) | {"anchors": concept.counterpart}

    def build_objective(
        self, model: Model, triplets: Triplets | None, names: Sequence[str]
    ) -> Objective:
        """Return batches and losses; see `TrainedEdit.build_objective`."""
        return ConceptAblationObjective(self, model, names)


class ConceptAblationObjective:
    """Batches and losses of concept ablation. Images of the anchors are generated once."""

    def __init__(self, edit: ConceptAblation, model: Model, names: Sequence[str]) -> None:
        """Encode the phrases and generate the images of the anchors.

        Raises:
            ConfigError: there are no anchors.
        """
        if not edit.anchors:
            raise ConfigError(
                "concept_ablation needs anchors, harmless phrases that replace the erased ones. "
                "Give a concept with a counterpart, or set anchors."
            )
        self.edit = edit
        self.weights = {"L_c": 1.0} | ({"L_p": edit.weight_prior} if edit.weight_prior else {})
        parameters = dict(model.denoiser.named_parameters())
        self.reference = {name: parameters[name].detach().clone() for name in names}
        self.abar, self.prediction = model.alphas_cumprod().to(model.device), model.prediction
        self.text = model.encode_text(list(edit.erase)).float()
        self.anchors = model.encode_text(list(edit.anchors)).float()
        self.latents = self._sample_images(model)

    def _sample_images(self, model: Model) -> Tensor:
        """Return latents of the original model's images of each anchor in turn, (n, c, h, w)."""
        edit, predict = self.edit, frozen_predictor(model.denoiser)
        rollout = DdimRollout(model, steps=edit.steps, guidance=edit.guidance)
        generator = torch.Generator("cpu").manual_seed(edit.training.seed * 1_000_003)
        noise = rollout.noise(edit.num_images, generator)
        text = self.anchors[torch.arange(len(noise)) % len(self.anchors)]
        with rollout_autocast(model, edit.training.precision):
            latents = [
                rollout.sample_until(edit.steps, x, anchor, predict)
                for x, anchor in zip(noise.split(16), text.split(16), strict=True)
            ]
        return torch.cat(latents)

    def training_step(
        self,
        denoiser: nn.Module,
        micro_step: int,
        generator: torch.Generator,
        share: tuple[int, int],
    ) -> Mapping[str, Tensor]:
        """Return L_c, and L_p if it has a weight, of one batch, (b,) each."""
        b, g, device = self.edit.training.batch, generator, self.abar.device
        mine = torch.arange(b)[share[0] :: share[1]]
        image = torch.randint(len(self.latents), (b,), generator=g)[mine]
        phrase = torch.randint(len(self.text), (b,), generator=g)[mine]
        t = torch.randint(len(self.abar), (b,), generator=g)[mine].to(device)
        eps = torch.randn(b, *self.latents.shape[1:], generator=g)[mine].to(device)
        anchor = self.anchors[image % len(self.anchors)]
        return self.compare(denoiser, self.latents[image], eps, t, self.text[phrase], anchor)

    def compare(
        self, denoiser: nn.Module, z: Tensor, eps: Tensor, t: Tensor, text: Tensor, anchor: Tensor
    ) -> Mapping[str, Tensor]:
        """Return L_c = |e(c) - sg e(anchor)|^2 and L_p = |e(anchor) - eps|^2.

        Args:
            denoiser: the network in training.
            z: latents of images of the anchors, (b, c, h, w).
            eps: noise to add.
            t: timesteps, (b,).
            text: embeddings of the concept's phrases, (b, tokens, width).
            anchor: embeddings of the anchor of each image.
        """
        abar = self.abar[t]
        x = losses.add_noise(z, eps, abar)
        truth = eps if self.prediction == "epsilon" else losses.velocity(eps, z, abar)
        reference = self.reference if self.edit.target == "base" else None
        predict = frozen_predictor(denoiser, reference)
        target = predict(x, t, anchor)
        if self.edit.strength and reference is not None:
            push = predict(x, t, text)
            target = losses.negative_guidance(target, push, target, strength=self.edit.strength)
        if not self.edit.weight_prior:
            return {"L_c": losses.squared_error(denoiser(x, t, text).sample, target)}
        erased, prior = denoiser(
            torch.cat([x, x]), torch.cat([t, t]), torch.cat([text, anchor])
        ).sample.chunk(2)
        return {
            "L_c": losses.squared_error(erased, target),
            "L_p": losses.squared_error(prior, truth),
        }
