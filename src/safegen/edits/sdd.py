"""SDD: train the denoiser to predict the same for a concept's phrases as for the blank text.

Kim et al. 2023, arXiv:2307.05977.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from safegen.core.concept import Phrases
from safegen.core.settings import MAX_COUNT, MAX_STEPS
from safegen.data.triplets.triplets import Triplets
from safegen.edits.base import TrainedEdit, join_quoted
from safegen.edits.functional import losses
from safegen.edits.functional.rollout import Rollout, frozen_predictor, rollout_autocast
from safegen.edits.training.config import SHORT, Objective, Training
from safegen.models.families.conditioning import Conditioning
from safegen.models.families.denoisers import predict
from safegen.models.model import Model

PUBLISHED = Training(
    updates=1500,
    batch=1,
    accumulation=1,
    lr=1e-5,
    weight_decay=1e-4,
    clip=1.0,
    ema=0.999,
    ema_ramp=False,
)
"""Training of the released script."""


class SDD(TrainedEdit):
    """Settings of the SDD edit. The patch holds the weight average, which is the teacher."""

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "mini": {"rollout": "base", "steps": 25, "weight_anchor": 1.0, "training": SHORT},
        "full": {
            "rollout": "base",
            "weight_anchor": 1.0,
            "training": PUBLISHED.model_copy(update={"precision": "auto"}),
        },
        "paper": {},
    }
    """`paper`: the released script. `mini`: ours, tuned on the miniature model.

    `full`: latents and losses of `mini` with the released schedule; not measured at full size.
    """
    TINY: ClassVar[Mapping[str, Any]] = {"steps": 4, "trajectories": 2}
    prepares: ClassVar[str | None] = "trajectories"
    paper: ClassVar[str] = "arXiv:2307.05977"
    code_url: ClassVar[str] = "https://github.com/nannullna/safe-diffusion"
    code_commit: ClassVar[str] = "a2e820c"
    parity: ClassVar[str] = (
        "20 updates of `paper` beside the released training step, AdamW, clipping and average, on "
        "the same latents: the printed losses are equal to 6 digits. The averages change alike: "
        "cosine 0.9994, for a change of 7e-4 in fp32."
    )
    deviations: ClassVar[str] = (
        "The timestep is that of the DDIM step of the latents; the released code draws it in the "
        "step's bucket of 20 (140 to 159 where ours is 141). A rollout of no steps is pure noise "
        "(released: a finished image with the noisiest timestep). `mini` and `full` are ours: "
        "latents of the original model, and L_a."
    )
    inputs: ClassVar[Literal["triplets", "words", "both"]] = "words"

    erase: Phrases = ()
    """Phrases that name the concept, trained in turn. Default: those of the concept.

    Images are generated of all of them, joined by commas.
    """
    rollout: Literal["average", "base"] = "average"
    """Model that generates the latents: the average for every batch, or the original once."""
    trajectories: int = Field(default=16, ge=1, le=MAX_COUNT)
    """With rollout base: images, every step of which is a sample."""
    steps: int = Field(default=50, ge=1, le=MAX_STEPS)
    """DDIM steps of a rollout."""
    guidance: float = Field(default=3.0, ge=1, le=50)
    """Guidance scale of a rollout."""
    weight_anchor: float = Field(default=0.0, ge=0)
    """Weight of L_a, which keeps the blank prediction, the target of L_d (ours)."""
    selector: str = "attn2"
    """Which weights change."""
    training: Training = PUBLISHED
    """Settings of the training loop.

    The average is slow from the first update: after 1,500 updates it still holds 22 % of the
    original weights.
    """

    def unused_settings(self) -> Iterable[tuple[str, str]]:
        """Yield each setting that has no effect with the others, and why."""
        yield from super().unused_settings()
        if self.rollout == "average" and self.changed("trajectories"):
            yield "trajectories", "with rollout average"

    def describe(self) -> str:
        """Return one or two sentences for a report."""
        return (
            f"The edit learns from phrases ({join_quoted(self.erase)}), not from images. On images "
            "that the model itself begins to generate of them, it is trained to predict the same "
            "with these phrases as without. A prompt that paraphrases them may still generate the "
            "concept."
        )

    def build_objective(
        self, model: Model, triplets: Triplets | None, names: Sequence[str]
    ) -> Objective:
        """Return batches and losses; see `TrainedEdit.build_objective`."""
        return SDDObjective(self, model, names)


class SDDObjective:
    """Batches and losses of SDD."""

    def __init__(self, edit: SDD, model: Model, names: Sequence[str]) -> None:
        """Encode the phrases, and run the rollouts of the original model."""
        self.edit = edit
        self.weights = {"L_d": 1.0} | ({"L_a": edit.weight_anchor} if edit.weight_anchor else {})
        parameters = dict(model.denoiser.named_parameters())
        self.reference = {name: parameters[name].detach().clone() for name in names}
        self.rollout = Rollout(model, steps=edit.steps, guidance=edit.guidance)
        self.text = model.encode_text(edit.erase).float()
        self.rollout_text = model.encode_text([", ".join(edit.erase)]).float()
        self._ema_weights: Callable[[], Mapping[str, Tensor]] | None = None
        base = edit.rollout == "base"
        self.trajectories = self._sample_trajectories(model) if base else torch.empty(0)

    def set_ema(self, average: Callable[[], Mapping[str, Tensor]]) -> None:
        """Store the function that returns the averaged weights."""
        self._ema_weights = average

    def _sample_trajectories(self, model: Model) -> Tensor:
        """Return the latents of every step of the original model's images, (n, steps, c, h, w)."""
        generator = torch.Generator("cpu").manual_seed(self.edit.training.seed * 1_000_003)
        noise = self.rollout.noise(self.edit.trajectories, generator)
        frozen = frozen_predictor(model.denoiser)
        with rollout_autocast(model, self.edit.training.precision):
            parts = [
                self.rollout.trajectory(x, self.rollout_text.expand(len(x)), frozen, {})
                for x in noise.split(8)
            ]
        return torch.cat([part["x"] for part in parts])

    def training_step(
        self,
        denoiser: nn.Module,
        micro_step: int,
        generator: torch.Generator,
        share: tuple[int, int],
    ) -> Mapping[str, Tensor]:
        """Return L_d, and L_a if it has a weight, of one batch, (b,) each."""
        b, g, device = self.edit.training.batch, generator, self.rollout.device
        mine = torch.arange(b)[share[0] :: share[1]]
        stops = torch.randint(self.edit.steps, (b,), generator=g)
        text = self.text[(micro_step * b + mine) % len(self.text)]
        if self.edit.rollout == "base":
            stops = stops[mine]
            row = torch.randint(len(self.trajectories), (b,), generator=g)[mine]
            x = self.trajectories[row, stops].to(device)
        else:
            assert self._ema_weights is not None, "the trainer calls set_ema first"
            stops = stops[:1].expand(len(mine))  # all samples of a batch stop at one step
            noise = self.rollout.noise(b, g)[mine.to(device)]
            prompt = self.rollout_text.expand(len(noise))
            teacher = frozen_predictor(denoiser, self._ema_weights())
            x = self.rollout.sample_until(int(stops[0]), noise, prompt, teacher)
        return self.compare(denoiser, x, self.rollout.timesteps[stops].to(device), text)

    def compare(
        self, denoiser: nn.Module, x: Tensor, t: Tensor, text: Conditioning
    ) -> Mapping[str, Tensor]:
        """Return L_d = |e(c) - sg e(blank)|^2 and L_a = |e(blank) - e0(blank)|^2.

        e is the network in training, e0 the original one.

        Args:
            denoiser: the network in training.
            x: latents, (b, c, h, w).
            t: timesteps of the latents, (b,).
            text: embeddings of the phrases, b rows.
        """
        blank_text = self.rollout.negative_text.expand(len(x))
        if not self.edit.weight_anchor:
            target = frozen_predictor(denoiser)(x, t, blank_text)
            return {"L_d": losses.squared_error(predict(denoiser, x, t, text), target)}
        original = frozen_predictor(denoiser, self.reference)(x, t, blank_text)
        both = Conditioning.concat([text, blank_text])
        prediction, blank = predict(denoiser, torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        return {
            "L_d": losses.squared_error(prediction, blank.detach()),
            "L_a": losses.squared_error(blank, original),
        }
