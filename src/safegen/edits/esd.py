"""ESD: teach the denoiser to predict, for a concept's words, the opposite of what it said (Gandikota et al. 2023, arXiv:2303.07345)."""

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
from safegen.edits.functional.adversary import AdversarySetting, build_adversary
from safegen.edits.functional.rollout import DdimRollout, frozen_predictor, full_precision
from safegen.edits.training.config import SHORT, Objective, Training
from safegen.edits.training.samples import read_captions
from safegen.models.model import Model

PUBLISHED = Training(
    updates=1000, batch=1, accumulation=1, lr=1e-5, weight_decay=0.0, clip=1e9, ema=0.0
)
"""Adam at a constant rate, no clipping, no average."""
PRESETS: dict[str, dict[str, Any]] = {
    "default": {
        "rollout": "base",
        "steps": 25,
        "selector": "attn2",
        "weight_retain": 1.0,
        "training": SHORT,
    },
    "paper": {"captions": ()},
    "paper-x": {"captions": (), "selector": "attn2"},
    "rewritten": {
        "captions": (),
        "selector": "attn2",
        "rollout": "base",
        "trajectories": 100,
        "training": PUBLISHED.model_copy(update={"updates": 200, "lr": 5e-5}),
    },
}
"""`paper`: ESD-u of the first code, its choice for nudity; `paper-x`: ESD-x. `rewritten`: the authors' present code for SD 1.4, whose
`negative_guidance` 2 is our `strength` 1 (they subtract from e0(c), we from e0(blank)); with
`erase_from` both subtract from that, so that their 2 is `strength` 2 there. `default`: ours, for
the miniature model.
"""


class ESD(TrainedEdit):
    """Settings of the ESD edit."""

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = PRESETS
    inputs: ClassVar[Literal["triplets", "words"]] = "words"

    erase: tuple[str, ...] = ()
    """Words that ask for the concept, one of them a sample; a concept lends its own."""
    erase_from: str | None = None
    """Take the words out of this one only ("cowboy" without "a cowboy hat"): it is what is drawn and taught; None for the words at all."""
    strength: float = Field(default=1.0, ge=0)
    """How far the target lies on the other side of the blank prediction; 0 is the blank one itself (eta in the paper). With erase_from, how
    far it lies from the prediction for that one."""
    rollout: Literal["student", "base"] = "student"
    """Whose pictures are stopped on their way: the edited model's, anew for each batch (first code), or the untouched one's, made once."""
    trajectories: int = Field(default=16, ge=1)
    """With rollout base: pictures for each word, every step of each of which is kept with its targets."""
    steps: int = Field(default=50, ge=1)
    """DDIM steps of a rollout."""
    guidance: float = Field(default=3.0, ge=1)
    """Guidance of a rollout."""
    weight_retain: float = Field(default=0.0, ge=0)
    """Weight of L_r: on the same latents, harmless captions should be answered as before (as Zhang et al. 2024, arXiv:2405.15234)."""
    captions: tuple[str, ...] = ()
    """Prompt lists (`source:list`) and text files of harmless captions for L_r."""
    adversary: AdversarySetting = 0.0
    """Who moves the taught words' text embedding to where the edit fails: the size of one step (a part of its norm; 0 is none), a
    name, or a table with a name and settings (docs/edits.md)."""
    selector: str = "noxattn"
    """Which weights change: attn2 is ESD-x, kv2 ESD-x-strict, noxattn ESD-u, attn1 self-attention alone."""
    training: Training = PUBLISHED
    """How the loop trains."""

    @model_validator(mode="after")
    def _no_idle_setting(self) -> Self:
        if (
            self.rollout == "student"
            and self.trajectories != type(self).model_fields["trajectories"].default
        ):
            raise ValueError(
                "trajectories has no effect with rollout student, which draws anew for each batch; leave it out"
            )
        if self.captions and not self.weight_retain:
            raise ValueError(
                "captions have no effect with weight_retain 0; leave them out, or give L_r a weight"
            )
        check_phrases(self.erase)
        return self

    def describe(self) -> str:
        """Return it."""
        return (
            f"It is given words ({join_quoted(self.erase)}) and no pictures. On pictures that the model itself begins to draw, it is "
            "taught to predict the opposite of what these words ask for. A prompt that asks for the same in other words may still get "
            "it."
        )

    @classmethod
    def defaults_from(cls, concept: Concept, said: Mapping[str, Any]) -> dict[str, Any]:
        """Return its words, and its captions to settings with an L_r."""
        return phrases_from(cls.method(), concept, said) | (
            {"captions": concept.captions} if said.get("weight_retain") else {}
        )

    def build_objective(
        self, model: Model, triplets: Triplets | None, names: Sequence[str]
    ) -> Objective:
        """Return its batches and losses."""
        return ESDObjective(self, model, names)


class ESDObjective:
    """ESD's batches and losses.

    With rollout base, latents and targets are all made before the first update.
    """

    def __init__(self, edit: ESD, model: Model, names: Sequence[str]) -> None:
        """Encode the words and captions; make the rollouts that can be made once."""
        self.edit, self.words = edit, require_phrases("esd", edit.erase)
        if edit.weight_retain and not edit.captions:
            raise ConfigError(
                "weight_retain has no effect without captions; give a concept that has some, or set captions, or weight 0"
            )
        self.attack = build_adversary(edit.adversary, model, names)
        self.weights = {"L_e": 1.0} | ({"L_r": edit.weight_retain} if edit.weight_retain else {})
        own = dict(model.denoiser.named_parameters())
        self.reference = {name: own[name].detach().clone() for name in names}
        self.walk = DdimRollout(model, steps=edit.steps, guidance=edit.guidance)
        self.text = model.encode_text(list(self.words)).float()
        self.taught = (
            model.encode_text([edit.erase_from]).float().expand_as(self.text)
            if edit.erase_from is not None
            else self.text
        )
        lines = read_captions(edit.captions)
        self.captions = model.encode_text(lines).float() if lines else self.text[:0]
        self.fingerprint = " ".join(
            [edit.model_dump_json(exclude={"training"}), model.hash, repr(lines)]
        )
        self.pool = self._pool(model) if edit.rollout == "base" else []

    def _pool(self, model: Model) -> list[dict[str, Tensor]]:
        """Return, for each word, the latents of every step of its trajectories and what the untouched model says there."""
        out, n = [], self.edit.trajectories
        precision = self.edit.training.precision
        with full_precision(model, precision):
            for i in range(len(self.words)):
                x = self.walk.noise(
                    n, torch.Generator("cpu").manual_seed(self.edit.training.seed * 1_000_003 + i)
                )
                parts = []
                for start in range(0, n, 8):
                    part = x[start : start + 8]
                    asked = (
                        {"erase": self.text[i].expand(len(part), -1, -1)}
                        if self.edit.erase_from is not None
                        else {}
                    )
                    parts.append(
                        self.walk.trajectory(
                            part,
                            self.taught[i].expand(len(part), -1, -1),
                            frozen_predictor(model.denoiser),
                            asked,
                        )
                    )
                out.append({name: torch.cat([part[name] for part in parts]) for name in parts[0]})
        return out

    def training_step(
        self,
        denoiser: nn.Module,
        micro_step: int,
        generator: torch.Generator,
        share: tuple[int, int],
    ) -> Mapping[str, Tensor]:
        """Draw one batch and return L_e, and L_r where it has a weight, (b,) each."""
        b, g = self.edit.training.batch, generator
        mine = torch.arange(b)[share[0] :: share[1]]
        which = torch.randint(len(self.words), (b,), generator=g)[mine]
        stops = torch.randint(self.edit.steps, (b,), generator=g)
        caption = torch.randint(max(len(self.captions), 1), (b,), generator=g)[mine]
        if self.edit.rollout == "base":
            at = torch.randint(self.edit.trajectories, (b,), generator=g)[mine]
            stops = stops[mine]
            said = {
                name: torch.stack(
                    [self.pool[w][name][k, s] for w, k, s in zip(which, at, stops, strict=True)]
                ).to(self.walk.device)
                for name in self.pool[0]
            }
        else:
            stops = stops[:1].expand(len(mine))  # the samples of a batch stop together
            said = self._fresh(
                denoiser, self.walk.noise(b, g)[mine.to(self.walk.device)], which, int(stops[0])
            )
        t = self.walk.timesteps[stops].to(self.walk.device)
        return self.compare(
            denoiser,
            said,
            t,
            self.taught[which],
            self.captions[caption] if self.weights.get("L_r") else None,
        )

    def _fresh(
        self, denoiser: nn.Module, noise: Tensor, which: Tensor, stop: int
    ) -> dict[str, Tensor]:
        """Return latents of the student's own pictures at one step, and what the untouched model says there."""
        text, before = self.taught[which], frozen_predictor(denoiser, self.reference)
        x = self.walk.sample_until(stop, noise, text, frozen_predictor(denoiser))
        t = self.walk.timesteps[stop]
        said, blank = self.walk.predict_cfg(t, x, text, before)
        more = (
            {"erase": before(x, self.walk.at(t, len(x)), self.text[which])}
            if self.edit.erase_from is not None
            else {}
        )
        return {"x": x, "text": said, "blank": blank, **more}

    def compare(
        self,
        denoiser: nn.Module,
        said: Mapping[str, Tensor],
        t: Tensor,
        text: Tensor,
        captions: Tensor | None,
    ) -> Mapping[str, Tensor]:
        """Return L_e and L_r for given latents and predictions of the untouched model.

        Args:
            denoiser: the network in training.
            said: `x`, the latents; `text` and `blank`, the untouched model's predictions for what
                is drawn and for no text; `erase`, for the words, where they are not what is drawn:
                (b, c, h, w) each.
            t: their timesteps, (b,).
            text: what is taught, (b, tokens, width).
            captions: harmless texts, (b, tokens, width); None for no L_r.
        """
        if "erase" in said:
            want = losses.negative_guidance(
                said["text"], said["erase"], said["blank"], strength=self.edit.strength
            )
        else:
            want = losses.negative_guidance(
                said["blank"], said["text"], said["blank"], strength=self.edit.strength
            )
        x = said["x"]
        if self.attack:
            text = self.attack(
                denoiser, x, t, text, want=want, before=said.get("erase", said["text"])
            )
        if captions is None:
            return {"L_e": losses.squared_error(denoiser(x, t, text).sample, want)}
        keep = frozen_predictor(denoiser, self.reference)(x, t, captions)
        out, kept = denoiser(
            torch.cat([x, x]), torch.cat([t, t]), torch.cat([text, captions])
        ).sample.chunk(2)
        return {"L_e": losses.squared_error(out, want), "L_r": losses.squared_error(kept, keep)}
