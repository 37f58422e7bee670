"""Concept ablation: train a concept's phrases to mean what harmless anchors mean.

Kumari et al. 2023, arXiv:2303.13516.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

import torch
from pydantic import AfterValidator, Field, model_validator
from torch import Tensor, nn

from safegen.core.concept import Concept, Phrases
from safegen.core.errors import ConfigError
from safegen.core.settings import MAX_COUNT, MAX_STEPS
from safegen.data.triplets.triplets import Triplets
from safegen.edits.base import TrainedEdit, join_quoted
from safegen.edits.functional import losses
from safegen.edits.functional.gradients import detach_start_token
from safegen.edits.functional.rollout import (
    Rollout,
    SchedulerName,
    frozen_predictor,
    rollout_autocast,
)
from safegen.edits.training.config import SHORT, Objective, Training
from safegen.edits.training.samples import mirror_latents
from safegen.models.families.conditioning import Conditioning
from safegen.models.families.denoisers import predict
from safegen.models.model import Model


def check_template(template: str) -> str:
    """Return a template of a text unchanged.

    Raises:
        ValueError: it has no place for the phrase.
    """
    if "{phrase}" not in template:
        raise ValueError(f"a template must contain {{phrase}}, got {template!r}")
    return template


RELEASED = Training(
    updates=400, batch=8, accumulation=1, lr=6.4e-5, weight_decay=1e-2, clip=1.0, ema=0.0
)
"""Released run for nudity: batch 4 on each of two machines.

The rate is 4e-6 times batch (4), machines (2), and 2 with a prior.
"""


class ConceptAblation(TrainedEdit):
    """Settings of the concept-ablation edit."""

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "mini": {
            "target": "base",
            "templates": ("{phrase}",),
            "num_images": 64,
            "scheduler": "ddim",
            "negative_prompt": "",
            "hflip": False,
            "weight_erase": 1.0,
            "separate_prior": False,
            "detach_start_token": False,
            "training": SHORT,
        },
        "full": {
            "target": "base",
            "templates": ("{phrase}",),
            "negative_prompt": "",
            "hflip": False,
            "weight_erase": 1.0,
            "separate_prior": False,
            "detach_start_token": False,
            "training": RELEASED.model_copy(update={"precision": "auto"}),
        },
        "paper": {},
        "paper-style": {
            "templates": (
                "{anchor}, in the style of {phrase}",
                "in {phrase}'s style, {anchor}",
                "in {phrase}'s style, {anchor}",
            ),
            "negative_prompt": "",
            "weight_prior": 0.0,
            "separate_prior": False,
            "selector": "kv2",
            "training": RELEASED.model_copy(update={"updates": 100, "lr": 1.6e-5}),
        },
    }
    """`paper`: the released command for nudity; its `erase` is one phrase, "nudity, nsfw".

    `paper-style`: the released command for styles. `mini`: ours, tuned on the miniature model.
    `full`: the losses of `mini` with the released schedule; not measured at full size.
    """
    TINY: ClassVar[Mapping[str, Any]] = {"steps": 2, "num_images": 4}
    prepares: ClassVar[str | None] = "num_images"
    paper: ClassVar[str] = "arXiv:2303.13516"
    code_url: ClassVar[str] = "https://github.com/nupurkmr9/concept-ablation"
    code_commit: ClassVar[str] = "c11fb1b"
    parity: ClassVar[str] = (
        "12 updates of `paper` and of the released training step, restated, on the same samples: "
        "the weights change alike to 1.2e-5 of the change (fp32). Images and texts are those of "
        "the released code: DPM-Solver with the phrases as negative prompt, and three templates."
    )
    deviations: ClassVar[str] = (
        "Images are stored as latents, and only mirrored ones are decoded and encoded again; the "
        "released code stores JPEG files and samples the encoder's posterior at every step. The "
        "captions are `anchors`, not a file or the answers of a language model. A phrase is drawn "
        "for each sample; the released code goes by the image's number. Not offered: the prompts "
        "for objects and for memorized images, scaled crops with a mask, and training of token "
        "embeddings. With v-prediction L_p has the velocity as its target (released: the noise). "
        "`mini` and `full` are ours: bare phrases, the original model's target."
    )
    inputs: ClassVar[Literal["triplets", "words", "both"]] = "words"

    erase: Phrases = ()
    """Phrases that name the concept, one per sample. Default: those of the concept."""
    anchors: Phrases = ()
    """Captions of harmless images, one per image. Default: the concept's counterpart."""
    templates: Annotated[
        tuple[Annotated[str, AfterValidator(check_template)], ...], Field(min_length=1)
    ] = ("{phrase}, {anchor}", "in {phrase} style, {anchor}", "{anchor}, {phrase}")
    """Trained texts, one per sample: `{phrase}` is a phrase, `{anchor}` the image's caption."""
    target: Literal["student", "base", "noise"] = "student"
    """Target of L_c: the prediction of the edited model for the caption (as released), that of the
    original model, or the noise of the sample."""
    strength: float = Field(default=0.0, ge=0)
    """With target base: distance of the target beyond the anchor, away from the concept (ours)."""
    num_images: int = Field(default=1000, ge=1, le=MAX_COUNT)
    """Images of the anchors that the original model generates once."""
    scheduler: SchedulerName = "dpm-solver"
    """Scheduler of the images."""
    steps: int = Field(default=25, ge=1, le=MAX_STEPS)
    """Steps of an image."""
    guidance: float = Field(default=6.0, ge=1, le=50)
    """Guidance scale of an image."""
    negative_prompt: str = "{phrases}"
    """Negative prompt of the images; `{phrases}` stands for all phrases, joined by commas."""
    hflip: bool = True
    """Whether half of the samples are mirrored images, encoded again."""
    weight_erase: float = Field(default=4.0, gt=0)
    """Weight of L_c, a mean over the latent.

    The released L_c sums over the 4 channels of the latent and has a weight of 1.
    """
    weight_prior: float = Field(default=1.0, ge=0)
    """Weight of L_p, the denoising loss of the anchors."""
    separate_prior: bool = True
    """Whether L_p has images, noise and timesteps of its own; otherwise those of L_c."""
    detach_start_token: bool = True
    """Whether the start token's keys and values of text get no gradient. T5 has no such token."""
    selector: str = "attention"
    """Which weights change: all attention for explicit content, kv2 for styles and objects."""
    training: Training = RELEASED
    """Settings of the training loop."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if shared := set(self.erase) & set(self.anchors):
            raise ValueError(f"erase and anchors must share no phrase, got {min(shared)!r} in both")
        return self

    def unused_settings(self) -> Iterable[tuple[str, str]]:
        """Yield each setting that has no effect with the others, and why."""
        yield from super().unused_settings()
        if self.strength and self.target != "base":
            yield "strength", f"with target {self.target}"
        if self.separate_prior and not self.weight_prior:
            yield "separate_prior", "with weight_prior 0"

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


class Samples(NamedTuple):
    """Images of anchors with the noise and the timesteps of a training step."""

    z: Tensor
    """Latents, (b, c, h, w)."""
    eps: Tensor
    """Noise to add."""
    t: Tensor
    """Timesteps, (b,)."""
    anchor: Conditioning
    """Embeddings of the captions, b rows."""


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
        self.weights = {"L_c": edit.weight_erase}
        self.weights |= {"L_p": edit.weight_prior} if edit.weight_prior else {}
        parameters = dict(model.denoiser.named_parameters())
        self.reference = {name: parameters[name].detach().clone() for name in names}
        self.schedule, self.device = model.noise_schedule, model.device
        texts = [
            [
                [
                    template.replace("{phrase}", phrase).replace("{anchor}", anchor)
                    for anchor in edit.anchors
                ]
                for template in edit.templates
            ]
            for phrase in edit.erase
        ]
        unique = list(dict.fromkeys(text for rows in texts for row in rows for text in row))
        self.texts = model.encode_text(unique).float()
        # Row of `texts` by phrase, template and anchor.
        self.rows = torch.tensor([[list(map(unique.index, row)) for row in rows] for rows in texts])
        self.anchors = model.encode_text(edit.anchors).float()
        self.latents = self._sample_images(model)

    def _sample_images(self, model: Model) -> Tensor:
        """Return latents of the original model's images of each anchor in turn.

        (views, n, c, h, w): the images, and with `hflip` also the mirrored ones.
        """
        edit, frozen = self.edit, frozen_predictor(model.denoiser)
        rollout = Rollout(
            model,
            steps=edit.steps,
            guidance=edit.guidance,
            scheduler=edit.scheduler,
            negative_prompt=edit.negative_prompt.replace("{phrases}", ", ".join(edit.erase)),
        )
        generator = torch.Generator("cpu").manual_seed(edit.training.seed * 1_000_003)
        noise = rollout.noise(edit.num_images, generator)
        text = self.anchors[torch.arange(len(noise)) % len(self.anchors)]
        with rollout_autocast(model, edit.training.precision):
            latents = [
                rollout.denoise(rollout.timesteps, x, anchor, frozen)
                for x, anchor in zip(noise.split(16), text.split(16), strict=True)
            ]
        views = [torch.cat(latents)]
        if edit.hflip:
            views.append(torch.cat([mirror_latents(model, part) for part in latents]))
        return torch.stack(views)

    def training_step(
        self,
        denoiser: nn.Module,
        micro_step: int,
        generator: torch.Generator,
        share: tuple[int, int],
    ) -> Mapping[str, Tensor]:
        """Return L_c, and L_p if it has a weight, of one batch, (b,) each."""
        mine = torch.arange(self.edit.training.batch)[share[0] :: share[1]]
        images, caption, phrase = self._draw(generator, mine)
        shape = (self.edit.training.batch,)
        template = torch.randint(len(self.edit.templates), shape, generator=generator)[mine]
        text = self.texts[self.rows[phrase, template, caption]]
        prior = self._draw(generator, mine)[0] if self.edit.separate_prior else images
        return self.compare(denoiser, images, text, prior)

    def _draw(self, g: torch.Generator, mine: Tensor) -> tuple[Samples, Tensor, Tensor]:
        """Return samples, and the indices of their captions and of a phrase for each."""
        b, device = self.edit.training.batch, self.device
        image = torch.randint(self.latents.shape[1], (b,), generator=g)[mine]
        phrase = torch.randint(len(self.edit.erase), (b,), generator=g)[mine]
        t = self.schedule.sample_timesteps(b, g)[mine].to(device)
        eps = torch.randn(b, *self.latents.shape[2:], generator=g)[mine].to(device)
        view = torch.randint(len(self.latents), (b,), generator=g)[mine]
        caption = image % len(self.anchors)
        samples = Samples(self.latents[view, image], eps, t, self.anchors[caption])
        return samples, caption, phrase

    def compare(
        self, denoiser: nn.Module, images: Samples, text: Conditioning, prior: Samples | None = None
    ) -> Mapping[str, Tensor]:
        """Return L_c = |e(c) - target|^2 and L_p = |e(anchor) - eps|^2.

        Args:
            denoiser: the network in training.
            images: samples of L_c.
            text: embeddings of the trained texts, b rows.
            prior: samples of L_p. Default: those of L_c.
        """
        prior = prior or images
        x = self.schedule.add_noise(images.z, images.eps, images.t)
        target = self._target(denoiser, images, x, text)
        with detach_start_token(denoiser, enabled=self.edit.detach_start_token):
            if not self.edit.weight_prior:
                prediction = predict(denoiser, x, images.t, text)
                return {"L_c": losses.squared_error(prediction, target)}
            x_prior = self.schedule.add_noise(prior.z, prior.eps, prior.t)
            texts, t = Conditioning.concat([text, prior.anchor]), torch.cat([images.t, prior.t])
            erased, preserved = predict(denoiser, torch.cat([x, x_prior]), t, texts).chunk(2)
        return {
            "L_c": losses.squared_error(erased, target),
            "L_p": losses.squared_error(preserved, self._truth(prior)),
        }

    def _target(
        self, denoiser: nn.Module, images: Samples, x: Tensor, text: Conditioning
    ) -> Tensor:
        """Return the target of L_c for noised latents; see `ConceptAblation.target`."""
        edit = self.edit
        if edit.target == "noise":
            return self._truth(images)
        frozen = frozen_predictor(denoiser, self.reference if edit.target == "base" else None)
        target = frozen(x, images.t, images.anchor)
        if edit.strength and edit.target == "base":
            push = frozen(x, images.t, text)
            target = losses.negative_guidance(target, push, target, strength=edit.strength)
        return target

    def _truth(self, samples: Samples) -> Tensor:
        """Return what a perfect denoiser predicts: the noise, or the velocity."""
        return self.schedule.target(samples.z, samples.eps, samples.t)
