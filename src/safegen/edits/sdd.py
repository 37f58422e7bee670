"""SDD: teach the denoiser to answer a concept's words as it answers none (Kim et al.

2023, arXiv:2307.05977).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from safegen.core.concept import Concept
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
    "default": {"rollout": "base", "steps": 25, "weight_anchor": 1.0, "training": SHORT},
    "paper": {},
}
"""`paper`: the released script's values. `default`: ours, for the miniature model."""


class SDD(TrainedEdit):
    """Settings of the SDD edit.

    What is saved is the weight average (the teacher), never the last weights.
    """

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = PRESETS
    inputs: ClassVar[Literal["triplets", "words"]] = "words"

    erase: tuple[str, ...] = ()
    """Words that ask for the concept, taught in turn.

    Pictures are drawn from all of them joined by commas. A concept lends its own.
    """
    rollout: Literal["average", "base"] = "average"
    """Whose pictures are stopped on their way: the weight average's, anew for each batch (as released), or the untouched model's, once."""
    trajectories: int = Field(default=16, ge=1)
    """With rollout base: pictures, every step of each of which is kept."""
    steps: int = Field(default=50, ge=1)
    """DDIM steps of a rollout."""
    guidance: float = Field(default=3.0, ge=1)
    """Guidance of a rollout."""
    weight_anchor: float = Field(default=0.0, ge=0)
    """Weight of L_a: the blank prediction, which is the target, should stay what it was (ours.

    Nothing holds it in the paper).
    """
    selector: str = "attn2"
    """Which weights change."""
    training: Training = Training(
        updates=1500,
        batch=1,
        accumulation=1,
        lr=1e-5,
        weight_decay=1e-4,
        clip=1.0,
        ema=0.999,
        ema_ramp=False,
    )
    """How the loop trains.

    The average is slow from the start: after 1,500 updates a fifth of it is still the untouched
    model.
    """

    @model_validator(mode="after")
    def _no_idle_setting(self) -> Self:
        if (
            self.rollout == "average"
            and self.trajectories != type(self).model_fields["trajectories"].default
        ):
            raise ValueError(
                "trajectories has no effect with rollout average, which draws anew for each batch; leave it out"
            )
        if not self.training.ema:
            raise ValueError("sdd saves its weight average, so training.ema must be > 0, got 0")
        check_phrases(self.erase)
        return self

    def describe(self) -> str:
        """Return it."""
        return (
            f"It is given words ({join_quoted(self.erase)}) and no pictures. On pictures that the model itself begins to draw of them, it "
            "is taught to predict the same with these words as without. A prompt that asks for the same in other words may still get "
            "it."
        )

    @classmethod
    def defaults_from(cls, concept: Concept, said: Mapping[str, Any]) -> dict[str, Any]:
        """Return its words."""
        return phrases_from(cls.method(), concept, said)

    def build_objective(
        self, model: Model, triplets: Triplets | None, names: Sequence[str]
    ) -> Objective:
        """Return its batches and losses."""
        return SDDObjective(self, model, names)


class SDDObjective:
    """SDD's batches and losses."""

    def __init__(self, edit: SDD, model: Model, names: Sequence[str]) -> None:
        """Encode the words; make the rollouts that can be made once."""
        self.edit, words = edit, require_phrases("sdd", edit.erase)
        self.weights = {"L_d": 1.0} | ({"L_a": edit.weight_anchor} if edit.weight_anchor else {})
        own = dict(model.denoiser.named_parameters())
        self.reference = {name: own[name].detach().clone() for name in names}
        self.walk = DdimRollout(model, steps=edit.steps, guidance=edit.guidance)
        self.text, self.drawn = (
            model.encode_text(list(words)).float(),
            model.encode_text([", ".join(words)]).float(),
        )
        self.fingerprint = " ".join([edit.model_dump_json(exclude={"training"}), model.hash])
        self._average: Callable[[], Mapping[str, Tensor]] | None = None
        self.pool = self._pool(model) if edit.rollout == "base" else torch.empty(0)

    def set_ema(self, average: Callable[[], Mapping[str, Tensor]]) -> None:
        """Keep the question for the averaged weights."""
        self._average = average

    def _pool(self, model: Model) -> Tensor:
        """Return latents of every step of the untouched model's pictures, (n, steps, c, h, w)."""
        precision = self.edit.training.precision
        x = self.walk.noise(
            self.edit.trajectories,
            torch.Generator("cpu").manual_seed(self.edit.training.seed * 1_000_003),
        )
        with full_precision(model, precision):
            parts = [
                self.walk.trajectory(
                    p, self.drawn.expand(len(p), -1, -1), frozen_predictor(model.denoiser), {}
                )["x"]
                for p in x.split(8)
            ]
        return torch.cat(parts)

    def training_step(
        self,
        denoiser: nn.Module,
        micro_step: int,
        generator: torch.Generator,
        share: tuple[int, int],
    ) -> Mapping[str, Tensor]:
        """Draw one batch and return L_d, and L_a where it has a weight, (b,) each.

        The words take turns.
        """
        b, g = self.edit.training.batch, generator
        mine = torch.arange(b)[share[0] :: share[1]]
        stops = torch.randint(self.edit.steps, (b,), generator=g)
        text = self.text[(micro_step * b + mine) % len(self.text)]
        if self.edit.rollout == "base":
            stops = stops[mine]
            at = torch.randint(len(self.pool), (b,), generator=g)[mine]
            x = self.pool[at, stops].to(self.walk.device)
        else:
            assert self._average is not None, "the loop gives the average before the first batch"
            stops = stops[:1].expand(len(mine))  # the samples of a batch stop together
            noise = self.walk.noise(b, g)[mine.to(self.walk.device)]
            x = self.walk.sample_until(
                int(stops[0]),
                noise,
                self.drawn.expand(len(noise), -1, -1),
                frozen_predictor(denoiser, self._average()),
            )
        return self.compare(denoiser, x, self.walk.timesteps[stops].to(self.walk.device), text)

    def compare(
        self, denoiser: nn.Module, x: Tensor, t: Tensor, text: Tensor
    ) -> Mapping[str, Tensor]:
        """Return L_d = |e(c) - sg e(blank)|^2, both the network's own, and L_a = |e(blank) - e0(blank)|^2, e0 the untouched one's.

        Args:
            denoiser: the network in training.
            x: latents, (b, c, h, w).
            t: their timesteps, (b,).
            text: the words, (b, tokens, width).
        """
        blank = self.walk.blank.expand(len(x), -1, -1)
        if not self.edit.weight_anchor:
            aim = frozen_predictor(denoiser)(x, t, blank)
            return {"L_d": losses.squared_error(denoiser(x, t, text).sample, aim)}
        before = frozen_predictor(denoiser, self.reference)(x, t, blank)
        out, own = denoiser(
            torch.cat([x, x]), torch.cat([t, t]), torch.cat([text, blank])
        ).sample.chunk(2)
        return {
            "L_d": losses.squared_error(out, own.detach()),
            "L_a": losses.squared_error(own, before),
        }
