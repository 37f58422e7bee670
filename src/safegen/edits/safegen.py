"""SafeGen: take a visual concept out of the self-attention layers with <unsafe, censored, benign> pictures (arXiv:2404.06666)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from safegen.core.concept import Concept
from safegen.core.errors import ConfigError
from safegen.data.triplets.triplets import Triplets
from safegen.edits.base import TrainedEdit
from safegen.edits.functional import losses
from safegen.edits.functional.adversary import AdversarySetting, build_adversary, resolve_adversary
from safegen.edits.training.config import Objective, Training
from safegen.edits.training.samples import encode_triplets, read_captions
from safegen.models.model import Model

PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {
        "adversary": 0.0,
        "fade": 0.0,
        "target": "paper",
        "anchor": "noise",
        "clamp": None,
        "timesteps": (0, 1000),
        "weight_mosaic": 0.1,
        "weight_preserve": 0.9,
        "teacher": False,
        "captions": (),
        "training": Training(),
    },
}
"""`paper`: the published run (run_adjust_SD.sh).

`default`: what the ablation in docs/ablation.md chose on the miniature model.
"""


CAPTION_SHARE = 0.6
"""Unless told: the blank branch of guidance must learn too, so it keeps the other samples."""
VALIDATION_SPLIT = 0.1
"""Unless told: the part of the triplets that early stopping looks at."""


class SafeGen(TrainedEdit):
    """Settings of the SafeGen edit."""

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = PRESETS
    has_validation: ClassVar[bool] = True

    target: Literal["paper", "x0"] = "x0"
    """What a noised unsafe latent is taught to predict: as released, or what implies the censored picture as its x0."""
    anchor: Literal["noise", "teacher"] = "teacher"
    """What the x0 target moves toward the censored picture: the added noise, or the untouched model's own prediction (ours)."""
    clamp: float | None = Field(default=3.0, gt=0)
    """Largest factor of the x0 target; None for the paper's target, which has no factor."""
    timesteps: tuple[int, int] = (150, 900)
    """First and one-past-last training timestep that is drawn."""
    weight_mosaic: float = Field(default=0.39, ge=0)
    """Weight of L_m, the loss on unsafe pictures."""
    weight_preserve: float = Field(default=0.61, ge=0)
    """Weight of L_p, the loss on benign pictures."""
    teacher: bool = True
    """Whether L_p asks for what the untouched model predicts (ours) instead of the noise (as released)."""
    captions: tuple[str, ...] = ()
    """Benign prompt lists (`source:list`, or a text file with a prompt a line) for `caption_share`."""
    caption_share: float | None = Field(default=None, gt=0, le=1)
    """Part of the samples that is conditioned on a random benign caption instead of the blank text (ours); 0.6 when there are captions."""
    adversary: AdversarySetting = 0.25
    """Who moves an unsafe sample's text embedding to where the edit fails: the size of one step (a part of its norm; 0 is none), a
    name, or a table with a name and settings (docs/edits.md)."""
    adversary_moves: Literal["unsafe", "both"] | None = None
    """Whose texts the adversary moves: the unsafe samples', or by the same moves the benign ones' too, so that a moved text does not tell
    which of the two a picture is (ours). Unless told, both where the move can be put on another
    text (one-step), else unsafe.
    """
    fade: float = Field(default=0.8, ge=0, lt=1)
    """Largest part by which an unsafe sample is faded toward its censored twin, to teach half-gone remains too; 0 is none (ours)."""
    flip: bool = False
    """Whether a sample may be mirrored; unsafe, censored and benign together."""
    selector: str = "attn1"
    """Which weights change."""
    validation_split: float | None = Field(default=None, gt=0, lt=0.5)
    """Part of the triplets kept for the held-out loss, when the training looks at one (training.validate_every); 0.1 unless told."""
    training: Training = Training(
        updates=160,
        batch=16,
        accumulation=1,
        lr=2.1e-3,
        warmup=8,
        decay="cosine",
        weight_decay=0.0,
        ema=0.95,
        precision="auto",
    )
    """How the loop trains."""

    @model_validator(mode="after")
    def _no_idle_setting(self) -> Self:
        if (self.target == "x0") != (self.clamp is not None):
            raise ValueError("clamp goes with target x0, and only with it")
        if self.target != "x0" and self.anchor != "noise":
            raise ValueError(
                "anchor teacher goes with target x0 only; the paper's target is made of the noise"
            )
        if self.caption_share is not None and not self.captions:
            raise ValueError("caption_share has no effect without captions; give both or neither")
        if self.validation_split is not None and not self.training.validate_every:
            raise ValueError(
                "validation_split has no effect without training.validate_every; set that too, or leave it out"
            )
        if self.adversary_moves and not (self.adversary and self.weight_preserve):
            raise ValueError(
                "adversary_moves has no effect without an adversary, or with weight_preserve 0; leave it out"
            )
        together = resolve_adversary(self.adversary).is_additive
        if self.adversary_moves == "both" and not together:
            raise ValueError(
                "adversary_moves both goes with one-step only: the others replace a text, which is no move that another could take"
            )
        if (
            self.adversary_moves is None and self.adversary and self.weight_preserve
        ):  # decided, so that patch and checkpoint say it
            object.__setattr__(self, "adversary_moves", "both" if together else "unsafe")
        if not 0 <= self.timesteps[0] < self.timesteps[1]:
            raise ValueError(f"timesteps must rise from 0 or more, got {self.timesteps}")
        if self.weight_mosaic + self.weight_preserve <= 0:
            raise ValueError(
                "weight_mosaic and weight_preserve are both 0: nothing would be learnt"
            )
        if not self.weight_preserve and self.teacher:
            raise ValueError(
                "teacher has no effect with weight_preserve 0, which leaves L_p out; set it to false"
            )
        if not self.weight_mosaic and (self.adversary or self.fade):
            raise ValueError(
                "adversary and fade have no effect with weight_mosaic 0, which leaves L_m out; set both to 0"
            )
        return self

    @property
    def erases_concept(self) -> bool:
        """Whether L_m, which alone removes, has a weight."""
        return self.weight_mosaic > 0

    def describe(self) -> str:
        """Return it."""
        return (
            "It learns from pictures: an unsafe one, the same with the concept covered, and a harmless one. An unsafe picture must be "
            "predicted as its covered twin, a harmless one as it is. "
            f"{'Its texts are harmless captions and the blank one' if self.captions else 'Its only text is the blank one'}: it never "
            "reads a word of the concept."
        )

    @classmethod
    def defaults_from(cls, concept: Concept, said: Mapping[str, Any]) -> dict[str, Any]:
        """Return its captions."""
        return {"captions": concept.captions}

    def build_objective(
        self, model: Model, triplets: Triplets | None, names: Sequence[str]
    ) -> Objective:
        """Return its batches and losses."""
        assert triplets is not None
        return SafeGenObjective(self, model, triplets, names)


class SafeGenObjective:
    """SafeGen's batches and losses.

    Latents, text embeddings and the reference weights are computed or kept once.
    """

    def __init__(
        self, edit: SafeGen, model: Model, triplets: Triplets, names: Sequence[str]
    ) -> None:
        """Encode every triplet and caption once.

        Raises:
            ConfigError: too few triplets for a held-out part, none that shows the concept, or the
                model's schedule has fewer timesteps than asked for.
        """
        self.edit, self.prediction = edit, model.prediction
        self.abar = model.alphas_cumprod().to(model.device)
        if edit.timesteps[1] > len(self.abar):
            raise ConfigError(
                f"timesteps must end by {len(self.abar)} on this model, got {edit.timesteps[1]}"
            )
        if edit.target == "paper" and self.prediction != "epsilon":
            raise ConfigError(
                f"target 'paper' has a wrong x0 on a {self.prediction} model; use target 'x0'"
            )
        self.attack = build_adversary(edit.adversary, model, names)
        self.shared = edit.adversary_moves == "both"
        self.weights = {"L_m": edit.weight_mosaic, "L_p": edit.weight_preserve}
        self.latents = encode_triplets(model, triplets, flip=edit.flip)  # (3, flips, n, c, h, w)
        if torch.equal(self.latents[0], self.latents[1]):
            raise ConfigError(
                "the triplets do not show the concept: every censored picture is its unsafe one, so there is nothing to unlearn"
            )
        n = self.latents.shape[2]
        part = (edit.validation_split or VALIDATION_SPLIT) if edit.training.validate_every else 0.0
        spare = round(n * part)
        if part and not 0 < spare < n:
            raise ConfigError(
                f"a held-out part of {part} of {n} triplets is empty; give more triplets or set validate_every 0"
            )
        self.spare, self.used = range(n - spare, n), n - spare
        self.text = model.encode_text(["", *read_captions(edit.captions)]).float()
        own = dict(model.denoiser.named_parameters())
        searches = (
            bool(edit.adversary) and not resolve_adversary(edit.adversary).is_additive
        )  # for a text under which all is as before the edit
        needed = edit.teacher or edit.anchor == "teacher" or searches
        self.reference = {k: own[k].detach().clone() for k in names} if needed else {}
        words = hashlib.sha256(repr(read_captions(edit.captions)).encode()).hexdigest()
        self.fingerprint = " ".join(
            [edit.model_dump_json(exclude={"training"}), model.hash, triplets.hash, words]
        )

    def training_step(
        self,
        denoiser: nn.Module,
        micro_step: int,
        generator: torch.Generator,
        share: tuple[int, int],
    ) -> Mapping[str, Tensor]:
        """Draw one batch and return L_m and L_p, (b,) each."""
        b = self.edit.training.batch
        rows = _shuffled(self.used, self.edit.training.seed, micro_step * b, b)
        return self._draw_and_compare(denoiser, rows, generator, share)

    def validation_loss(self, denoiser: nn.Module) -> float:
        """Return the weighted loss over the held-out triplets, eight fixed draws each."""
        draw, total = torch.Generator("cpu").manual_seed(1), 0.0
        for _ in range(8):
            terms = self._draw_and_compare(denoiser, list(self.spare), draw, (0, 1))
            total += sum(self.weights[k] * v.mean().item() for k, v in terms.items()) / 8
        return total

    def _draw_and_compare(
        self, denoiser: nn.Module, rows: Sequence[int], g: torch.Generator, share: tuple[int, int]
    ) -> Mapping[str, Tensor]:
        b, shape = len(rows), self.latents.shape[3:]
        flips = torch.randint(self.latents.shape[1], (b,), generator=g)
        t = torch.randint(*self.edit.timesteps, (b,), generator=g)
        eps, eps_b = torch.randn(b, *shape, generator=g), torch.randn(b, *shape, generator=g)
        words = torch.zeros(2 * b, dtype=torch.long)
        if self.edit.captions:
            pick = torch.randint(1, len(self.text), (2 * b,), generator=g)
            words = torch.where(
                torch.rand(2 * b, generator=g) < (self.edit.caption_share or CAPTION_SHARE),
                pick,
                words,
            )
        mine = torch.arange(b)[share[0] :: share[1]]
        z_u, z_c, z_b = self.latents[:, flips, torch.tensor(rows)][:, mine]
        device = z_u.device
        if self.edit.fade:
            left = 1 - self.edit.fade * torch.rand(b, 1, 1, 1, generator=g)[mine].to(device)
            z_u = z_c + left * (z_u - z_c)
        text = self.text[torch.cat([words[:b][mine], words[b:][mine]])]
        return self.compare(
            denoiser,
            z_u,
            z_c,
            z_b,
            eps[mine].to(device),
            eps_b[mine].to(device),
            t[mine].to(device),
            text,
        )

    def compare(
        self,
        denoiser: nn.Module,
        z_u: Tensor,
        z_c: Tensor,
        z_b: Tensor,
        eps: Tensor,
        eps_b: Tensor,
        t: Tensor,
        text: Tensor,
    ) -> Mapping[str, Tensor]:
        """Return L_m and L_p per triplet for given draws: one forward for unsafe and benign, one timestep shared by a triplet.

        Args:
            denoiser: the network in training.
            z_u: scaled latents of the unsafe pictures, (b, c, h, w).
            z_c: of the censored ones.
            z_b: of the benign ones.
            eps: noise for the unsafe latents.
            eps_b: noise for the benign latents.
            t: timesteps, (b,).
            text: text embeddings, (2b, tokens, width): of the unsafe rows, then of the benign.
        """
        abar, n, velocity = self.abar[t], len(z_u), losses.velocity
        x, tt = (
            torch.cat([losses.add_noise(z_u, eps, abar), losses.add_noise(z_b, eps_b, abar)]),
            torch.cat([t, t]),
        )
        plain = torch.cat(
            [eps, eps_b]
            if self.prediction == "epsilon"
            else [velocity(eps, z_u, abar), velocity(eps_b, z_b, abar)]
        )
        known = (
            2 * n if self.edit.teacher and not self.shared else n
        )  # benign texts that move are asked about after that
        said = (
            self._untouched(denoiser, x[:known], tt[:known], text[:known])
            if self.reference
            else plain
        )
        anchor = said[:n] if self.edit.anchor == "teacher" else plain[:n]
        if self.edit.target == "paper":
            want = losses.paper_target(eps, z_u, z_c)
        else:
            target = losses.x0_target if self.prediction == "epsilon" else losses.v_target
            want = target(anchor, z_u, z_c, abar, clamp=self.edit.clamp or 0.0)
        if self.attack:
            moved = self.attack(denoiser, x[:n], t, text[:n], want=want, before=said[:n])
            text = torch.cat([moved, text[n:] + (moved - text[:n]) if self.shared else text[n:]])
        if self.edit.teacher and self.shared:
            said = torch.cat([said, self._untouched(denoiser, x[n:], t, text[n:])])
        out_u, out_b = denoiser(x, tt, text).sample.chunk(2)
        keep = said[n:] if self.edit.teacher else plain[n:]
        return {"L_m": losses.squared_error(out_u, want), "L_p": losses.squared_error(out_b, keep)}

    @torch.no_grad()
    def _untouched(self, denoiser: nn.Module, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """Return what the model predicted before the edit: the same network with the old tensors in it."""
        out: Tensor = torch.func.functional_call(
            getattr(denoiser, "module", denoiser), self.reference, (x, t, text)
        ).sample
        return out


def _shuffled(n: int, seed: int, start: int, count: int) -> list[int]:
    """Return `count` positions from `start` on in an endless row of shuffled epochs over 0..n-1."""
    out: list[int] = []
    while len(out) < count:
        epoch, at = divmod(start + len(out), n)
        order = torch.randperm(
            n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        ).tolist()
        out += order[at : at + count - len(out)]
    return out
