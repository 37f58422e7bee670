"""DUO: train the denoiser to prefer safe images to their unsafe twins, under the blank text.

Park et al. 2024, arXiv:2407.21035.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from safegen.core.concept import Concept, Phrases
from safegen.core.errors import ConfigError
from safegen.core.settings import MAX_COUNT, MAX_RANK, MAX_STEPS
from safegen.data.triplets.triplets import Triplets
from safegen.edits.base import TrainedEdit, join_quoted
from safegen.edits.functional import losses
from safegen.edits.functional.rollout import (
    Rollout,
    SchedulerName,
    frozen_predictor,
    rollout_autocast,
)
from safegen.edits.training.config import SHORT, Objective, Training
from safegen.edits.training.samples import encode_triplets
from safegen.edits.training.shares import mean_of_all
from safegen.judges import SCORE_FLOOR, Judge, judge_images, load_judge
from safegen.models.families.denoisers import predict
from safegen.models.model import Model

RELEASED = Training(
    updates=1000, batch=4, accumulation=1, lr=6e-5, weight_decay=1e-2, clip=1.0, ema=0.0
)
"""Released run: one pair on each of four machines, and the rate 3e-4 times 100 / beta."""


class DUO(TrainedEdit):
    """Settings of the DUO edit."""

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "mini": {"rank": 16, "scheduler": "ddim", "steps": 25, "training": SHORT},
        "full": {"training": RELEASED.model_copy(update={"precision": "auto"})},
        "paper": {},
        "paper-violence": {
            "strength": 0.8,
            "judge": None,
            "beta": 1000.0,
            "weight_keep": 1e7,
            "training": RELEASED.model_copy(update={"updates": 500, "lr": 3e-5}),
        },
    }
    """`paper`: released values for SD 1.4 and nudity. `paper-violence`: those for violence,
    without a judge.

    `mini`: those of `paper` at the scale of the miniature model; they are not tuned. `full`: those
    of `paper` in the precision of the device; not measured at full size.
    """
    TINY: ClassVar[Mapping[str, Any]] = {"steps": 2}
    paper: ClassVar[str] = "arXiv:2407.21035"
    code_url: ClassVar[str] = "https://github.com/naver-ai/DUO"
    code_commit: ClassVar[str] = "e0f2ae6"
    parity: ClassVar[str] = (
        "12 updates of `paper` beside the released lines, restated, with peft's LoRA and the same "
        "factors: the weights change alike to 2.2e-3 of the change (dpo) and 1.2e-4 (kto). The 40 "
        "modules, rank, scale and initial deviation are equal. Twins equal those of diffusers' "
        "image-to-image pipeline to 1e-3, by PNDM and by DDIM."
    )
    deviations: ClassVar[str] = (
        "Safe twins are latents, judged and generated again at most 8 times (released: until the "
        "detector is silent). An image is the mean of the encoder's posterior (released: a sample "
        "at every step; the deviations are 0.0045 and 0.99 on the miniature model). One prompt "
        "and one negative prompt serve all twins. Timesteps are counted from the cleanest. The "
        "setting `loss_type=kto` is that of the released code, not the loss of KTO."
    )
    inputs: ClassVar[Literal["triplets", "words", "both"]] = "both"

    erase: Phrases = ()
    """Phrases that name the concept: negative prompt of the safe twins, not trained.

    Default: those of the concept.
    """
    anchors: Phrases = ()
    """Harmless phrases: prompt of the safe twins. Default: the concept's counterpart."""
    strength: float = Field(default=0.75, gt=0, le=1)
    """Share of the steps by which an unsafe image is noised and denoised to its safe twin.

    Counted as diffusers' image-to-image pipelines do: 0.75 of 50 is 37.
    """
    scheduler: SchedulerName = "pndm"
    """Scheduler of a safe twin."""
    steps: int = Field(default=50, ge=1, le=MAX_STEPS)
    """Steps of a whole image."""
    guidance: float = Field(default=7.5, ge=1, le=50)
    """Guidance scale of a safe twin."""
    judge: str | None = None
    """Judge that must find nothing in a safe twin, which is generated again otherwise.

    None accepts every twin. Default: the judge of the concept.
    """
    labels: tuple[str, ...] = ()
    """Labels of the judge that make a twin unsafe. Default: those of the concept or the judge."""
    threshold: float | None = Field(default=None, ge=SCORE_FLOOR, le=1)
    """Minimum score of a detection. Default: that of the concept or the judge."""
    max_attempts: int = Field(default=8, ge=1, le=MAX_COUNT)
    """Attempts per twin. A pair without a safe twin is left out and listed in the patch."""
    loss_type: Literal["dpo", "kto"] = "dpo"
    """Whether an unsafe image is compared with its twin, or with the mean of the batch's twins."""
    beta: float = Field(default=500.0, gt=0)
    """Sharpness of the preference: 500 for nudity, 1000 for violence."""
    weight_keep: float = Field(default=5e6, ge=0)
    """Weight of L_o, which keeps the prediction for pure noise; the paper's lambda is 1e4 beta."""
    timesteps: tuple[int, int] = (0, 750)
    """Range of training timesteps, counted from the cleanest, the last one excluded."""
    share_timestep: bool = False
    """Whether the two images of a pair share their timestep, as they always do for kto."""
    selector: str = "attn1"
    """Which weights change."""
    rank: int | None = Field(default=32, ge=1, le=MAX_RANK)
    """Rank of the LoRA, as published; None trains the selected weights themselves."""
    training: Training = RELEASED
    """Settings of the training loop. Its rate and `weight_keep` belong to `beta`."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not 0 <= self.timesteps[0] < self.timesteps[1]:
            raise ValueError(f"timesteps must be 0 <= first < last, got {self.timesteps}")
        return self

    def unused_settings(self) -> Iterable[tuple[str, str]]:
        """Yield each setting that has no effect with the others, and why."""
        yield from super().unused_settings()
        if self.loss_type == "kto" and self.share_timestep:
            yield "share_timestep", "with loss_type kto"
        if self.judge is None:
            for name in self.changed("labels", "threshold", "max_attempts"):
                yield name, "without a judge"

    def describe(self) -> str:
        """Return one or two sentences for a report."""
        return (
            "The edit learns from images of the concept. The model itself turns each into a "
            f"harmless twin, away from the phrases of the concept ({join_quoted(self.erase)}), and "
            "is trained to prefer the twins, under the blank text only."
        )

    @classmethod
    def defaults_from(cls, concept: Concept, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return the phrases of a concept and of its counterpart, and its judge."""
        defaults = super().defaults_from(concept, settings) | {"anchors": concept.counterpart}
        if settings.get("judge", concept.judge) == concept.judge:  # others have other labels
            defaults |= {"judge": concept.judge, "labels": concept.labels}
            defaults |= {"threshold": concept.threshold}
        return defaults

    def build_objective(
        self, model: Model, triplets: Triplets | None, names: Sequence[str]
    ) -> Objective:
        """Return batches and losses; see `TrainedEdit.build_objective`."""
        assert triplets is not None
        return DUOObjective(self, model, triplets, names)


class DUOObjective:
    """Batches and losses of DUO. Safe twins are generated once, as latents."""

    def __init__(self, edit: DUO, model: Model, triplets: Triplets, names: Sequence[str]) -> None:
        """Encode the unsafe images and generate their safe twins.

        Raises:
            ConfigError: there are no anchors, no safe twin, or too few timesteps on this model.
        """
        if not edit.anchors:
            raise ConfigError(
                "duo needs anchors, harmless phrases for the safe twins. "
                "Give a concept with a counterpart, or set anchors."
            )
        self.edit = edit
        self.weights = {"L_dpo": 1.0} | ({"L_o": edit.weight_keep} if edit.weight_keep else {})
        self.schedule, self.device = model.noise_schedule, model.device
        if edit.timesteps[1] > len(self.schedule):
            raise ConfigError(
                f"timesteps must end by {len(self.schedule)} on this model, got {edit.timesteps[1]}"
            )
        self.by_noise = self.schedule.by_noise.to(model.device)
        parameters = dict(model.denoiser.named_parameters())
        self.reference = {name: parameters[name].detach().clone() for name in names}
        self.blank = model.encode_text([""]).float()
        self.unsafe = encode_triplets(model, triplets, flip=False)[0, 0]
        self.metadata: dict[str, Any] = {}
        if edit.judge:
            judge = load_judge(edit.judge, labels=edit.labels, threshold=edit.threshold)
            self._redraw_until_safe(model, judge, [row.id for row in triplets.rows])
        else:
            self.safe = self._redraw(model)

    def _redraw_until_safe(self, model: Model, judge: Judge, ids: Sequence[str]) -> None:
        """Generate safe twins until a judge finds nothing, and leave out pairs without one.

        Raises:
            ConfigError: no pair has a safe twin.
        """
        self.safe, pending = torch.empty_like(self.unsafe), list(range(len(ids)))
        pending_after_attempt = []
        for attempt in range(self.edit.max_attempts):
            latents = self._redraw(model, attempt, pending)
            verdicts = judge_images(judge, model.decode_images(latents))
            # A twin that cannot be judged counts as unsafe.
            is_safe = [verdict == "safe" for verdict in verdicts]
            for row, twin, safe in zip(pending, latents, is_safe, strict=True):
                if safe:
                    self.safe[row] = twin
            pending = [row for row, safe in zip(pending, is_safe, strict=True) if not safe]
            pending_after_attempt.append(len(pending))
            if not pending:
                break
        paired = [row for row in range(len(ids)) if row not in pending]
        left_out = [ids[row] for row in pending]
        if not paired:
            raise ConfigError(
                f"judge {judge.id} finds the concept in every safe twin of {len(ids)} images "
                f"after {self.edit.max_attempts} attempts. "
                "Set harmless anchors, a larger strength, more max_attempts, or no judge."
            )
        self.metadata["twins"] = {
            "judge": judge.id,
            "pairs": len(paired),
            "pending_after_attempt": pending_after_attempt,
            "left_out": left_out,
        }
        self.safe, self.unsafe = self.safe[paired], self.unsafe[paired]

    def _redraw(self, model: Model, attempt: int = 0, rows: Sequence[int] | None = None) -> Tensor:
        """Return safe twins of unsafe latents: noised, then denoised toward the anchors (SDEdit).

        Args:
            model: the model.
            attempt: index of the attempt; every attempt has noise of its own.
            rows: which latents. Default: all.
        """
        edit, frozen = self.edit, frozen_predictor(model.denoiser)
        rollout = Rollout(
            model,
            steps=edit.steps,
            guidance=edit.guidance,
            scheduler=edit.scheduler,
            negative_prompt=", ".join(edit.erase),
        )
        text = model.encode_text([", ".join(edit.anchors)]).float()
        timesteps = rollout.timesteps[edit.steps - max(int(edit.strength * edit.steps), 1) :]
        seed = edit.training.seed * 1_000_003 + attempt
        noise = rollout.noise(len(self.unsafe), torch.Generator("cpu").manual_seed(seed))
        index = slice(None) if rows is None else list(rows)
        z, eps = self.unsafe[index], noise[index]
        first = timesteps[0].to(self.device).expand(len(z))
        latents = []
        with rollout_autocast(model, edit.training.precision):
            for noised in self.schedule.add_noise(z, eps, first).split(16):
                prompt = text.expand(len(noised))
                latents.append(rollout.denoise(timesteps, noised, prompt, frozen))
        return torch.cat(latents)

    def training_step(
        self,
        denoiser: nn.Module,
        micro_step: int,
        generator: torch.Generator,
        share: tuple[int, int],
    ) -> Mapping[str, Tensor]:
        """Return L_dpo, and L_o if it has a weight, of one batch, (b,) each."""
        b, g, device = self.edit.training.batch, generator, self.device
        mine = torch.arange(b)[share[0] :: share[1]]
        pair = torch.randint(len(self.unsafe), (b,), generator=g)[mine].to(device)
        ranks = torch.randint(*self.edit.timesteps, (2, b), generator=g)[:, mine].to(device)
        t_safe, t_unsafe = self.by_noise[ranks]
        eps = torch.randn(b, *self.unsafe.shape[1:], generator=g)[mine].to(device)
        if self.edit.share_timestep or self.edit.loss_type == "kto":
            t_unsafe = t_safe
        return self.compare(denoiser, self.safe[pair], self.unsafe[pair], eps, t_safe, t_unsafe)

    def compare(
        self,
        denoiser: nn.Module,
        safe: Tensor,
        unsafe: Tensor,
        eps: Tensor,
        t_safe: Tensor,
        t_unsafe: Tensor,
    ) -> Mapping[str, Tensor]:
        """Return L_dpo, and L_o = |e(z_T) - e0(z_T)|^2 at the noisiest timestep.

        L_dpo is `losses.preference`, or `losses.unpaired_preference` for kto.

        Args:
            denoiser: the network in training.
            safe: latents of safe twins, (b, c, h, w).
            unsafe: latents of the unsafe images.
            eps: noise that a pair shares; also the pure noise z_T of L_o.
            t_safe: timesteps of the safe latents, (b,).
            t_unsafe: timesteps of the unsafe latents.
        """
        b, t = len(safe), torch.cat([t_safe, t_unsafe])
        z, noise = torch.cat([safe, unsafe]), torch.cat([eps, eps])
        x, truth = self.schedule.add_noise(z, noise, t), self.schedule.target(z, noise, t)
        if self.edit.weight_keep:
            x, t = torch.cat([x, eps]), torch.cat([t, self.by_noise[-1].expand(b)])
        text = self.blank.expand(len(x))
        original = frozen_predictor(denoiser, self.reference)(x, t, text)
        prediction = predict(denoiser, x, t, text)
        safe_error, unsafe_error = losses.squared_error(prediction[: 2 * b], truth).chunk(2)
        safe_before, unsafe_before = losses.squared_error(original[: 2 * b], truth).chunk(2)
        loss: Callable[..., Tensor] = losses.preference
        if self.edit.loss_type == "kto":
            loss = partial(losses.unpaired_preference, mean=mean_of_all)
        terms = {
            "L_dpo": loss(safe_error, safe_before, unsafe_error, unsafe_before, beta=self.edit.beta)
        }
        if self.edit.weight_keep:
            terms["L_o"] = losses.squared_error(prediction[2 * b :], original[2 * b :])
        return terms
