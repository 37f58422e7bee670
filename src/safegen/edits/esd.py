"""ESD: train the denoiser to predict the opposite of a concept's phrases.

Gandikota et al. 2023, arXiv:2303.07345.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from safegen.core.concept import Concept, Phrases
from safegen.core.settings import MAX_COUNT, MAX_STEPS
from safegen.data.triplets.triplets import Triplets
from safegen.edits.base import TrainedEdit, join_quoted
from safegen.edits.functional import losses
from safegen.edits.functional.adversary import AdversarySetting, build_adversary
from safegen.edits.functional.rollout import (
    Rollout,
    SchedulerName,
    frozen_predictor,
    rollout_autocast,
)
from safegen.edits.training.config import SHORT, Objective, Training
from safegen.edits.training.samples import read_captions
from safegen.models.families.conditioning import Conditioning
from safegen.models.families.denoisers import predict
from safegen.models.model import Model

PUBLISHED = Training(
    updates=1000, batch=1, accumulation=1, lr=1e-5, weight_decay=0.0, clip=1e9, ema=0.0
)
"""Adam with a constant learning rate, without clipping and averaging."""


class ESD(TrainedEdit):
    """Settings of the ESD edit."""

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "mini": {
            "rollout": "base",
            "steps": 25,
            "selector": "attn2",
            "weight_retain": 1.0,
            "training": SHORT,
        },
        "full": {
            "rollout": "base",
            "selector": "attn2",
            "weight_retain": 1.0,
            "training": PUBLISHED.model_copy(update={"precision": "auto"}),
        },
        "paper": {"captions": ()},
        "paper-x": {"captions": (), "selector": "attn2"},
        "rewritten": {
            "captions": (),
            "selector": "attn2",
            "rollout": "base",
            "scheduler": "pndm",
            "trajectories": 100,
            "training": PUBLISHED.model_copy(update={"updates": 200, "lr": 5e-5}),
        },
    }
    """`paper`: ESD-u of the first code, its choice for nudity. `paper-x`: ESD-x.

    `rewritten`: `esd-x` of the present code for SD 1.4; its `esd-u` and `esd-x-strict` are the
    selectors `esd-u` and `kv2`. Its `negative_guidance` 2 is `strength` 1 here, as it subtracts
    from e0(c), not from e0(blank); with `erase_from` both subtract from e0(erase_from), and its 2
    is `strength` 2. `mini`: ours, tuned on the miniature model. `full`: its latents and losses
    with the published schedule; not measured at full size.
    """
    TINY: ClassVar[Mapping[str, Any]] = {"steps": 4, "trajectories": 2}
    prepares: ClassVar[str | None] = "trajectories"
    paper: ClassVar[str] = "arXiv:2303.07345"
    code_url: ClassVar[str] = "https://github.com/rohitgandikota/erasing"
    code_commit: ClassVar[str] = "25613d2"
    parity: ClassVar[str] = (
        "12 updates of `rewritten` beside the released rollouts, loss and Adam: the weights change "
        "alike to 6e-6 of the change, with `erase_from` to 1.4e-5 (fp32, both by DDIM). Latents of "
        "every PNDM and DDIM step equal those of diffusers' pipeline to 1e-4. The selectors "
        "`attn2`, `kv2`, `esd-u` and `noxattn` name the released parameters."
    )
    deviations: ClassVar[str] = (
        "Latents come from exactly the steps before their timestep. The first code draws the "
        "timestep in the bucket of the step, and stops its sampler late: its latents are 39 to 58 "
        "timesteps cleaner than their label. `rewritten` generates at 1024 pixels; ours is the "
        "model's own size. Trained weights are fp32 (released: bf16). `mini` and `full` are ours: "
        "they have L_r for captions on the phrases' latents, while AdvUnlearn (arXiv:2405.15234) "
        "generates latents of the retained prompts."
    )
    inputs: ClassVar[Literal["triplets", "words", "both"]] = "words"

    erase: Phrases = ()
    """Phrases that name the concept, one per sample. Default: those of the concept."""
    erase_from: str | None = None
    """Phrase that is sampled and trained, to remove the concept from it only.

    An example is "cowboy" without "a cowboy hat". None removes the phrases themselves.
    """
    strength: float = Field(default=1.0, ge=0)
    """Distance of the target beyond the blank prediction, or beyond that of `erase_from` (eta)."""
    rollout: Literal["student", "base"] = "student"
    """Model that generates the latents: the edited one for every batch, or the original once."""
    trajectories: int = Field(default=16, ge=1, le=MAX_COUNT)
    """With rollout base: images per phrase, every step of which is a sample."""
    scheduler: SchedulerName = "ddim"
    """Scheduler of a rollout."""
    steps: int = Field(default=50, ge=1, le=MAX_STEPS)
    """Steps of a rollout."""
    guidance: float = Field(default=3.0, ge=1, le=50)
    """Guidance scale of a rollout."""
    weight_retain: float = Field(default=0.0, ge=0)
    """Weight of L_r, which keeps the predictions for captions on the latents of the phrases."""
    captions: tuple[str, ...] = ()
    """Prompt lists (`source:list`) and text files with benign captions for L_r."""
    adversary: AdversarySetting = 0.0
    """Adversary that moves the text embedding of the phrases: the relative size of one step
    (0 is none), a name, or a table with a name and settings."""
    selector: str = "noxattn"
    """Which weights change: attn2 is ESD-x, kv2 ESD-x-strict, noxattn ESD-u of the first code,
    esd-u that of the present code."""
    training: Training = PUBLISHED
    """Settings of the training loop."""

    def unused_settings(self) -> Iterable[tuple[str, str]]:
        """Yield each setting that has no effect with the others, and why."""
        yield from super().unused_settings()
        if self.rollout == "student" and self.changed("trajectories"):
            yield "trajectories", "with rollout student"
        if self.captions and not self.weight_retain:
            yield "captions", "with weight_retain 0"
        if self.weight_retain and not self.captions:
            yield "weight_retain", "without captions"

    def describe(self) -> str:
        """Return one or two sentences for a report."""
        return (
            f"The edit learns from phrases ({join_quoted(self.erase)}), not from images. On images "
            "that the model itself begins to generate, it is trained to predict the opposite of "
            "these phrases. A prompt that paraphrases them may still generate the concept."
        )

    @classmethod
    def defaults_from(cls, concept: Concept, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return the phrases of a concept, and its captions for settings with an L_r."""
        captions = {"captions": concept.captions} if settings.get("weight_retain") else {}
        return super().defaults_from(concept, settings) | captions

    def build_objective(
        self, model: Model, triplets: Triplets | None, names: Sequence[str]
    ) -> Objective:
        """Return batches and losses; see `TrainedEdit.build_objective`."""
        return ESDObjective(self, model, names)


class ESDObjective:
    """Batches and losses of ESD. With rollout base, latents and targets are computed once."""

    def __init__(self, edit: ESD, model: Model, names: Sequence[str]) -> None:
        """Encode phrases and captions, and run the rollouts of the original model."""
        self.edit = edit
        self.attack = build_adversary(edit.adversary, model, names)
        parameters = dict(model.denoiser.named_parameters())
        self.reference = {name: parameters[name].detach().clone() for name in names}
        self.rollout = Rollout(
            model, steps=edit.steps, guidance=edit.guidance, scheduler=edit.scheduler
        )
        self.text = model.encode_text(edit.erase).float()
        self.trained_text = self.text
        if edit.erase_from is not None:
            erased_from = model.encode_text([edit.erase_from]).float()
            self.trained_text = erased_from.expand(len(self.text))
        captions = read_captions(edit.captions) if edit.weight_retain else []
        self.captions = model.encode_text(captions).float() if captions else self.text[:0]
        self.weights = {"L_e": 1.0} | ({"L_r": edit.weight_retain} if captions else {})
        self.trajectories = self._sample_trajectories(model) if edit.rollout == "base" else []

    def _sample_trajectories(self, model: Model) -> list[dict[str, Tensor]]:
        """Return the latents of every step and the original predictions there, for each phrase."""
        trajectories, n, seed = [], self.edit.trajectories, self.edit.training.seed * 1_000_003
        frozen = frozen_predictor(model.denoiser)
        with rollout_autocast(model, self.edit.training.precision):
            for i in range(len(self.text)):
                noise = self.rollout.noise(n, torch.Generator("cpu").manual_seed(seed + i))
                parts = []
                for x in noise.split(8):
                    text = self.trained_text[[i]].expand(len(x))
                    extra = {"erase": self.text[[i]].expand(len(x))}
                    extra = extra if self.edit.erase_from is not None else {}
                    parts.append(self.rollout.trajectory(x, text, frozen, extra))
                merged = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
                trajectories.append(merged)
        return trajectories

    def training_step(
        self,
        denoiser: nn.Module,
        micro_step: int,
        generator: torch.Generator,
        share: tuple[int, int],
    ) -> Mapping[str, Tensor]:
        """Return L_e, and L_r if it has a weight, of one batch, (b,) each."""
        b, g, device = self.edit.training.batch, generator, self.rollout.device
        mine = torch.arange(b)[share[0] :: share[1]]
        phrase = torch.randint(len(self.text), (b,), generator=g)[mine]
        stops = torch.randint(self.edit.steps, (b,), generator=g)
        caption = torch.randint(max(len(self.captions), 1), (b,), generator=g)[mine]
        if self.edit.rollout == "base":
            row = torch.randint(self.edit.trajectories, (b,), generator=g)[mine]
            stops = stops[mine]
            indices = list(zip(phrase, row, stops, strict=True))
            sample = {
                name: torch.stack([self.trajectories[i][name][j, k] for i, j, k in indices])
                for name in self.trajectories[0]
            }
            sample = {name: value.to(device) for name, value in sample.items()}
        else:
            stops = stops[:1].expand(len(mine))  # all samples of a batch stop at one step
            noise = self.rollout.noise(b, g)[mine.to(device)]
            sample = self._rollout_student(denoiser, noise, phrase, int(stops[0]))
        t = self.rollout.timesteps[stops].to(device)
        captions = self.captions[caption] if "L_r" in self.weights else None
        return self.compare(denoiser, sample, t, self.trained_text[phrase], captions)

    def _rollout_student(
        self, denoiser: nn.Module, noise: Tensor, phrase: Tensor, stop: int
    ) -> dict[str, Tensor]:
        """Return latents of the edited model at one step, and the original predictions there."""
        text, original = self.trained_text[phrase], frozen_predictor(denoiser, self.reference)
        x = self.rollout.sample_until(stop, noise, text, frozen_predictor(denoiser))
        t = self.rollout.timesteps[stop]
        cond, uncond = self.rollout.predict_cfg(t, x, text, original)
        sample = {"x": x, "text": cond, "blank": uncond}
        if self.edit.erase_from is not None:
            timesteps = self.rollout.expand_timesteps(t, len(x))
            sample["erase"] = original(x, timesteps, self.text[phrase])
        return sample

    def compare(
        self,
        denoiser: nn.Module,
        sample: Mapping[str, Tensor],
        t: Tensor,
        text: Conditioning,
        captions: Conditioning | None,
    ) -> Mapping[str, Tensor]:
        """Return L_e and L_r for given latents and original predictions.

        Args:
            denoiser: the network in training.
            sample: latents `x`, the original predictions `text` and `blank`, and with `erase_from`
                also `erase`, the prediction for the phrases: (b, c, h, w) each.
            t: timesteps of the latents, (b,).
            text: embeddings of the trained text, b rows.
            captions: embeddings of captions, b rows. None leaves L_r out.
        """
        x, blank, strength = sample["x"], sample["blank"], self.edit.strength
        if "erase" in sample:
            base, push = sample["text"], sample["erase"]
        else:
            base, push = blank, sample["text"]
        target = losses.negative_guidance(base, push, blank, strength=strength)
        if self.attack:
            text = self.attack(denoiser, x, t, text, want=target, before=push)
        if captions is None:
            return {"L_e": losses.squared_error(predict(denoiser, x, t, text), target)}
        retained_target = frozen_predictor(denoiser, self.reference)(x, t, captions)
        both = Conditioning.concat([text, captions])
        erased, retained = predict(denoiser, torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        return {
            "L_e": losses.squared_error(erased, target),
            "L_r": losses.squared_error(retained, retained_target),
        }
