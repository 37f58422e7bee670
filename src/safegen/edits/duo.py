"""DUO: prefer safe pictures to their unsafe twins, without a word of text (Park et al.

2024, arXiv:2407.21035).
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
from safegen.edits.base import TrainedEdit, join_quoted, phrases_from, require_phrases
from safegen.edits.functional import losses
from safegen.edits.functional.rollout import DdimRollout, frozen_predictor, full_precision
from safegen.edits.training.config import SHORT, Objective, Training
from safegen.edits.training.samples import encode_triplets
from safegen.judges import Judge, judge_images, load_judge
from safegen.models.model import Model

RELEASED = Training(
    updates=1000, batch=4, accumulation=1, lr=6e-5, weight_decay=1e-2, clip=1.0, ema=0.0
)
"""The released run has one pair on each of four machines, and scales its rate 3e-4 by 100 / beta."""
PRESETS: dict[str, dict[str, Any]] = {
    "default": {"rank": 16, "steps": 25, "training": SHORT},
    "paper": {},
    "paper-violence": {
        "beta": 1000.0,
        "weight_keep": 1e7,
        "training": RELEASED.model_copy(update={"updates": 500, "lr": 3e-5}),
    },
}
"""`paper`: the released values for SD 1.4 and nudity; `paper-violence`: those for violence, of which one sub-concept is trained at a time.
`default`: `paper`'s on the miniature model's scale, not yet tuned."""


class DUO(TrainedEdit):
    """Settings of the DUO edit."""

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = PRESETS
    erase: tuple[str, ...] = ()
    """Words that ask for the concept: what a safe twin is drawn away from.

    A concept lends its own; nothing is trained with them.
    """
    anchors: tuple[str, ...] = ()
    """Words for the safe counterpart: what a safe twin is drawn toward.

    A concept lends those of its counterpart.
    """
    redraw: float = Field(default=0.75, gt=0, le=1)
    """How far an unsafe picture is noised before it is drawn again as its safe twin.

    1 is all the way.
    """
    steps: int = Field(default=50, ge=1)
    """DDIM steps of a whole drawing, of which `redraw` are done."""
    guidance: float = Field(default=7.5, ge=1)
    """Guidance of a safe twin."""
    judge: str | None = None
    """Judge that must be silent on a safe twin, or it is drawn again.

    None takes twins as they are drawn. A concept lends its own.
    """
    labels: tuple[str, ...] = ()
    """Labels of the judge that make a twin unsafe.

    All its unsafe ones unless told. A concept lends its own.
    """
    threshold: float | None = None
    """From which score on; the judge's own unless told. A concept lends its own."""
    tries: int = Field(default=8, ge=1)
    """Drawings of a twin, the first included.

    A pair whose judge is never silent is left out, and named in the patch.
    """
    objective: Literal["dpo", "kto"] = "dpo"
    """Whether an unsafe picture is held against its own twin, or against the mean over the twins of its batch (the released `kto`)."""
    beta: float = Field(default=500.0, gt=0)
    """How sharply the safe picture is preferred: 500 for nudity, 1000 for violence (preset paper-violence)."""
    weight_keep: float = Field(default=5e6, ge=0)
    """Weight of L_o: on pure noise, at the noisiest timestep, the answer should stay what it was.

    The paper's lambda, 1e4 beta.
    """
    timesteps: tuple[int, int] = (0, 750)
    """First and one-past-last training timestep that is drawn, counted from the cleanest."""
    share_timestep: bool = False
    """Whether a pair shares its timestep as it shares its noise.

    The released code draws two, but for objective kto, which shares it.
    """
    selector: str = "attn1"
    """Which weights change."""
    rank: int | None = Field(default=32, ge=1)
    """Train a LoRA of this rank, as published; None trains the selected weights themselves."""
    training: Training = RELEASED
    """How the loop trains.

    Its rate, and `weight_keep`, belong to beta: whoever changes that alone has another loss than
    the paper's.
    """

    @model_validator(mode="after")
    def _no_idle_setting(self) -> Self:
        if not 0 <= self.timesteps[0] < self.timesteps[1]:
            raise ValueError(f"timesteps must rise from 0 or more, got {self.timesteps}")
        if self.objective == "kto" and self.share_timestep:
            raise ValueError(
                "share_timestep has no effect with objective kto, where a pair shares it anyway; leave it out"
            )
        fields = type(self).model_fields
        if self.judge is None and (
            idle := [
                n for n in ("labels", "threshold", "tries") if getattr(self, n) != fields[n].default
            ]
        ):
            raise ValueError(
                f"{idle[0]} has no effect without a judge, which looks at safe twins; leave it out, or name one"
            )
        return self

    def describe(self) -> str:
        """Return it."""
        return (
            "It is given pictures of the concept. The model itself redraws each as a harmless twin, away from the concept's words "
            f"({join_quoted(self.erase)}), and is then taught to prefer the twins, under the blank text alone."
        )

    @classmethod
    def defaults_from(cls, concept: Concept, said: Mapping[str, Any]) -> dict[str, Any]:
        """Return its words, its counterpart's, and its judge."""
        eyes = {"judge": concept.judge, "labels": concept.labels, "threshold": concept.threshold}
        other = (
            said.get("judge", concept.judge) != concept.judge
        )  # another judge, or none, has other labels
        return (
            phrases_from(cls.method(), concept, said)
            | {"anchors": concept.counterpart}
            | ({} if other else eyes)
        )

    def build_objective(
        self, model: Model, triplets: Triplets | None, names: Sequence[str]
    ) -> Objective:
        """Return its batches and losses."""
        assert triplets is not None
        return DUOObjective(self, model, triplets, names)


class DUOObjective:
    """DUO's pairs and losses. Safe twins are drawn once, as latents; no picture is written."""

    def __init__(self, edit: DUO, model: Model, triplets: Triplets, names: Sequence[str]) -> None:
        """Encode the unsafe pictures and draw their safe twins."""
        self.edit = edit
        judge = (
            load_judge(edit.judge, labels=edit.labels, threshold=edit.threshold)
            if edit.judge
            else None
        )
        self.weights = {"L_dpo": 1.0} | ({"L_o": edit.weight_keep} if edit.weight_keep else {})
        self.abar, self.prediction = model.alphas_cumprod().to(model.device), model.prediction
        if edit.timesteps[1] > len(self.abar):
            raise ConfigError(
                f"timesteps must end by {len(self.abar)} on this model, got {edit.timesteps[1]}"
            )
        self.by_noise = self.abar.argsort(
            descending=True
        )  # timesteps from the cleanest on: a schedule may run either way
        own = dict(model.denoiser.named_parameters())
        self.reference = {name: own[name].detach().clone() for name in names}
        self.blank = model.encode_text([""]).float()
        self.unsafe = encode_triplets(model, triplets, flip=False)[0, 0]
        self.facts: dict[str, Any] = {}
        self.safe = (
            self._redraw(model)
            if judge is None
            else self._judged(model, judge, [row.id for row in triplets.rows])
        )
        seen = [judge.id] if judge else []
        self.fingerprint = " ".join(
            [edit.model_dump_json(exclude={"training"}), model.hash, triplets.hash, *seen]
        )

    def _judged(self, model: Model, judge: Judge, names: Sequence[str]) -> Tensor:
        """Return safe twins on which a judge is silent, drawn again where it is not, and leave out pairs where it never is.

        Raises:
            ConfigError: it is silent on none.
        """
        safe, open_ = torch.empty_like(self.unsafe), list(range(len(names)))
        left = []
        for turn in range(self.edit.tries):
            drawn = self._redraw(model, turn, open_)
            verdicts = judge_images(judge, model.decode_images(drawn))
            for place, twin, verdict in zip(open_, drawn, verdicts, strict=True):
                if verdict == "safe":  # one that could not be judged is drawn again
                    safe[place] = twin
            open_ = [
                place for place, verdict in zip(open_, verdicts, strict=True) if verdict != "safe"
            ]
            left.append(len(open_))
            if not open_:
                break
        kept = [place for place in range(len(names)) if place not in open_]
        out = [names[place] for place in open_]
        if not kept:
            raise ConfigError(
                f"the judge {judge.id} is silent on no safe twin in {self.edit.tries} tries ({', '.join(out[:3])} ...): give anchors that "
                "ask for something harmless, a larger redraw, more tries, or no judge"
            )
        self.facts = {
            "twins": {
                "judge": judge.id,
                "pairs": len(kept),
                "open_after_attempt": left,
                "left out": out,
            }
        }
        self.unsafe = self.unsafe[kept]
        return safe[kept]

    def _redraw(self, model: Model, turn: int = 0, places: Sequence[int] | None = None) -> Tensor:
        """Return safe twins of unsafe latents: noised, and denoised toward the anchors and away from the words (SDEdit).

        Args:
            model: what draws.
            turn: which drawing of them it is; each has noise of its own, which does not depend on
                the others.
            places: whose; all when None.
        """
        edit, words = self.edit, require_phrases("duo", self.edit.erase)
        if not edit.anchors:
            raise ConfigError(
                "duo draws safe twins by words for the counterpart; give a concept that has some, or anchors"
            )
        walk, precision = (
            DdimRollout(model, steps=edit.steps, guidance=edit.guidance),
            edit.training.precision,
        )
        walk.blank = model.encode_text([", ".join(words)]).float()  # guidance away from these
        text, start = (
            model.encode_text([", ".join(edit.anchors)]).float(),
            edit.steps - max(round(edit.redraw * edit.steps), 1),
        )
        noise = walk.noise(
            len(self.unsafe),
            torch.Generator("cpu").manual_seed(edit.training.seed * 1_000_003 + turn),
        )
        t = walk.timesteps[start].to(self.abar.device)
        of = slice(None) if places is None else list(places)
        noised = losses.add_noise(self.unsafe[of], noise[of], self.abar[t].expand(len(noise[of])))
        out = []
        with torch.no_grad(), full_precision(model, precision):
            for part in noised.split(16):
                x = part
                for t in walk.timesteps[start:]:
                    x = walk.step(
                        t,
                        x,
                        *walk.predict_cfg(
                            t, x, text.expand(len(x), -1, -1), frozen_predictor(model.denoiser)
                        ),
                    )
                out.append(x)
        return torch.cat(out)

    def training_step(
        self,
        denoiser: nn.Module,
        micro_step: int,
        generator: torch.Generator,
        share: tuple[int, int],
    ) -> Mapping[str, Tensor]:
        """Draw one batch and return L_dpo, and L_o where it has a weight, (b,) each."""
        b, g, device = self.edit.training.batch, generator, self.abar.device
        mine = torch.arange(b)[share[0] :: share[1]]
        at = torch.randint(len(self.unsafe), (b,), generator=g)[mine].to(device)
        t = self.by_noise[
            torch.randint(*self.edit.timesteps, (2, b), generator=g)[:, mine].to(device)
        ]
        eps, start = torch.randn(2, b, *self.unsafe.shape[1:], generator=g)[:, mine].to(device)
        shared = self.edit.share_timestep or self.edit.objective == "kto"
        return self.compare(
            denoiser, self.safe[at], self.unsafe[at], eps, t[0], t[0] if shared else t[1], start
        )

    def compare(
        self,
        denoiser: nn.Module,
        safe: Tensor,
        unsafe: Tensor,
        eps: Tensor,
        t_safe: Tensor,
        t_unsafe: Tensor,
        start: Tensor,
    ) -> Mapping[str, Tensor]:
        """Return L_dpo and L_o = |e(z_T) - e0(z_T)|^2 at the noisiest timestep, all for the blank text.

        L_dpo is `losses.preference`, or `losses.unpaired_preference` with objective kto.

        Args:
            denoiser: the network in training.
            safe: latents of safe twins, (b, c, h, w).
            unsafe: of the unsafe pictures.
            eps: noise that a pair shares.
            t_safe: timesteps of the safe ones, (b,).
            t_unsafe: of the unsafe ones.
            start: pure noise for L_o.
        """
        b, t = len(safe), torch.cat([t_safe, t_unsafe])
        z, noise, blank = torch.cat([safe, unsafe]), torch.cat([eps, eps]), self.blank
        x, truth = losses.add_noise(z, noise, self.abar[t]), noise
        if self.prediction != "epsilon":
            truth = losses.velocity(noise, z, self.abar[t])
        if self.edit.weight_keep:
            x, t = torch.cat([x, start]), torch.cat([t, self.by_noise[-1].expand(b)])
        text = blank.expand(len(x), -1, -1)
        before = frozen_predictor(denoiser, self.reference)(x, t, text)
        said = denoiser(x, t, text).sample
        now, then = (losses.squared_error(out[: 2 * b], truth).chunk(2) for out in (said, before))
        prefer = losses.preference if self.edit.objective == "dpo" else losses.unpaired_preference
        terms = {"L_dpo": prefer(now[0], then[0], now[1], then[1], beta=self.edit.beta)}
        return terms | (
            {"L_o": losses.squared_error(said[2 * b :], before[2 * b :])}
            if self.edit.weight_keep
            else {}
        )
